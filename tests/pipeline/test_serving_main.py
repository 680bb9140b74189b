"""The server through its `main` and its application: scores, limits, swaps, windows, failures."""

import asyncio
import copy
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.benchmarks.measures.memory import private_bytes
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.table.format import Table, TableWriter, VersionMismatch
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.serving.app import make_app
from mim_torchrec.serving.batcher import Batcher, DeadlinePassed, QueueFull
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.main import main
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.releases import ReleaseError, Releases
from mim_torchrec.serving.releases import main as release
from mim_torchrec.serving.scorer import Scorer, ScoreRequest
from mim_torchrec.serving.service import Deployment, Service
from tests.pipeline.test_ctr_main import NUM_ITEMS, item_id, write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.serving import messages, output, trained_bundle

ROOT = Path(__file__).parents[2]
INFER = "/v2/models/mim/infer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("serving")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    run = trained_bundle(root, "run", "--ubm", "sim", "--top-k", "2")
    trained_bundle(root, "second", "--seed", "1")
    evaluate(["--model", str(run), "--out", str(run / "evaluation"), "--draws", "0"])
    return root


def deployment(folder: Path, **words) -> Deployment:
    return Deployment(**({"bundle": folder / "run" / "bundle", "store": str(folder / "table")} | words))


DEFAULTS = Limits()


def application(what: Deployment, limits: Limits = DEFAULTS, **words):
    metrics = Metrics()
    service = Service(what, 100, metrics)
    return make_app(service, metrics, limits, **words), service


@pytest.fixture(scope="module")
def client(folder):
    app, _ = application(deployment(folder))
    with TestClient(app) as one:
        yield one


@pytest.fixture(scope="module")
def sent(folder) -> list[dict]:
    return messages(folder)


def start(*words: str) -> tuple[subprocess.Popen, str]:
    """A server of its own, and its address."""
    command = [sys.executable, "-m", "mim_torchrec.serving.main", "--port", "0", "--threads", "1", *words]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    assert "serving mim" in line, line
    return server, line.split()[-1]


def test_scores_over_http_are_the_trainers_for_many_clients_at_once(folder, sent):
    expected = pq.read_table(folder / "run" / "evaluation" / "predictions.parquet")["score"].to_numpy()
    server, address = start("--bundle", str(folder / "run" / "bundle"), "--store", str(folder / "table"))
    try:

        async def ask() -> list[float]:
            async with httpx.AsyncClient(base_url=address, timeout=60) as http:
                answers = await asyncio.gather(*(http.post(INFER, json=message) for message in sent))
            assert {a.status_code for a in answers} == {200}
            return [score for a in answers for score in output(a.json())]

        np.testing.assert_allclose(asyncio.run(ask()), expected, rtol=0, atol=1e-5)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_who_reads_the_address_can_connect_and_end_the_server_at_once(folder):
    for _ in range(3):
        server, address = start("--bundle", str(folder / "run" / "bundle"), "--store", str(folder / "table"))
        with socket.create_connection(address.removeprefix("http://").split(":")):
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_what_the_protocol_asks_for(client, folder, sent):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["version"] == "2"
    about = client.get("/v2/models/mim").json()
    version = Bundle.open(folder / "run" / "bundle").model_version
    assert about["versions"] == [version] and about["parameters"]["table_version"] == "styles"
    assert client.get("/v2/models/mim/ready").status_code == 200
    body = client.post(INFER, json=sent[0] | {"id": "a1", "outputs": [{"name": "score"},
                       {"name": "content_contribution"}]}).json()  # fmt: skip
    assert (body["id"], body["model_name"], body["model_version"]) == ("a1", "mim", version)
    assert [o["name"] for o in body["outputs"]] == ["score", "content_contribution"]
    assert body["parameters"] == {"unknown_user": 0, "unknown_item": 0, "unknown_vector": 0}
    again = client.post(f"/v2/models/mim/versions/{version}/infer", json=sent[0])
    assert output(again.json()) == output(body)


def changed(message: dict, tensor: str, **words) -> dict:
    """The message with another tensor of a name."""
    made = copy.deepcopy(message)
    next(given for given in made["inputs"] if given["name"] == tensor).update(words)
    return made


def without(message: dict, name: str) -> dict:
    return {"inputs": [given for given in message["inputs"] if given["name"] != name]}


