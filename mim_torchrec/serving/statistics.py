"""Statistics of inference by version of the model, as Triton's extension of the protocol counts them."""

import time
from dataclasses import dataclass, field
from typing import Any

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
KINDS = ("success", "fail", *PARTS, "cache_hit", "cache_miss")


@dataclass
class Spent:
    """Where the time of a request went, in seconds.

    Attributes:
        parts: by a name of PARTS.
        leads: whether it was the first request of the batch that it was scored in.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    leads: bool = False


@dataclass
class _Version:
    last: int = 0
    inferences: int = 0
    executions: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))


class Statistics:
    """Counts of one server; the event loop alone calls it."""

    def __init__(self) -> None:
        self._versions: dict[str, _Version] = {}

    def add(self, version: str, seconds: float, spent: Spent | None, was_kept: bool | None = None) -> None:
        """Count a request.

        Args:
            version: of the model.
            seconds: from its arrival to its answer.
            spent: on its parts; None of a request that failed.
            was_kept: whether the matrix of its history was in the cache; None where no cache was asked.
        """
        one = self._versions.setdefault(version, _Version())
        one.last = time.time_ns() // 1_000_000
        took = {"fail": seconds} if spent is None else {"success": seconds, **spent.parts}
        if spent is not None:
            one.inferences += 1
            one.executions += spent.leads
            if was_kept is not None:
                took["cache_hit" if was_kept else "cache_miss"] = 0.0
        for kind, value in took.items():
            one.counts[kind] += 1
            one.seconds[kind] += value

    def by_version(self) -> dict[str, dict[str, Any]]:
        """By version: `last_inference` (ms since 1970), counts, and `inference_stats` in nanoseconds."""
        return {
            version: {
                "last_inference": one.last,
                "inference_count": one.inferences,
                "execution_count": one.executions,
                "inference_stats": {
                    kind: {"count": one.counts[kind], "ns": round(one.seconds[kind] * 1e9)} for kind in KINDS
                },
                "batch_stats": [],
            }
            for version, one in self._versions.items()
        }
