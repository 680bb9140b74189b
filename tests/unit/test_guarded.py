"""Stores that a server asks: refused at once while they fail, asked again one at a time, and measured."""

import pytest
import torch

from mim_torchrec.embeddings.table.manifest import TableLost
from mim_torchrec.embeddings.windows.redis_address import RedisUnavailable
from mim_torchrec.serving.guarded import FAILURES, GuardedStore, StoreFailed
from mim_torchrec.serving.metrics import Metrics
from tests.said import said

IDS = torch.tensor([1])


class Store:
    """A store that can fail."""

    table_version, dim = "v1", 1

    def __init__(self) -> None:
        self.asked, self.error = 0, None

    @property
    def seq(self):
        if self.error is not None:
            raise self.error
        return 7

    def lookup(self, ids):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return torch.zeros(len(ids), 1), torch.ones(len(ids), dtype=torch.bool)

    def apply(self, window):
        raise RedisUnavailable("away")


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("error", "cause"),
    [(RedisUnavailable("gone"), "unavailable"), (TableLost("gone"), "lost"), (TypeError("gone"), "other")],
)
def test_a_store_that_fails_is_left_alone_and_tried_again(monkeypatch, caplog, error, cause):
    metrics, store = Metrics(), Store()
    guarded = GuardedStore("items", store, metrics)
    assert guarded.seq == 7 and guarded.lookup(IDS)[1].all()
    guarded.check()  # no lookup, and often a slower question
    assert value(metrics, "mim_store_seconds_count", store="items") == 1
    monkeypatch.setattr("mim_torchrec.serving.guarded.PAUSE", 3600.0)
    store.asked, store.error = 0, error
    for _ in range(10):
        with pytest.raises(StoreFailed, match="the store of items fails: gone"):
            guarded.lookup(IDS)
    assert store.asked == FAILURES
    assert value(metrics, "mim_store_errors_total", store="items", cause=cause) == FAILURES
    assert metrics.registry.get_sample_value("mim_store_up", {"store": "items"}) == 0
    store.error = None
    with pytest.raises(StoreFailed):
        guarded.lookup(IDS)  # it is not asked yet
    assert guarded.seq == 7
    with pytest.raises(StoreFailed):
        guarded.lookup(IDS)  # its seq says nothing about its rows
    guarded.check()  # readiness always asks
    assert guarded.lookup(IDS)[1].all() and value(metrics, "mim_store_up", store="items") == 1
    assert said(caplog, "serving.guarded") == [
        "the store of items fails: gone",
        "the store of items answers again",
    ]


def test_after_a_pause_one_request_tries_for_all(monkeypatch):
    monkeypatch.setattr("mim_torchrec.serving.guarded.PAUSE", 0.0)
    store = Store()
    guarded, store.error = GuardedStore("items", store, Metrics()), OSError("gone")
    for _ in range(FAILURES):
        with pytest.raises(StoreFailed):
            guarded.lookup(IDS)
    monkeypatch.setattr("mim_torchrec.serving.guarded.PAUSE", 3600.0)  # from this try to the next
    for _ in range(3):
        with pytest.raises(StoreFailed):
            guarded.lookup(IDS)
    assert store.asked == FAILURES + 1


def test_windows_come_with_the_errors_of_the_store():
    with pytest.raises(RedisUnavailable, match="away"):
        GuardedStore("items", Store(), Metrics()).apply(None)
