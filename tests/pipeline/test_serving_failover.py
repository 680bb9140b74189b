"""A server whose Redis fails over or loses rows: scores are right or are refused, never older."""

import pytest
import torch
from fastapi.testclient import TestClient

from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import catch_up
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.windows.redis_address import locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.guarded import StoreFailed
from tests.serving import INFER, application, deployment, messages, output

HOPELESS = 10_000  # answers


@pytest.fixture(scope="module")
def sent(serving_folder) -> dict:
    """A request with several behaviors."""
    return next(m for m in messages(serving_folder) if len(m["inputs"][3]["data"]) > 1)


@pytest.fixture
def log(serving_folder, sent, tmp_path):
    """Two windows, each of which gives all items of the request other vectors."""
    table = Table.open(serving_folder / "table")
    made = open_log(tmp_path / "log", table.manifest.table_version, start=0)
    named = {given["name"]: given["data"] for given in sent["inputs"]}
    ids = torch.tensor(sorted({*named["candidate_item_id"], *named["behavior_item_id"]}))
    for seq in (1, 2):
        generator = torch.Generator().manual_seed(seq)
        vectors = torch.randn(len(ids), table.manifest.dim, generator=generator)
        made.append(f"w{seq}", ids, vectors, dtype="float32")
    return made


@pytest.fixture
def expected(serving_folder, sent, log, tmp_path) -> list[list[float]]:
    """Scores with no window, with the first, and with both."""
    found = []
    windows = open_log(tmp_path / "some", log.table_version, start=0)
    for seq in range(3):
        if seq:
            window = log.read(seq)
            windows.append(f"w{seq}", window.ids, window.vectors, dtype="float32")
        app, _ = application(deployment(serving_folder, windows=str(windows.root)))
        with TestClient(app) as http:
            found.append(output(http.post(INFER, json=sent).json()))
    assert found[0] != found[1] != found[2] != found[0]
    return found


def load(folder, url: str) -> RedisStore:
    """All tables of the first model; the store of the vectors."""
    bundle = Bundle.open(folder / "run" / "bundle")
    for name in bundle.tables:
        RedisStore.load(url, bundle.table(name))
    return RedisStore.load(url, Table.open(folder / "table"))


def refusal(http: TestClient, sent: dict) -> str:
    """Why a request is not scored, which readiness says as well."""
    ready, answer = http.get("/v2/health/ready"), http.post(INFER, json=sent)
    assert answer.status_code == ready.status_code == 503, answer.text
    assert answer.json()["error"] == ready.json()["error"]
    return answer.json()["error"]


def test_scores_are_those_of_windows_that_others_have_applied(serving_folder, sent, log, expected, redis_url):
    others = load(serving_folder, redis_url)
    app, _ = application(deployment(serving_folder, store=redis_url, id_store=redis_url))
    with TestClient(app) as http:
        for seq in range(3):
            if seq:
                others.apply(log.read(seq))
            for _ in range(2):  # the second one by the matrix of the history that was kept
                assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[seq], abs=1e-6)
        assert "mim_matrix_cache_hits_total 3.0" in http.get("/metrics").text


def test_after_a_failover_to_an_older_copy_nothing_is_scored_until_it_has_all_windows(
    serving_folder, sent, log, expected, tmp_path
):
    primary, replica = RedisServer(tmp_path / "primary"), RedisServer(tmp_path / "replica")
    try:
        others = load(serving_folder, primary.url)
        others.apply(log.read(1))
        replica.copy(primary)
        replica.cut_off()
        app, service = application(deployment(serving_folder, store=primary.url, id_store=primary.url))
        with TestClient(app) as http:
            assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[1], abs=1e-6)
            others.apply(log.read(2))
            assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)
            replica.take_the_place_of(primary)
            assert "has lost windows: shard 0 is at 1 and was at 2" in refusal(http, sent)
            with pytest.raises(StoreFailed, match="has lost windows"):  # what was seen outlives a deployment
                service.swap(service.current.deployment)
            assert catch_up(others, log) == 1
            assert http.get("/v2/health/ready").status_code == 200
            assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)
    finally:
        primary.kill()
        replica.kill()


def test_a_server_that_follows_the_windows_itself_brings_an_older_copy_up_to_date(
    serving_folder, sent, log, expected, tmp_path
):
    primary, replica = RedisServer(tmp_path / "primary"), RedisServer(tmp_path / "replica")
    try:
        load(serving_folder, primary.url)
        replica.copy(primary)
        replica.cut_off()
        words = {"store": primary.url, "id_store": primary.url, "windows": str(log.root)}
        app, service = application(deployment(serving_folder, **words))
        with TestClient(app) as http:
            assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)
            replica.take_the_place_of(primary)
            for _ in range(HOPELESS):
                answer = http.post(INFER, json=sent)
                if answer.status_code == 200:
                    break
                assert answer.status_code == 503
            assert output(answer.json()) == pytest.approx(expected[2], abs=1e-6)
            assert service.current.window_seq == 2
    finally:
        primary.kill()
        replica.kill()


def test_a_cluster_that_has_lost_a_shard_gives_no_scores_until_it_is_loaded_again(
    serving_folder, sent, log, expected, cluster_url
):
    store = load(serving_folder, cluster_url)
    catch_up(store, log)
    app, _ = application(deployment(serving_folder, store=cluster_url, id_store=cluster_url))
    with TestClient(app) as http:
        assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)
        client = connect(locate(cluster_url))
        for key in list(client.scan_iter(match=store._base.mark(7) + b"*")):
            client.delete(key)
        assert "has lost shards [7]" in refusal(http, sent)
        load(serving_folder, cluster_url)
        assert "shard 7 is at 0 and was at 2" in refusal(http, sent)
        catch_up(store, log)
        assert http.get("/v2/health/ready").status_code == 200
        assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)
