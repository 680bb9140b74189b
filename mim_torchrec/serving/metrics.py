"""Prometheus metrics of the server."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "mim", "registry": self.registry}
        self.requests = Counter("requests", "Requests for scores by status.", ["status"], **own)
        self.seconds = Histogram("request_seconds", "From request to answer.", buckets=SECONDS, **own)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = Histogram("batch_size", "Requests scored together.", buckets=sizes, **own)
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", **own)
        self.candidates = Counter("candidates", "Candidates scored.", **own)
        self.unknown = Counter("unknown_ids", "Ids that stores do not know, by kind.", ["kind"], **own)
        self.cache_hits = Counter("matrix_cache_hits", "Histories whose matrix was there.", **own)
        self.cache_misses = Counter("matrix_cache_misses", "Histories whose matrix was made.", **own)
        self.window = Gauge("window_seq", "The last window applied.", **own)
        self.swaps = Counter("model_swaps", "Models put into service, by outcome.", ["outcome"], **own)
