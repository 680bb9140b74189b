"""Two models compared on the same test impressions: gain, interval, cold start, categories.

Reads what the CTR stage writes (metrics.json, predictions.parquet), one directory a seed. Figures are means
over the seeds. An interval is of the mean gain over the seeds, by resampling users.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

from mim_torchrec.data.ages import age_sets
from mim_torchrec.data.items import ItemStore
from mim_torchrec.training.history import read_history
from mim_torchrec.training.metrics import auc, paired_bootstrap
from mim_torchrec.training.run_directory import RunDirectory

BOOTSTRAP_SEED = 0
ABOVE_ZERO = "> 0"
IMPRESSION = ("request_id", "user_id", "item_id", "label")


def read_metrics(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """metrics.json of each directory that the CTR stage wrote."""
    return [json.loads((run / "metrics.json").read_text()) for run in runs]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean; None when one of the values is undefined, or there is none."""
    defined = [value for value in values if value is not None]
    if not values or len(defined) < len(values):
        return None
    return float(np.mean(defined))


def deviation(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation of a sample, as of seeds; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def mean_metrics(runs: Sequence[Path]) -> dict[str, float | None]:
    """Mean `auc`, `gauc`, `ne` and `logloss` over the seeds."""
    metrics = read_metrics(runs)
    return {key: mean([m[key] for m in metrics]) for key in ("auc", "gauc", "ne", "logloss")}


def gain(
    base: Sequence[Path], other: Sequence[Path], n: int = 1000, items: np.ndarray | None = None
) -> dict[str, Any]:
    """Mean over the seeds of AUC(other) - AUC(base), with a 95% interval by resampling users.

    Args:
        base: directories of the base runs, one a seed.
        other: directories of the other model's runs, in the same order.
        n: bootstrap draws.
        items: ids of the items whose impressions are compared; None compares all.

    Returns:
        `gain`, `ci` [low, high] and `per_seed`, the gain on each seed; all None where the AUC is undefined,
        because the impressions hold no click or nothing else.

    Raises:
        ValueError: two runs have not scored the same impressions.
    """
    if len(base) != len(other) or not base:
        raise ValueError(f"{len(base)} base runs cannot be paired with {len(other)} others")
    reference = read_predictions(base[0])
    base_scores, other_scores = (
        [_scores_of(run, reference, base[0]) for run in runs] for runs in (base, other)
    )
    kept = slice(None) if items is None else np.isin(reference["item_id"], items)
    labels, groups = reference["label"][kept], reference["user_id"][kept]
    base_scores, other_scores = ([s[kept] for s in scores] for scores in (base_scores, other_scores))
    if len(np.unique(labels)) < 2:
        return {"gain": None, "ci": None, "per_seed": None}
    # Ranks of seed s are moved above those of all seeds before. Pairs of two seeds then count the same for
    # both models and cancel, in every draw, and what is left of the pooled difference is the mean of the
    # seeds' differences over the number of seeds.
    count = len(base)
    difference, low, high = paired_bootstrap(
        np.tile(labels, count),
        np.concatenate([_ranks(s) + i * len(labels) for i, s in enumerate(base_scores)]),
        np.concatenate([_ranks(s) + i * len(labels) for i, s in enumerate(other_scores)]),
        np.tile(groups, count),
        seed=BOOTSTRAP_SEED,
        n=n,
    )
    per_seed = [
        _defined_auc(labels, b) - _defined_auc(labels, a)
        for a, b in zip(base_scores, other_scores, strict=True)
    ]
    return {"gain": difference * count, "ci": [low * count, high * count], "per_seed": per_seed}


def scores(runs: Sequence[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels of the test impressions, and what each run has scored them, all in one order.

    Args:
        runs: directories with a predictions.parquet.

    Raises:
        ValueError: they have not scored the same impressions.
    """
    reference = read_predictions(runs[0])
    return reference["label"], [_scores_of(run, reference, runs[0]) for run in runs]


def read_predictions(run: Path) -> dict[str, np.ndarray]:
    """Test impressions of a run by column, and their `score`, in the order of their ids."""
    table = pq.read_table(run / "predictions.parquet")
    columns = {name: table[name].to_numpy() for name in (*IMPRESSION, "score")}
    order = np.lexsort((columns["label"], columns["item_id"], columns["request_id"]))
    return {name: column[order] for name, column in columns.items()}


def _scores_of(run: Path, reference: dict[str, np.ndarray], reference_run: Path) -> np.ndarray:
    predictions = read_predictions(run)
    for name in IMPRESSION:
        if not np.array_equal(predictions[name], reference[name]):
            raise ValueError(f"{run} and {reference_run} differ in {name}: not the same test impressions")
    return predictions["score"]


def _defined_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    value = auc(labels, scores)
    assert value is not None  # there are labels of both classes
    return value


def _ranks(scores: np.ndarray) -> np.ndarray:
    return np.unique(scores, return_inverse=True)[1].astype(np.float64)


def cold_start(
    base: Sequence[Path], mim: Sequence[Path], items: ItemStore | None = None
) -> list[dict[str, Any]]:
    """AUC of the ten sets of items by age, S1 the newest, of both models.

    Args:
        base: directories of the Base runs, one a seed.
        mim: directories of the MIM runs, in the same order.
        items: of the data set; with them each set also has `gain`, `ci` and `per_seed`, see `gain`.
    """
    base_sets, mim_sets = ([m["by_age"] for m in read_metrics(runs)] for runs in (base, mim))
    of_item = None if items is None else age_sets(items)
    return [
        {
            "set": base_sets[0][k]["set"],
            "base_auc": mean([sets[k]["auc"] for sets in base_sets]),
            "mim_auc": mean([sets[k]["auc"] for sets in mim_sets]),
            "n": base_sets[0][k]["n"],
            "positives": base_sets[0][k]["positives"],
        }
        | ({} if items is None else gain(base, mim, items=items.item_ids[of_item == k]))
        for k in range(len(base_sets[0]))
    ]


def by_category(base: Sequence[Path], mim: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """AUC of both models by the category of the candidate, most impressions first."""
    base_parts, mim_parts = ([m["by_category"] for m in read_metrics(runs)] for runs in (base, mim))
    names = sorted(base_parts[0], key=lambda name: -base_parts[0][name]["n"])
    return {
        name: {
            "base_auc": mean([parts[name]["auc"] for parts in base_parts]),
            "mim_auc": mean([parts[name]["auc"] for parts in mim_parts]),
            "n": base_parts[0][name]["n"],
            "positives": base_parts[0][name]["positives"],
        }
        for name in names
    }


def compare(base: Sequence[Path], mim: Sequence[Path], items: ItemStore | None = None) -> dict[str, Any]:
    """The parts `ctr`, `cold_start`, `by_category` and `table` of a report.

    Args:
        base: directories of the Base runs, one a seed.
        mim: directories of the MIM runs, in the same order.
        items: of the data set, for intervals of items by age.
    """
    difference = gain(base, mim)
    facts = read_metrics(mim)[0]["table"]
    return {
        "ctr": {
            "base": mean_metrics(base),
            "mim": mean_metrics(mim),
            "mim_minus_base_auc": difference["gain"],
            "mim_minus_base_ci": difference["ci"],
        },
        "cold_start": cold_start(base, mim, items),
        "by_category": by_category(base, mim),
        "table": facts,
    }


def control(claim: str, base: Sequence[Path], other: Sequence[Path]) -> dict[str, Any]:
    """A negative control: what it does, its gain, its interval and whether that holds zero (None: undefined).

    Args:
        claim: one sentence on what has been taken away.
        base: directories of the runs without content, one a seed.
        other: directories of the runs of the control, in the same order.
    """
    result = gain(base, other)
    if result["ci"] is None:
        verdict = "undefined: the test impressions hold no click, or nothing else"
        return {**result, "contains_zero": None, "what": claim, "verdict": verdict}
    low, high = result["ci"]
    if low > 0:
        verdict = "its interval lies above zero: something other than content gains"
    elif high < 0:
        verdict = "its interval lies below zero: no gain, and worse than Base"
    else:
        verdict = "its interval contains zero: the gain vanishes within it"
    return {**result, "contains_zero": low <= 0 <= high, "what": claim, "verdict": verdict}


def variant(what: str, base: Sequence[Path], other: Sequence[Path]) -> dict[str, Any]:
    """A line of the report's variants: one model against another.

    Args:
        what: one sentence on the two.
        base: directories of the runs that are compared with, one a seed.
        other: directories of the variant's runs, in the same order.
    """
    aucs = {"base_auc": mean_metrics(base)["auc"], "auc": mean_metrics(other)["auc"]}
    return {"what": what, **aucs, **gain(base, other)}


def csft_variants(
    base: Sequence[Path], plain: Sequence[Path], mim: Sequence[Path]
) -> dict[str, dict[str, Any]]:
    """What content gives without C-SFT, and what C-SFT adds to it (Table 5, "w/o C-SFT").

    Args:
        base: directories of the Base runs, one a seed.
        plain: directories of the MIM runs on a table of plain towers, in the same order.
        mim: directories of the MIM runs on a table of the fine-tuned encoder, in the same order.
    """
    return {
        "without_csft": variant("MIM on a table of the plain pretrained towers (PCA), against Base.",
                                base, plain),
        "csft_over_plain": variant("MIM with C-SFT, against MIM on the plain table (in the column Base AUC).",
                                   plain, mim),
    }  # fmt: skip


def validation_auc(run: Path) -> float:
    """Validation AUC of the best epoch of a CTR run."""
    return read_history(RunDirectory(run).history).best()["auc"]


def target(claim: str, value: float | None, met: bool, threshold: str | None = None) -> dict[str, Any]:
    """One line of the report's list of targets; the threshold is shown where the claim does not say it."""
    found = {"claim": claim, "value": value, "met": bool(met)}
    return found if threshold is None else found | {"threshold": threshold}


def target_of_difference(claim: str, part: dict[str, Any]) -> dict[str, Any]:
    """A target that `mim_auc` of a part is above `base_auc`; not met where one is undefined."""
    if part["base_auc"] is None or part["mim_auc"] is None:
        return target(claim, None, False, ABOVE_ZERO)
    return target_of_gain(claim, {"gain": part["mim_auc"] - part["base_auc"]})


def target_of_gain(claim: str, result: dict[str, Any]) -> dict[str, Any]:
    """A target that a `gain` is above zero; not met where it is undefined."""
    return target(claim, result["gain"], result["gain"] is not None and result["gain"] > 0, ABOVE_ZERO)


def target_of_control(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A target that the interval of a `control` contains zero."""
    claim = f"Control {name}: the interval of the gain contains zero"
    return target(
        claim, result["gain"], result["contains_zero"], _around_zero("low ≤ 0 ≤ high", result["ci"])
    )


def target_of_interval(claim: str, value: float | None, ci: Sequence[float] | None) -> dict[str, Any]:
    """A target that the interval of a difference lies above zero."""
    return target(claim, value, ci is not None and ci[0] > 0, _around_zero("low > 0", ci))


def _around_zero(rule: str, ci: Sequence[float] | None) -> str:
    return f"{rule}; undefined" if ci is None else f"{rule}; [{ci[0]:+.4f}, {ci[1]:+.4f}]"


def exchange_rate(recall: Sequence[float], gain: Sequence[float]) -> dict[str, float | int | None]:
    """How much AUC a point of recall was worth, over runs: least squares of the gain on the recall.

    Recall takes minutes to measure, the AUC of a CTR model takes hours. MOON (arXiv 2511.11305) chooses its
    encoders by this rate.

    Args:
        recall: recall of the bought item of each run's encoder, 0 to 1.
        gain: AUC of each run's CTR model less that of its Base.

    Returns:
        `auc_per_point` (AUC for one more percent of recall), `pearson`, `spearman`, `n`; None where
        fewer than three runs, or runs that do not differ, say nothing.
    """
    known: dict[str, float | int | None] = {"n": len(recall)}
    if len(recall) < 3 or np.ptp(recall) == 0 or np.ptp(gain) == 0:
        return known | {"auc_per_point": None, "pearson": None, "spearman": None}
    line = stats.linregress(recall, gain)
    return known | {
        "auc_per_point": float(line.slope) / 100,
        "pearson": float(line.rvalue),
        "spearman": float(stats.spearmanr(recall, gain).statistic),
    }