def test_bad_requests_are_told_what_is_wrong(client, sent):
    one = next(m for m in sent if len(m["inputs"][3]["data"]) > 1)
    n = len(one["inputs"][4]["data"])
    cases = [
        ({"inputs": []}, "inputs"),
        (without(one, "user_id"), "user_id is missing"),
        (without(one, "query_id"), "needs the feature query_id"),
        (without(one, "candidate_category"), "candidate_category is missing"),
        ({"inputs": [*one["inputs"], one["inputs"][0]]}, "user_id is there twice"),
        (changed(one, "query_id", name="color"), "no input 'color'"),
        (changed(one, "user_id", data=[2**63]), "integers of 64 bits"),
        (changed(one, "user_id", data=["x"]), "integers of 64 bits"),
        (changed(one, "user_id", data=[True]), "inputs"),
        (changed(one, "user_id", data=[1, 2]), "shape"),
        (changed(one, "user_id", data=[1, 2], shape=[2]), "has 2 values, expected 1"),
        (changed(one, "user_id", datatype="FP32"), "is FP32"),
        (changed(one, "candidate_item_id", data=[], shape=[0]), "no candidate"),
        (changed(one, "candidate_category", data=[1] * n), "its values are strings"),
        (changed(one, "candidate_category", data=["x"] * (n + 1), shape=[n + 1]), "expected"),
        (changed(one, "behavior_ts", data=[2**62] * len(one["inputs"][3]["data"])), "after its request"),
        (without(one, "behavior_ts"), "needs"),
    ]  # fmt: skip
    for message, said in cases:
        answer = client.post(INFER, json=message)
        assert answer.status_code == 400 and said in answer.json()["error"], (said, answer.text)
    assert client.post(INFER, content=b"{").status_code == 400
    assert client.post("/v2/models/other/infer", json=one).status_code == 404
    assert client.post("/v2/models/mim/versions/9/infer", json=one).status_code == 404
    answer = client.post(INFER, json=one | {"parameters": {"table_version": "v9"}})
    assert answer.status_code == 409 and "styles, not v9" in answer.json()["error"]
    assert client.get("/nowhere").json() == {"error": "Not Found"}


def test_unknown_users_and_items_are_scored_and_counted(client, sent):
    message = changed(changed(sent[0], "user_id", data=[-1]), "candidate_item_id", data=[-1, -2, 1000, 1007])
    body = client.post(INFER, json=message).json()
    assert body["parameters"] == {"unknown_user": 1, "unknown_item": 2, "unknown_vector": 2}
    assert len(output(body)) == 4
    said = client.get("/metrics").text
    assert 'mim_unknown_ids_total{kind="item"} 2.0' in said and 'mim_requests_total{status="200"}' in said


def test_sizes_are_limited(folder, sent):
    limits = Limits(max_body_bytes=10_000, max_candidates=3, max_behaviors=1)
    app, _ = application(deployment(folder), limits)
    with TestClient(app) as http:
        answer = http.post(INFER, json=sent[0])
        assert answer.status_code == 400 and "4 candidates are more than 3" in answer.json()["error"]
        long = next(m for m in sent if len(m["inputs"][3]["data"]) > 1)
        for name in ("candidate_item_id", "candidate_category"):
            data = next(given["data"] for given in long["inputs"] if given["name"] == name)[:1]
            long = changed(long, name, data=data, shape=[1])
        answer = http.post(INFER, json=long)
        assert answer.status_code == 400 and "behaviors are more than 1" in answer.json()["error"]
        answer = http.post(INFER, content=b" " * 10_001)
        assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]


def test_beyond_loopback_tokens_are_needed(folder, sent, tmp_path):
    words = ["--bundle", str(folder / "run" / "bundle"), "--store", str(folder / "table")]
    with pytest.raises(ValueError, match="give --token-file"):
        main([*words, "--host", "0.0.0.0"])
    (tmp_path / "none").write_text("\n")
    with pytest.raises(ValueError, match="has no token"):
        main([*words, "--token-file", str(tmp_path / "none")])
    app, _ = application(deployment(folder), tokens=frozenset({"one", "two"}))
    with TestClient(app) as http:
        assert http.get("/v2/health/ready").status_code == 200
        for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "two"}):
            answer = http.post(INFER, json=sent[0], headers=header)
            assert answer.status_code == 401 and "token" in answer.json()["error"]
        assert http.post(INFER, json=sent[0], headers={"Authorization": "Bearer two"}).status_code == 200


