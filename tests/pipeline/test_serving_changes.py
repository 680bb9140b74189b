"""A server while what it serves changes: swaps, windows, a store that fails, releases."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.table.format import Table, TableWriter, VersionMismatch
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.main import main
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.releases import ReleaseError, Releases
from mim_torchrec.serving.releases import main as release
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.service import Deployment, Service
from tests.pipeline.test_ctr_main import NUM_ITEMS, item_id
from tests.pipeline.test_evaluate_main import write_table
from tests.serving import (
    INFER,
    application,
    changed,
    deployment,
    get,
    messages,
    output,
    post,
    start,
    trained_bundle,
)

pytestmark = pytest.mark.usefixtures("forked_stages")


@pytest.fixture(scope="module")
def folder(serving_folder) -> Path:
    return serving_folder


@pytest.fixture(scope="module")
def sent(folder) -> list[dict]:
    return messages(folder)


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


def test_windows_are_followed_while_serving(folder, sent, tmp_path, monkeypatch):
    monkeypatch.setattr("mim_torchrec.serving.service.PAUSES", (0.01, 0.05))
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
        assert "windows are not followed" in http.get("/v2/health/ready").json()["error"]
        assert "mim_windows_followed 0.0" in http.get("/metrics").text
        assert http.post(INFER, json=message).status_code == 200
        path.unlink()  # and it is written again
        log.append("w3", torch.tensor([6]), torch.ones(1, 8))
        while http.get("/v2/health/ready").status_code != 200:
            pass
        assert http.get("/v2/models/mim").json()["parameters"]["window_seq"] == 3
        assert "mim_windows_followed 1.0" in http.get("/metrics").text
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
            while http.get("/v2/health/ready").status_code != 200:
                pass
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
        first = get(f"{address}/v2/models/mim").json()["versions"]
        release(["promote", "--root", root, "--name", "two", "--allow-missing", "2"])
        os.kill(server.pid, signal.SIGHUP)
        while (second := get(f"{address}/v2/models/mim").json())["versions"] == first:
            pass
        assert second["versions"] == [Bundle.open(bundles[1]).model_version]
        assert second["parameters"]["window_seq"] == 1
        release(["rollback", "--root", root])
        os.kill(server.pid, signal.SIGHUP)
        while get(f"{address}/v2/models/mim").json()["versions"] != first:
            pass
        assert post(address + INFER, json=sent[0]).status_code == 200
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
