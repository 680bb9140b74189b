"""Scores of all user behavior models and both presets, without HTTP, beside a bare product of matrices."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section
from mim_torchrec.benchmarks.measures.turns import seconds_by_name
from mim_torchrec.benchmarks.speed.serving_inputs import AT, COMPARED, InputConfig, make_bundle, make_request
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.lookups import ROLES
from mim_torchrec.serving.scorer import Scorer

REQUESTS = 16  # of which rounds take turns
UBMS = ("avg_pooling", "din", "dien", "bst", "sim", "twin")
MOST_OVER_PAPER = 1.4
MOST_OVER_MATMUL = 8.0
WITH_MATMUL_TARGET = ("avg_pooling", "bst", "sim", "twin")
MOST_P99_OVER_P50 = 1.6


def compare_models(
    config: InputConfig, ubms: Sequence[str], rounds: int, table: Path
) -> dict[str, dict[str, float]]:
    """Milliseconds of a score by model and preset, and of a bare product, in turns and at one thread.

    Every round is of another request. The product is of the vectors of its candidates and its behaviors.
    """
    names = [f"{ubm}/{preset}" for ubm in ubms for preset in COMPARED]
    requests = [make_request(config, AT, seed) for seed in range(REQUESTS)]
    scorers = {name: Scorer(Bundle.open(make_bundle(config, name)), table) for name in names}
    some = next(iter(scorers.values()))
    assert some.mm is not None  # all models have content interest
    vectors = [[some.mm.lookup(request.ids[f"{role}_item_id"])[0] for role in ROLES] for request in requests]
    turn = [0]

    def another() -> None:
        turn[0] += 1

    def multiply() -> Tensor:
        candidates, behaviors = vectors[turn[0] // (len(names) + 1) % REQUESTS]
        with torch.inference_mode():
            return candidates @ behaviors.T

    def score(scorer: Scorer) -> None:
        scorer.score([requests[turn[0] // (len(names) + 1) % REQUESTS]])

    runs: dict[str, Callable[[], Any]] = {name: partial(score, scorer) for name, scorer in scorers.items()}
    times = seconds_by_name(runs | {"matmul": multiply}, rounds, warmup=3, before=another)
    product = statistics.median(times.pop("matmul"))
    found: dict[str, dict[str, float]] = {}
    for name, seconds in times.items():
        p50, p99 = np.percentile(seconds, [50, 99])
        found[name] = {"score_ms": 1000 * float(p50), "matmul_ms": 1000 * product,
                       "over_matmul": float(p50) / product, "p99_over_p50": float(p99 / p50)}  # fmt: skip
    return found


def by_model(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What the targets of scores speak of, by user behavior model and preset."""
    ubms = list(dict.fromkeys(name.split("/")[0] for name in scores))
    ratios = {ubm: scores[f"{ubm}/recommended"]["score_ms"] / scores[f"{ubm}/paper"]["score_ms"]
              for ubm in ubms}  # fmt: skip
    nested = {
        key: {ubm: {preset: scores[f"{ubm}/{preset}"][figure] for preset in COMPARED} for ubm in ubms}
        for key, figure in (("score_over_matmul", "over_matmul"), ("p99_over_p50", "p99_over_p50"))
    }
    return {"recommended_over_paper": ratios, **nested}


def score_targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of scores without HTTP."""
    found = []
    for ubm, ratio in report["recommended_over_paper"].items():
        claim = f"{ubm}: a score of the recommended preset takes at most {MOST_OVER_PAPER} times the paper's"
        found.append(target(claim, ratio, ratio <= MOST_OVER_PAPER))
    for ubm, by_preset in report["score_over_matmul"].items():
        if ubm in WITH_MATMUL_TARGET:
            most = max(by_preset.values())
            claim = f"{ubm}: a score takes at most {MOST_OVER_MATMUL:.0f} times the bare product"
            found.append(target(claim, most, most <= MOST_OVER_MATMUL))
    tails = [ratio for by_preset in report["p99_over_p50"].values() for ratio in by_preset.values()]
    claim = f"all models: p99 of a score at most {MOST_P99_OVER_P50} times p50"
    found.append(target(claim, max(tails), max(tails) <= MOST_P99_OVER_P50))
    return found


def score_section(scores: dict[str, dict[str, float]]) -> Section:
    """The table of the report."""
    return Section(
            "Scores of all models",
            text=[f"All of a request of {AT} behaviors beside the bare product of its candidates' and its "
                  "behaviors' multi-modal vectors. One thread, in turns, every round of another request."],
            columns=["model", "score, ms", "score / product", "p99 / p50"],
            rows=[[name, f"{f['score_ms']:.2f}", f"{f['over_matmul']:.1f}", f"{f['p99_over_p50']:.2f}"]
                  for name, f in scores.items()],
        )  # fmt: skip
