"""Prometheus metrics of the server, of one process or of several, and its traces."""

import os
from pathlib import Path
from typing import Any

import prometheus_client.values as values
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from mim_torchrec.serving.spans import Spans
from mim_torchrec.serving.statistics import Statistics

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STORE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


ALLOCATED = 1 << 18
"""Bytes that a file of a worker's metrics has from the beginning."""


class _Allocated(MmapedDict):
    """A file of metrics whose bytes are there before anything is written to them.

    A hole of a mapped file that cannot be filled, because the disk is full, ends the process (SIGBUS).
    """

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if not read_mode:
            _allocate(filename, ALLOCATED)
        super().__init__(filename, read_mode)

    def _init_value(self, key: str) -> None:
        if self._used + len(key.encode()) + 64 > self._capacity:
            _allocate(self._fname, 2 * self._capacity)
        super()._init_value(key)


def _allocate(filename: str, size: int) -> None:
    with open(filename, "ab") as file:
        os.posix_fallocate(file.fileno(), 0, size)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        shared: folder in which the workers of a server keep theirs, so that each can tell those of all; None
            where the server is one process.
        spans: traces; by default those of the process.
    """

    def __init__(self, shared: Path | None = None, spans: Spans | None = None) -> None:
        self._shared, self.spans = shared, spans or Spans()
        if shared is not None:
            # prometheus_client asks for the variable when it is imported, which is before workers begin
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
            values.MmapedDict = _Allocated  # type: ignore[misc]  # it makes its files by this name
            values.ValueClass = values.MultiProcessValue()
        self.registry = CollectorRegistry()
        self.statistics = Statistics(self.registry, self.exposed)
        self._shown: dict[int, tuple[str, ...]] = {}
        own: dict[str, Any] = {"namespace": "mim", "registry": self.registry}
        self.requests = Counter("requests", "Answers by route, status and cause.",
                                ["route", "status", "cause"], **own)  # fmt: skip
        self.seconds = Histogram("request_seconds", "From the arrival of a request for scores to its answer.",
                                 ["status"], buckets=SECONDS, **own)  # fmt: skip
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = Histogram("batch_size", "Requests scored together.", buckets=sizes, **own)
        self.users = Histogram("request_users", "Users of a request that was scored.", buckets=sizes, **own)
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", multiprocess_mode="livesum", **own)
        self.candidates = Counter("candidates", "Candidates scored.", **own)
        self.unknown = Counter("unknown_ids", "Ids that stores do not know, by kind.", ["kind"], **own)
        self.cache_hits = Counter("matrix_cache_hits", "Histories whose matrix was there.", **own)
        self.cache_misses = Counter("matrix_cache_misses", "Histories whose matrix was made.", **own)
        self.store_seconds = Histogram("store_seconds", "Time of a lookup in a store.", ["store"],
                                       buckets=STORE_SECONDS, **own)  # fmt: skip
        self.store_errors = Counter("store_errors", "Failures of stores by cause.", ["store", "cause"], **own)
        self.store_up = Gauge(
            "store_up",
            "Whether a store answered when it was asked last.",
            ["store"],
            multiprocess_mode="livemin",
            **own,
        )
        self.window = Gauge("window_seq", "The last window applied.", multiprocess_mode="livemin", **own)
        self.window_lag = Gauge(
            "window_lag",
            "Windows that the log has and the vectors have not.",
            multiprocess_mode="livemax",
            **own,
        )
        self.windows_current = Gauge(
            "windows_current_timestamp_seconds",
            "When the vectors last had all windows of the log.",
            multiprocess_mode="livemin",
            **own,
        )
        self.windows_followed = Gauge(
            "windows_followed",
            "Whether windows are followed without an error.",
            multiprocess_mode="livemin",
            **own,
        )
        self.swaps = Counter("model_swaps", "Models put into service, by outcome.", ["outcome"], **own)
        self.served = Gauge(
            "served",
            "1 for what is served, 0 for what was.",
            ["model_version", "table_version", "release"],
            multiprocess_mode="livemax",
            **own,
        )
        self.wanted = Gauge(
            "release_wanted",
            "1 for the release that is to be served, 0 for others.",
            ["release"],
            multiprocess_mode="livemax",
            **own,
        )
        self.tokens_read = Gauge(
            "tokens_timestamp_seconds", "When the tokens were read last.", multiprocess_mode="livemin", **own
        )

    def exposed(self) -> CollectorRegistry:
        """What Prometheus is to read: of all workers."""
        if self._shared is None:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._shared))
        return registry

    def show(self, gauge: Gauge, *labels: str) -> None:
        """Set a gauge to 1 for these labels, and to 0 for those that were shown before.

        Series are not removed: the files that workers share cannot forget them.
        """
        before = self._shown.get(id(gauge))
        if before is not None:
            gauge.labels(*before).set(0)
        gauge.labels(*labels).set(1)
        self._shown[id(gauge)] = labels
