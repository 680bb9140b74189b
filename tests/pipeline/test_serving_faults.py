"""A server whose stores, releases and clients fail: deadlines are kept, reasons are told, and it recovers."""

import os
import shutil
import signal
import socket
import threading

import pytest
import torch
from fastapi.testclient import TestClient

from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import follow
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.release_follower import ReleaseFollower, deployment_of
from mim_torchrec.serving.releases import Release, ReleaseError, Releases
from mim_torchrec.serving.service import Deployment
from mim_torchrec.serving.tokens import TokenFile
from tests.said import said
from tests.serving import INFER, application, changed, deployment, messages, output, post, running, start

pytestmark = pytest.mark.usefixtures("forked_stages")


@pytest.fixture(scope="module")
def sent(serving_folder) -> list[dict]:
    return messages(serving_folder)


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


def load(folder, redis: RedisServer) -> Deployment:
    """All tables of the first model in Redis; what is served then."""
    bundle = Bundle.open(folder / "run" / "bundle")
    RedisStore.load(redis.url, Table.open(folder / "table"))
    for name in bundle.tables:
        RedisStore.load(redis.url, bundle.table(name))
    return deployment(folder, store=redis.url, id_store=redis.url)


def until_ready(http: TestClient) -> None:
    while http.get("/v2/health/ready").status_code != 200:
        pass


def count(http: TestClient, **labels: str) -> float:
    """Answers of these labels."""
    words = [f'{name}="{value}"' for name, value in labels.items()]
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("mim_requests_total")]
    return sum(float(line.split()[-1]) for line in lines if all(word in line for word in words))


def test_a_store_that_hangs_makes_nobody_wait(serving_folder, sent, redis, caplog):
    app, _ = application(load(serving_folder, redis), Limits(deadline_ms=60_000, store_timeout_ms=300))
    with TestClient(app) as http:
        expected = output(http.post(INFER, json=sent[0]).json())
        os.kill(redis._process.pid, signal.SIGSTOP)
        try:  # all of these are answered while it is stopped
            answers = [http.post(INFER, json=sent[0]) for _ in range(5)]
            assert {answer.status_code for answer in answers} == {503}
            assert "fails: redis://127.0.0.1" in answers[0].json()["error"]
            assert http.get("/v2/health/ready").status_code == 503
            assert http.get("/v2/health/live").status_code == 200
            assert count(http, status="503", cause="store") == 5
        finally:
            os.kill(redis._process.pid, signal.SIGCONT)
        until_ready(http)
        assert output(http.post(INFER, json=sent[0]).json()) == expected
    lines = said(caplog, "serving.guarded")
    names = {line.split(" fails")[0] for line in lines if " fails" in line}
    assert names and len(lines) == 2 * len(names)  # two lines for each store: it fails, it answers again


def test_data_lost_in_redis_is_503_with_the_reason_until_it_is_loaded_again(serving_folder, sent, redis):
    app, _ = application(load(serving_folder, redis))
    with TestClient(app) as http:
        expected = output(http.post(INFER, json=sent[0]).json())
        lost = RedisStore.open(
            redis.url, Bundle.open(serving_folder / "run" / "bundle").version_of("user_id")
        )
        for wipe in (lambda: redis.client().delete(lost._about), redis.client().flushall):
            wipe()
            for answer in (http.post(INFER, json=sent[0]), http.get("/v2/health/ready")):
                assert answer.status_code == 503
                assert "has no table of table_version" in answer.json()["error"]
            (listed,) = http.post("/v2/repository/index").json()
            assert listed["state"] == "UNAVAILABLE" and "has no table" in listed["reason"]
            load(serving_folder, redis)
            until_ready(http)
            assert output(http.post(INFER, json=sent[0]).json()) == expected


def test_a_follower_waits_for_a_table_that_was_lost(serving_folder, redis, tmp_path):
    load(serving_folder, redis)
    store, log = RedisStore.open(redis.url, "styles"), open_log(tmp_path / "log", "styles", start=0)
    stop = threading.Event()
    follower = threading.Thread(target=follow, args=(store, log, stop))
    follower.start()
    try:
        log.append("w1", torch.tensor([5]), torch.ones(1, 8))
        while store.seq < 1:
            pass
        redis.client().flushall()
        log.append("w2", torch.tensor([6]), torch.ones(1, 8))
        load(serving_folder, redis)
        while store.seq < 2:
            assert follower.is_alive()
        assert store.lookup(torch.tensor([5, 6]))[1].all()
    finally:
        stop.set()
        follower.join()


