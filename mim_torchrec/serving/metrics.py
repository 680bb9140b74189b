"""Prometheus metrics of the server."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mim_torchrec.serving.statistics import Statistics

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STORE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.statistics = Statistics()
        own: dict[str, Any] = {"namespace": "mim", "registry": self.registry}
        self.requests = Counter("requests", "Answers by route, status and cause.",
                                ["route", "status", "cause"], **own)  # fmt: skip
        self.seconds = Histogram("request_seconds", "From the arrival of a request for scores to its answer.",
                                 ["status"], buckets=SECONDS, **own)  # fmt: skip
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = Histogram("batch_size", "Requests scored together.", buckets=sizes, **own)
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", **own)
        self.candidates = Counter("candidates", "Candidates scored.", **own)
        self.unknown = Counter("unknown_ids", "Ids that stores do not know, by kind.", ["kind"], **own)
        self.cache_hits = Counter("matrix_cache_hits", "Histories whose matrix was there.", **own)
        self.cache_misses = Counter("matrix_cache_misses", "Histories whose matrix was made.", **own)
        self.store_seconds = Histogram("store_seconds", "Time of a lookup in a store.", ["store"],
                                       buckets=STORE_SECONDS, **own)  # fmt: skip
        self.store_errors = Counter("store_errors", "Failures of stores by cause.", ["store", "cause"], **own)
        self.store_up = Gauge(
            "store_up", "Whether a store answered when it was asked last.", ["store"], **own
        )
        self.window = Gauge("window_seq", "The last window applied.", **own)
        self.window_lag = Gauge("window_lag", "Windows that the log has and the vectors have not.", **own)
        self.windows_current = Gauge(
            "windows_current_timestamp_seconds", "When the vectors last had all windows of the log.", **own
        )
        self.windows_followed = Gauge(
            "windows_followed", "Whether windows are followed without an error.", **own
        )
        self.swaps = Counter("model_swaps", "Models put into service, by outcome.", ["outcome"], **own)
        self.served = Gauge(
            "served", "1 for what is served.", ["model_version", "table_version", "release"], **own
        )
        self.wanted = Gauge("release_wanted", "1 for the release that is to be served.", ["release"], **own)
        self.tokens_read = Gauge("tokens_timestamp_seconds", "When the tokens were read last.", **own)