class Slow:
    """A scorer that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go, self.batches = threading.Event(), threading.Event(), []

    def score(self, requests):
        self.batches.append(len(requests))
        self.begun.set()
        self.go.wait()
        return [request.request_ts for request in requests]


def ask(number: int) -> ScoreRequest:
    return ScoreRequest(ids={"candidate_item_id": torch.ones(10), "behavior_item_id": torch.ones(10)},
                        request_ts=number)  # fmt: skip


def test_what_waits_is_scored_together_and_what_is_too_much_or_too_late_refused():
    async def run() -> None:
        batcher, scorer = Batcher(Limits(max_queue=5, batch_pairs=300), Metrics()), Slow()
        first = asyncio.create_task(batcher.score(scorer, ask(0), None))
        await asyncio.to_thread(scorer.begun.wait)
        late = asyncio.create_task(batcher.score(scorer, ask(9), 0.001))
        waiting = [asyncio.create_task(batcher.score(scorer, ask(k), 60_000)) for k in (1, 2, 3, 4)]
        # tasks run in the order in which they were made, so that this one comes after those that wait
        await asyncio.create_task(asyncio.to_thread(threading.Event().is_set))
        with pytest.raises(QueueFull, match="5 requests wait"):
            await batcher.score(scorer, ask(5), None)
        scorer.go.set()
        assert [await task for task in (first, *waiting)] == [0, 1, 2, 3, 4]
        with pytest.raises(DeadlinePassed):
            await late
        assert scorer.batches == [1, 3, 1]
        batcher.close()

    asyncio.run(run())


def test_one_bad_request_of_a_batch_does_not_harm_the_others():
    class Picky:
        def score(self, requests):
            if any(request.request_ts == 2 for request in requests):
                raise ValueError("two")
            return [request.request_ts for request in requests]

    async def run() -> list:
        batcher, scorer = Batcher(Limits(), Metrics()), Picky()
        tasks = [asyncio.create_task(batcher.score(scorer, ask(k), None)) for k in range(4)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    assert [found[0], found[1], found[3]] == [0, 1, 3] and isinstance(found[2], ValueError)


def test_model_and_vectors_are_swapped_together_while_requests_come(folder, sent):
    app, service = application(deployment(folder))
    other = deployment(folder, bundle=folder / "second" / "bundle")
    with TestClient(app) as http:
        first = output(http.post(INFER, json=sent[0]).json())
        versions, done = set(), threading.Event()

        def load() -> None:
            while not done.is_set():
                answer = http.post(INFER, json=sent[0])
                assert answer.status_code == 200
                versions.add((answer.json()["model_version"], tuple(output(answer.json()))))

        asker = threading.Thread(target=load)
        asker.start()
        for swap in (other, deployment(folder), other):
            service.swap(swap)
        second = output(http.post(INFER, json=sent[0]).json())
        done.set()
        asker.join()
        assert len(versions) <= 2 and first != second
        with pytest.raises(ValueError, match="is no bundle"):
            service.swap(deployment(folder, bundle=folder))
        assert output(http.post(INFER, json=sent[0]).json()) == second


def test_windows_are_followed_while_serving(folder, sent, tmp_path):
    log = open_log(tmp_path / "log", "styles", start=0)
    message = changed(sent[0], "candidate_item_id", data=[item_id(0), item_id(1), -7, item_id(2)])
    app, service = application(deployment(folder, windows=str(log.root)))
    with TestClient(app) as http:
        assert http.post(INFER, json=message).json()["parameters"]["unknown_vector"] == 1
        log.append("w1", torch.tensor([-7]), torch.ones(1, 8), removed=torch.tensor([item_id(1), item_id(2)]))
        while http.get("/v2/models/mim").json()["parameters"]["window_seq"] < 1:
            pass
        assert http.post(INFER, json=message).json()["parameters"]["unknown_vector"] == 2
        assert "mim_window_seq 1.0" in http.get("/metrics").text
        log.append("w2", torch.tensor([5]), torch.ones(1, 8))
        path = log.root / "0000000000000003.safetensors"
        path.write_bytes(b"no window")
        while http.get("/v2/health/ready").status_code == 200:
            pass
        assert "no longer followed" in http.get("/v2/health/ready").json()["error"]
        assert http.post(INFER, json=message).status_code == 200
    service.close()


def test_a_store_that_is_gone_is_503_and_comes_back_without_a_restart(folder, sent, tmp_path):
    server = RedisServer(tmp_path / "redis")
    try:
        RedisStore.load(server.url, Table.open(folder / "table"))
        app, _ = application(deployment(folder, store=server.url))
        with TestClient(app) as http:
            before = output(http.post(INFER, json=sent[0]).json())
            server.kill()
            answer = http.post(INFER, json=sent[0])
            assert answer.status_code == 503 and "does not answer" in answer.json()["error"]
            assert http.get("/v2/health/ready").status_code == 503
            assert http.get("/v2/health/live").status_code == 200
            server.start()
            assert output(http.post(INFER, json=sent[0]).json()) == before
            assert http.get("/v2/health/ready").status_code == 200
    finally:
        server.kill()


def test_releases_are_checked_promoted_and_rolled_back(folder, tmp_path, capsys, sent):
    root = str(tmp_path / "releases")
    writer = TableWriter(tmp_path / "short", table_version="styles", dim=8, dtype="float16", encoder={})
    writer.write_shard(torch.tensor([item_id(k) for k in range(NUM_ITEMS - 2)]), torch.ones(NUM_ITEMS - 2, 8))
    writer.finish()
    log = open_log(tmp_path / "log", "styles", start=0)
    log.append("w", torch.tensor([item_id(NUM_ITEMS - 1)]), torch.ones(1, 8), removed=torch.tensor([1000]))
    bundles = [str(folder / name / "bundle") for name in ("run", "second")]
    words = ["stage", "--root", root, "--name", "one", "--bundle", bundles[0]]
    release([*words, "--table", str(folder / "table")])
    release(["promote", "--root", root, "--name", "one"])
    server, address = start("--release", root)
    try:
        release(["stage", "--root", root, "--name", "two", "--bundle", bundles[1], "--table",
                 str(tmp_path / "short"), "--windows", str(log.root)])  # fmt: skip
        capsys.readouterr()
        release(["check", "--root", root, "--name", "two"])
        assert json.loads(capsys.readouterr().out) == {
            "items": NUM_ITEMS - 2, "current_items": NUM_ITEMS, "missing": 2,
            "examples": [1000, item_id(NUM_ITEMS - 2)],
        }  # fmt: skip
        with pytest.raises(ReleaseError, match="no vector of 2 items"):
            release(["promote", "--root", root, "--name", "two"])
        first = httpx.get(f"{address}/v2/models/mim").json()["versions"]
        release(["promote", "--root", root, "--name", "two", "--allow-missing", "2"])
        os.kill(server.pid, signal.SIGHUP)
        while (second := httpx.get(f"{address}/v2/models/mim").json())["versions"] == first:
            pass
        assert second["versions"] == [Bundle.open(bundles[1]).model_version]
        assert second["parameters"]["window_seq"] == 1
        release(["rollback", "--root", root])
        os.kill(server.pid, signal.SIGHUP)
        while httpx.get(f"{address}/v2/models/mim").json()["versions"] != first:
            pass
        assert httpx.post(address + INFER, json=sent[0]).status_code == 200
    finally:
        server.terminate()
        server.wait()
    write_table(tmp_path / "other", "v9")
    with pytest.raises(VersionMismatch, match="go together"):
        release(["stage", "--root", root, "--name", "three", "--bundle", bundles[0], "--table",
                 str(tmp_path / "other")])  # fmt: skip
    with pytest.raises(ReleaseError, match="there already"):
        release(["stage", "--root", root, "--name", "two", "--bundle", bundles[0]])
    with pytest.raises(ReleaseError, match="needs a table"):
        release(["stage", "--root", root, "--name", "four", "--bundle", bundles[0]])
    with pytest.raises(ReleaseError, match="no release 'nine'; it has one, two"):
        Releases(root).promote("nine")
    with pytest.raises(ReleaseError, match="no release before None"):
        Releases(tmp_path / "none").rollback()


def test_what_to_serve_has_to_be_said_once(tmp_path, folder):
    with pytest.raises(ValueError, match="say what to serve"):
        main([])
    with pytest.raises(ReleaseError, match="no current release"):
        main(["--release", str(tmp_path)])
    with pytest.raises(ValueError, match="Base"):
        base = trained_bundle(folder, "base", "--mim", "off")
        Service(Deployment(bundle=base / "bundle", windows=str(tmp_path)), 0, Metrics())


def test_a_new_table_of_the_same_version_continues_the_log(folder, tmp_path):
    log = open_log(tmp_path / "log", "styles", start=0)
    log.append("w", torch.tensor([5]), torch.ones(1, 8))
    compact(folder / "table", log.root, tmp_path / "newer")
    log.forget(1)
    one = Scorer(Bundle.open(folder / "run" / "bundle"), tmp_path / "newer")
    assert one.mm.seq == 1 and one.mm.lookup(torch.tensor([5]))[1].item()


MEMORY = """
import sys, torch
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.scorer import Scorer, ScoreRequest
from mim_torchrec.benchmarks.measures.memory import private_bytes
bundle, table = sys.argv[1:]
scorer = Scorer(Bundle.open(bundle), table)
items = torch.randint(0, 10**6, (500,), generator=torch.Generator().manual_seed(0))
for k in range(20):
    ids = {"user_id": torch.tensor([k]), "query_id": torch.tensor([1]), "candidate_item_id": items + k,
           "behavior_item_id": items - k, "candidate_category": items % 5, "behavior_category": items % 5}
    scorer.score([ScoreRequest(ids=ids, request_ts=10**15, behavior_ts=torch.zeros(500, dtype=torch.int64))])
