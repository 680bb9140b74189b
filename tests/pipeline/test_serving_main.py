"""The server through its `main` and its application: scores, limits, memory, requests of any kind."""

import asyncio
import gc
import shutil
import signal
import socket
import subprocess
import sys
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

from mim_torchrec.benchmarks.measures.memory import private_bytes
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.main import main
from mim_torchrec.serving.tokens import TokenFile
from tests.serving import INFER, PATIENCE, application, changed, deployment, messages, output, start, without

ROOT = Path(__file__).parents[2]
NOT_NEEDED = {
    "PIL",
    "contourpy",
    "fbgemm_gpu",
    "grpc",
    "ibis",
    "matplotlib",
    "pandas.core",
    "scipy",
    "sklearn",
    "sympy",
    "tensordict",
    "timm",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torchrec",
    "torchvision",
    "torchx",
    "transformers",
    "triton",
}
"""What training, drawing and the page import and, without its port, gRPC."""


@pytest.fixture(scope="module")
def folder(serving_folder) -> Path:
    return serving_folder


@pytest.fixture(scope="module")
def sent(folder) -> list[dict]:
    return messages(folder)


@pytest.fixture(scope="module")
def client(folder):
    app, _ = application(deployment(folder))
    with TestClient(app) as one:
        yield one


def test_scores_over_http_are_the_trainers_for_many_clients_at_once(folder, sent, tmp_path):
    expected = pq.read_table(folder / "run" / "evaluation" / "predictions.parquet")["score"].to_numpy()
    words = ["--bundle", str(folder / "run" / "bundle"), "--store", str(folder / "table")]
    with open(tmp_path / "stderr", "w") as errors:
        server, address = start(*words, errors=errors, PYTHONPROFILEIMPORTTIME="1")
    try:

        async def ask() -> list[float]:
            async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as http:
                answers = await asyncio.gather(*(http.post(INFER, json=message) for message in sent))
            assert {a.status_code for a in answers} == {200}
            return [score for a in answers for score in output(a.json())]

        np.testing.assert_allclose(asyncio.run(ask()), expected, rtol=0, atol=1e-5)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    lines = (tmp_path / "stderr").read_text().splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert imported & NOT_NEEDED == set() and {"torch", "mim_torchrec.serving.scorer"} <= imported


def test_who_reads_the_address_can_connect_and_end_the_server_at_once(folder, forked):
    words = ["--bundle", str(folder / "run" / "bundle"), "--store", str(folder / "table")]
    for _ in range(3):
        server, address = start(*words, python=forked["MIM_PYTHON"])
        with socket.create_connection(address.removeprefix("http://").split(":")):
            server.send_signal(signal.SIGTERM)
        assert server.wait() == 0


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
    kinds = ("user", "item", "vector", "query", "category")
    assert body["parameters"] == {f"unknown_{kind}": 0 for kind in kinds}
    again = client.post(f"/v2/models/mim/versions/{version}/infer", json=sent[0])
    assert output(again.json()) == output(body)


def test_bad_requests_are_told_what_is_wrong(client, sent):
    one = next(m for m in sent if len(m["inputs"][3]["data"]) > 1)
    n = len(one["inputs"][4]["data"])
    cases = [
        ({"inputs": []}, "inputs"),
        (without(one, "user_id"), "user_id is missing"),
        (without(one, "query_id"), "query_id is missing"),
        (without(one, "candidate_category"), "candidate_category is missing"),
        ({"inputs": [*one["inputs"], one["inputs"][0]]}, "user_id is there twice"),
        (changed(one, "query_id", name="color"), "no input 'color'"),
        (changed(one, "user_id", data=[2**63]), "integers of INT64"),
        (changed(one, "user_id", data=[2**40], datatype="INT32"), "integers of INT32"),
        (changed(one, "user_id", data=["x"]), "integers of INT64"),
        (changed(one, "user_id", data=["7"], datatype="BYTES"), "training data are integers"),
        (changed(one, "user_id", data=[True]), "integers of INT64"),
        (changed(one, "user_id", data=[1, 2]), "shape"),
        (changed(one, "user_id", data=None), "neither data nor binary_data_size"),
        (changed(one, "candidate_item_id", data=[[1], [2, 3]]), "which its nested values do not have"),
        (changed(one, "user_id", data=[1, 2], shape=[2]), "candidate.lengths is missing"),
        (changed(one, "query_id", data=[1, 2], shape=[2]), "has 2 values, expected 1"),
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
    answer = client.post(INFER, json=one | {"model_name": "other"})
    assert answer.status_code == 400 and "the address is of 'mim'" in answer.json()["error"]
    assert client.get("/nowhere").json() == {"error": "Not Found"}


def test_unknown_ids_of_every_kind_are_scored_and_counted(client, sent):
    message = changed(changed(sent[0], "user_id", data=[-1]), "candidate_item_id", data=[-1, -2, 1000, 1007])
    message = changed(changed(message, "query_id", data=[-5]), "candidate_category", data=[*"?!??"])
    body = client.post(INFER, json=message).json()
    unknown = {"user": 1, "item": 2, "vector": 2, "query": 1, "category": 4}
    assert body["parameters"] == {f"unknown_{kind}": count for kind, count in unknown.items()}
    assert len(output(body)) == 4
    said = client.get("/metrics").text
    assert 'mim_unknown_ids_total{kind="category"} 4.0' in said and 'kind="query"} 1.0' in said
    assert 'mim_unknown_ids_total{kind="item"} 2.0' in said and 'status="200"' in said


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
    (tmp_path / "tokens").write_text("one\ntwo\n")
    app, _ = application(deployment(folder), tokens=TokenFile(tmp_path / "tokens"))
    with TestClient(app) as http:
        assert http.get("/v2/health/ready").status_code == 200
        for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "two"}):
            answer = http.post(INFER, json=sent[0], headers=header)
            assert answer.status_code == 401 and "token" in answer.json()["error"]
        for word in ("Bearer", "bearer", "BEARER"):
            answer = http.post(INFER, json=sent[0], headers={"Authorization": f"{word} two"})
            assert answer.status_code == 200


MEMORY = """
import sys, torch
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.messages import ScoreRequest
from mim_torchrec.serving.scorer import Scorer
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


FUZZ = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


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
                if sum(answered.values()) % 4 and "model" in (case.path_parameters or {}):
                    case.path_parameters["model"] = "mim"
                answer = case.call()
                answered[answer.status_code] += 1
                assert answer.status_code < 500, (case.path, answer.text)

            fuzz()
        gc.collect()
        sizes.append(private_bytes())
    assert answered[200] and answered[400] and answered[404], answered
    assert sizes[1] - sizes[0] < 16e6, (sizes, answered)
