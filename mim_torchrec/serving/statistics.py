"""Statistics of inference by version of the model, as Triton's extension of the protocol counts them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
KINDS = ("success", "fail", *PARTS, "cache_hit", "cache_miss")
INFERENCES, EXECUTIONS = "inference", "execution"
EVENTS, TIMES, LAST = "mim_inference_events", "mim_inference_seconds", "mim_last_inference_timestamp_seconds"


@dataclass
class Spent:
    """Where the time of a request went, in seconds.

    Attributes:
        parts: by a name of PARTS.
        leads: whether it was the first request of the batch that it was scored in.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    leads: bool = False


class Statistics:
    """Counts of a server, of all its workers: they are metrics of Prometheus.

    Args:
        registry: of this process.
        exposed: gives the registry with the metrics of all workers.
    """

    def __init__(self, registry: CollectorRegistry, exposed: Callable[[], CollectorRegistry]) -> None:
        self._exposed = exposed
        labels = ["model_version", "kind"]
        own: dict[str, Any] = {"namespace": "mim", "registry": registry}
        self._events = Counter("inference_events", "Requests, users and batches, as Triton counts.",
                               labels, **own)  # fmt: skip
        self._seconds = Counter("inference_seconds", "Time of requests by their parts.", labels, **own)
        self._last = Gauge("last_inference_timestamp_seconds", "When the last request came.",
                           ["model_version"], multiprocess_mode="max", **own)  # fmt: skip

    def add(
        self, version: str, seconds: float, spent: Spent | None, kept: Sequence[bool | None] = ()
    ) -> None:
        """Count a request.

        Args:
            version: of the model.
            seconds: from its arrival to its answer.
            spent: on its parts; None of a request that failed.
            kept: of each user, whether the matrix of the history was in the cache; None where no cache was
                asked.
        """
        self._last.labels(version).set_to_current_time()
        took = {"fail": seconds} if spent is None else {"success": seconds, **spent.parts}
        counts: dict[str, int] = dict.fromkeys(took, 1)
        if spent is not None:
            counts |= {INFERENCES: len(kept), EXECUTIONS: int(spent.leads)}
            counts |= {"cache_hit": kept.count(True), "cache_miss": kept.count(False)}
        for kind, count in counts.items():
            self._events.labels(version, kind).inc(count)
        for kind, value in took.items():
            self._seconds.labels(version, kind).inc(value)

    def by_version(self) -> dict[str, dict[str, Any]]:
        """By version: `last_inference` (ms since 1970), counts, and `inference_stats` in nanoseconds."""
        found: dict[str, dict[tuple[str, str], float]] = {}
        for metric in self._exposed().collect():
            if metric.name in (EVENTS, TIMES, LAST):
                for sample in metric.samples:
                    if not sample.name.endswith("_created"):
                        version, kind = sample.labels["model_version"], sample.labels.get("kind", "")
                        found.setdefault(version, {})[metric.name, kind] = sample.value
        return {version: _told(values) for version, values in found.items()}


def _told(values: dict[tuple[str, str], float]) -> dict[str, Any]:
    def value(name: str, kind: str = "") -> float:
        return values.get((name, kind), 0.0)

    return {
        "last_inference": round(1000 * value(LAST)),
        "inference_count": round(value(EVENTS, INFERENCES)),
        "execution_count": round(value(EVENTS, EXECUTIONS)),
        "inference_stats": {
            kind: {"count": round(value(EVENTS, kind)), "ns": round(1e9 * value(TIMES, kind))}
            for kind in KINDS
        },
        "batch_stats": [],
    }