print(private_bytes())
"""


def test_the_memory_of_a_server_does_not_grow_with_the_tables(folder, tmp_path):
    """CMD: rows stay in the page cache, and there is no vocabulary."""
    found = []
    for rows in (1_000, 400_000):
        bundle = tmp_path / f"bundle-{rows}"
        shutil.copytree(folder / "run" / "bundle", bundle)
        made = Bundle.open(bundle)
        for name in ("item_id", "user_id"):
            shutil.rmtree(bundle / "tables" / name)
            writer = TableWriter(bundle / "tables" / name, table_version=made.version_of(name), dim=4,
                                 dtype="float32", encoder={})  # fmt: skip
            writer.write_shard(torch.arange(rows) * (10**6 // rows), torch.randn(rows, 4))
            writer.finish()
        writer = TableWriter(tmp_path / f"table-{rows}", table_version="styles", dim=8, dtype="float32",
                             encoder={})  # fmt: skip
        writer.write_shard(torch.arange(rows) * (10**6 // rows), torch.randn(rows, 8))
        writer.finish()
        command = [sys.executable, "-c", MEMORY, str(bundle), str(tmp_path / f"table-{rows}")]
        found.append(int(subprocess.check_output(command, cwd=ROOT, text=True).split()[-1]))
    assert abs(found[1] - found[0]) < 8e6, found  # the tables grew by 32 MB and their ids by 10 MB


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
INT64 = st.integers(-(2**63), 2**63 - 1)


@FUZZ
@given(data=st.data())
def test_any_well_formed_request_is_scored(client, data):
    moment = data.draw(INT64)
    counts = {"candidate": data.draw(st.integers(1, 20)), "behavior": data.draw(st.integers(0, 20))}
    drawn = {"user_id": [data.draw(INT64)], "query_id": [data.draw(INT64)], "request_ts": [moment]}
    for role, count in counts.items():
        drawn[f"{role}_item_id"] = data.draw(st.lists(INT64, min_size=count, max_size=count))
        categories = st.one_of(INT64, st.integers(0, 5))
        drawn[f"{role}_category"] = data.draw(st.lists(categories, min_size=count, max_size=count))
    drawn["behavior_ts"] = [data.draw(st.integers(-(2**63), moment)) for _ in range(counts["behavior"])]
    inputs = [{"name": name, "shape": [len(values)], "datatype": "INT64", "data": values}
              for name, values in drawn.items()]  # fmt: skip
    answer = client.post(INFER, json={"inputs": inputs, "outputs": [{"name": "score"}]})
    assert answer.status_code == 200, answer.text
    scores = output(answer.json())
    assert len(scores) == counts["candidate"] and all(0 <= score <= 1 for score in scores)


def test_no_request_that_the_schema_allows_breaks_the_server_or_makes_it_grow(folder):
    app, _ = application(deployment(folder), Limits(max_candidates=50, max_behaviors=50))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    answered: Counter[int] = Counter()
    sizes = []
    for _ in range(2):
        for operation in operations:

            @FUZZ
            @given(case=operation.as_strategy())
            def fuzz(case):
                answer = case.call()
                answered[answer.status_code] += 1
                assert answer.status_code < 500, (case.path, answer.text)

            fuzz()
        gc.collect()
        sizes.append(private_bytes())
    assert answered[200] and answered[400] and answered[404], answered
    assert sizes[1] - sizes[0] < 16e6, (sizes, answered)