def test_a_deadline_counts_from_the_arrival_whatever_the_model_does(serving_folder, sent):
    app, service = application(deployment(serving_folder), Limits(deadline_ms=300, store_timeout_ms=10))
    go, score = threading.Event(), service.current.scorer.score

    def hang(requests):
        go.wait()
        return score(requests)

    service.current.scorer.score = hang
    with TestClient(app) as http:
        try:  # answered while the model hangs, those that wait for it as well
            for body in (sent[0], sent[0] | {"parameters": {"timeout_ms": 1}}):
                answer = http.post(INFER, json=body)
                assert answer.status_code == 504 and "before its deadline" in answer.json()["error"]
            assert count(http, status="504", cause="deadline", route="/v2/models/{model}/infer") == 2
        finally:
            go.set()


def test_health_answers_while_a_large_body_is_read(serving_folder, sent, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(*_):
        begun.set()
        go.wait()
        raise ValueError("damaged in a way that nobody expected")

    monkeypatch.setattr("mim_torchrec.serving.app._read", slow)
    app, _ = application(deployment(serving_folder))
    with TestClient(app) as http:
        found = []
        large = changed(sent[0], "user_id", name="x" * 40_000)
        asker = threading.Thread(target=lambda: found.append(http.post(INFER, json=large)))
        asker.start()
        begun.wait()
        assert http.get("/v2/health/live").status_code == 200  # the thread still reads
        go.set()
        asker.join()
        assert found[0].status_code == 500 and "ValueError" in found[0].json()["error"]
        assert count(http, status="500", cause="ValueError") == 1


def test_half_a_request_is_not_waited_for(serving_folder, monkeypatch):
    app, _ = application(deployment(serving_folder), Limits(deadline_ms=100, store_timeout_ms=10))
    head = f"POST {INFER} HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n"
    with running(app) as address:
        host, port = address.removeprefix("http://").split(":")
        halves = ((b"", 0.05, b""), (head.encode(), 0.05, b""), (f"{head}\r\n{{".encode(), 60.0, b"408"))
        for half, patience, expected in halves:
            monkeypatch.setattr("mim_torchrec.serving.patience.HEADERS", patience)
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(half)
                answer = b""
                while not (expected and expected in answer) and (part := connection.recv(4096)):
                    answer += part  # without an answer until the server closes the connection
                assert expected in answer, answer


def test_a_body_that_comes_after_its_answer_leaves_the_connection_usable(serving_folder):
    """A slow client reads the 408, and its next request is answered on the same connection."""
    app, _ = application(deployment(serving_folder), Limits(deadline_ms=100, store_timeout_ms=10))
    with running(app) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf".encode())
            assert b"408" in connection.recv(4096)
            connection.sendall(b" more")
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n")
            answer = b""
            while b"live" not in answer:
                part = connection.recv(4096)
                assert part, answer
                answer += part


def test_every_answer_is_counted_with_its_cause(serving_folder, sent, tmp_path):
    (tmp_path / "tokens").write_text("one\n")
    limits = Limits(max_body_bytes=10_000, deadline_ms=60_000)
    app, _ = application(deployment(serving_folder), limits, tokens=TokenFile(tmp_path / "tokens"))
    with TestClient(app, headers={"Authorization": "Bearer one"}) as http:
        cases = {
            ("200", "ok"): lambda: http.post(INFER, json=sent[0]),
            ("400", "bad_request"): lambda: http.post(INFER, content=b"{"),
            ("401", "token"): lambda: http.post(INFER, json=sent[0], headers={"Authorization": "Bearer two"}),
            ("404", "not_found"): lambda: http.post("/v2/models/other/infer", json=sent[0]),
            ("405", "method"): lambda: http.get(INFER),
            ("409", "table_version"): lambda: http.post(
                INFER, json=sent[0] | {"parameters": {"table_version": "v9"}}
            ),
            ("413", "too_large"): lambda: http.post(INFER, content=b" " * 10_001),
            ("415", "encoding"): lambda: http.post(INFER, content=b"", headers={"Content-Encoding": "br"}),
        }
        for (status, cause), ask in cases.items():
            before = count(http, status=status, cause=cause)
            assert ask().status_code == int(status)
            # the request for the metrics before is counted, too
            assert count(http, status=status, cause=cause) == before + (2 if status == "200" else 1), status
        shown = http.get("/metrics").text
        assert (
            'mim_store_seconds_count{store="user_id"}' in shown
            and 'mim_store_up{store="vectors"} 1.0' in shown
        )
        assert f'model_version="{Bundle.open(serving_folder / "run" / "bundle").model_version}"' in shown


@pytest.fixture
def releases(serving_folder, tmp_path) -> Releases:
    """Two releases, of which the first is current; the bundle of the second is not there yet."""
    found = Releases(tmp_path / "releases")
    shutil.copytree(serving_folder / "second" / "bundle", tmp_path / "bundle")
    for name, bundle in {"one": serving_folder / "run" / "bundle", "two": tmp_path / "bundle"}.items():
        found.stage(name, Release(bundle=str(bundle), table=str(serving_folder / "table")))
    found.promote("one")
    return found


def test_a_release_that_failed_is_tried_again_and_readiness_says_what_is_wanted(
    serving_folder, releases, tmp_path, monkeypatch
):
    monkeypatch.setattr("mim_torchrec.serving.release_follower.PAUSES", (0.0, 0.0))
    app, service = application(deployment_of(releases, "one"))
    metrics = Metrics()
    follower = ReleaseFollower(releases, "one", service, metrics)
    with TestClient(app) as http:

        def about() -> dict:
            follower.look()
            return http.get("/v2/health/ready").json()["release"]

        assert about() == {"wanted": "one", "served": "one"}
        current = releases.root / "current.json"
        good = current.read_text()
        for damaged in ("", "{", "[]", '{"name": 7}', '{"name": "../one", "before": null}', "[" * 100_000):
            current.write_text(damaged)
            found = about()
            assert found["served"] == "one" and "one still is" in found["problem"], damaged
        current.write_text(good)
        assert about() == {"wanted": "one", "served": "one"}

        releases.promote("two")
        os.rename(tmp_path / "bundle", tmp_path / "away")
        for _ in range(2):
            found = about()
            assert (found["wanted"], found["served"]) == ("two", "one") and "is no bundle" in found["problem"]
        os.rename(tmp_path / "away", tmp_path / "bundle")
        assert about() == {"wanted": "two", "served": "two"}
        second = Bundle.open(serving_folder / "second" / "bundle").model_version
        assert http.get("/v2/models/mim").json()["versions"] == [second]
        assert f'model_version="{second}",release="two"' in http.get("/metrics").text


def test_a_release_that_failed_is_not_tried_all_the_time_but_at_once_when_asked(
    releases, tmp_path, monkeypatch
):
    monkeypatch.setattr("mim_torchrec.serving.release_follower.PAUSES", (3600.0, 3600.0))
    _, service = application(deployment_of(releases, "one"))
    follower, tried = ReleaseFollower(releases, "one", service, Metrics()), []

    def fail(deployment: Deployment) -> None:
        tried.append(deployment.release)
        raise ReleaseError("it cannot be opened")

    monkeypatch.setattr(service, "swap", fail)
    releases.promote("two")
    for _ in range(3):
        follower.look()
    assert tried == ["two"]
    follower.wake()
    follower.look()
    assert tried == ["two", "two"]
    service.close()


@pytest.mark.parametrize("damaged", ["", "[]", '{"bundle": 7}', '{"bundel": "x"}', '{"table": "x"}'])
def test_a_damaged_release_is_named(releases, damaged):
    (releases.root / "two.json").write_text(damaged)
    with pytest.raises(ReleaseError, match=r"two\.json is damaged"):
        releases.read("two")


HANGING = """
from threading import Event
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore

class Store(EmbeddedStore):
    asked = 0

    @classmethod
    def open(cls, where, table_version):
        return super().open(where.partition("://")[2], table_version)

    def lookup(self, ids):
        self.asked += 1
        if self.asked > 1:  # the first is of the server itself
            Event().wait()
        return super().lookup(ids)
"""


def test_a_store_that_never_answers_does_not_keep_the_server_from_ending(
    serving_folder, sent, tmp_path, monkeypatch
):
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    words = ["--bundle", str(serving_folder / "run" / "bundle"), "--limits.deadline-ms", "300"]
    server, address = start(*words, "--store", f"hanging:Store://{serving_folder / 'table'}")
    try:
        assert post(address + INFER, json=sent[0]).status_code == 504
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.kill()
        server.wait()
