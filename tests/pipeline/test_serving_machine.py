"""A server on a machine whose clock jumps or whose disk is full."""

import logging
import threading
import time
from contextlib import suppress
from itertools import cycle

import prometheus_client.values as values
import pytest
from fastapi.testclient import TestClient

from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import ALLOCATED, Metrics
from tests.serving import INFER, application, deployment, messages, output


@pytest.fixture(scope="module")
def sent(serving_folder) -> dict:
    return messages(serving_folder)[0]


def test_a_clock_that_jumps_changes_no_answer_and_no_deadline(serving_folder, sent, monkeypatch):
    """Deadlines, pauses and time limits are measured by the monotonic clock."""
    right, days = time.time, cycle([0, 10**7, -(10**7)])
    app, service = application(deployment(serving_folder), Limits(deadline_ms=30_000))
    short, of_short = application(deployment(serving_folder), Limits(deadline_ms=100, store_timeout_ms=10))
    go = threading.Event()
    of_short.current.scorer.score = lambda requests: go.wait()
    with TestClient(app) as http, TestClient(short) as hanging:
        expected = output(http.post(INFER, json=sent).json())
        monkeypatch.setattr(time, "time", lambda: right() + next(days))
        try:
            for _ in range(4):
                assert output(http.post(INFER, json=sent).json()) == expected
                assert http.get("/v2/health/ready").status_code == 200
                assert hanging.post(INFER, json=sent).status_code == 504
        finally:
            go.set()


def test_a_log_that_cannot_be_written_keeps_no_request_from_its_answer(serving_folder, sent):
    app, service = application(deployment(serving_folder))

    def fail(requests):
        raise ZeroDivisionError

    file = open("/dev/full", "w", buffering=1)
    handler = logging.StreamHandler(file)
    logging.getLogger().addHandler(handler)
    try:
        with TestClient(app) as http:
            expected = output(http.post(INFER, json=sent).json())
            score, service.current.scorer.score = service.current.scorer.score, fail
            answer = http.post(INFER, json=sent)
            assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]
            service.current.scorer.score = score
            assert output(http.post(INFER, json=sent).json()) == expected
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # what was never written
            file.close()


def test_metrics_of_workers_have_their_place_on_the_disk_before_they_are_written(tmp_path, monkeypatch):
    """A mapped file with a hole that a full disk cannot fill would end the process by SIGBUS."""
    for name in ("ValueClass", "MmapedDict"):
        monkeypatch.setattr(values, name, getattr(values, name))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics = Metrics(tmp_path)
    files = sorted(tmp_path.glob("*.db"))
    assert len(files) >= 4

    def has_its_place() -> bool:
        return all(512 * file.stat().st_blocks >= file.stat().st_size >= ALLOCATED for file in files)

    assert has_its_place()
    for k in range(3000):
        metrics.unknown.labels(f"kind {k}").inc()
    assert max(file.stat().st_size for file in files) > ALLOCATED and has_its_place()
