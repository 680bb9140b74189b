"""Metrics of click prediction, exact and on the whole test set.

AUC counts ties as one half, unlike windowed streaming metrics that order them arbitrarily. Where a metric
is undefined (one class only) it is None, never 0 or 0.5.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mim_torchrec.extras import needs

with needs("train"):
    from sklearn.metrics import roc_auc_score


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve, ties counted as one half; None without both classes.

    Args:
        labels: (n,) zeros and ones.
        scores: (n,), larger means more likely clicked; logits or probabilities.
    """
    if len(labels) == 0 or labels.min() == labels.max():
        return None
    return float(roc_auc_score(labels, scores))


class GroupedAUC:
    """AUC of each group of impressions, for any weighting of them; scores are sorted once.

    Args:
        labels: (n,) zeros and ones.
        scores: (n,).
        groups: (n,) group of each impression, 0 to num_groups - 1; None is one group.
        num_groups: number of groups.
    """

    def __init__(
        self, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None, num_groups: int = 1
    ) -> None:
        labels, scores = np.asarray(labels), np.asarray(scores)
        codes = np.zeros(len(labels), np.int64) if groups is None else np.asarray(groups)
        self.num_groups = num_groups
        self._order = np.lexsort((scores, codes))
        score, code = scores[self._order], codes[self._order]
        self._label = labels[self._order].astype(np.float64)
        fresh = np.ones(len(code), bool)
        fresh[1:] = (code[1:] != code[:-1]) | (score[1:] != score[:-1])
        self._run = np.flatnonzero(fresh)  # where a run of equal scores in a group starts
        self._group = code[self._run]

    def __call__(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(num_groups,) AUC with the i-th impression counted `weights[i]` times; NaN without both classes."""
        return auc_of_sums(self.sums(weights))

    def sums(self, weights: np.ndarray | None = None) -> np.ndarray:
        """What the AUC is computed from, so that ranks can add theirs up, see `merge_sums`.

        Returns:
            (3, num_groups): positives, negatives, and pairs of both that are in the right order, where a tie
            is half a pair.
        """
        if not len(self._order):
            return np.zeros((3, self.num_groups))
        w = np.ones(len(self._order)) if weights is None else weights[self._order].astype(np.float64)
        positive = np.add.reduceat(w * self._label, self._run)
        negative = np.add.reduceat(w * (1 - self._label), self._run)
        sums = [np.bincount(self._group, weights=x, minlength=self.num_groups) for x in (positive, negative)]
        before = np.concatenate(([0.0], np.cumsum(sums[1])[:-1]))  # negatives of the groups ahead
        below = np.cumsum(negative) - negative - before[self._group]
        wins = np.bincount(self._group, weights=positive * (below + negative / 2), minlength=self.num_groups)
        return np.stack([*sums, wins])


def merge_sums(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sums of impressions from those of ranges of their scores.

    Args:
        parts: `GroupedAUC.sums` (3, num_groups) of each range, the lowest scores first; equal scores are in
            one range.

    Returns:
        (3, num_groups), what `GroupedAUC.sums` of all impressions is.
    """
    total = np.zeros_like(parts[0])
    for part in parts:
        total[2] += part[2] + part[0] * total[1]
        total[:2] += part[:2]
    return total


def auc_of_sums(sums: np.ndarray) -> np.ndarray:
    """(num_groups,) AUC of `GroupedAUC.sums`; NaN without both classes."""
    positive, negative, wins = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(positive * negative > 0, wins / (positive * negative), np.nan)


def group_codes(groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Any ids of groups as numbers from 0, and how many there are."""
    found, codes = np.unique(groups, return_inverse=True)
    return codes, len(found)


def clipped(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities (n,), kept 1e-7 away from 0 and 1, so that their logarithms are finite."""
    return np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)


def losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(n,) binary cross entropy of each impression in nats, of probabilities that `clipped` gave."""
    return -np.where(np.asarray(labels) > 0, np.log(probabilities), np.log1p(-probabilities))


def calibration_sums(
    labels: np.ndarray,
    probabilities: np.ndarray,
    bins: int,
    first: int,
    total: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """What `calibration_of_sums` takes, of impressions that are `first`, `first` + 1, … of `total` ones.

    Args:
        labels: (n,) zeros and ones.
        probabilities: (n,); in the order of all impressions by probability, these come one after another.
        bins: equally large parts of the impressions, from the lowest probability to the highest.
        first: impressions with lower probabilities elsewhere.
        total: all impressions.
        weights: (n,) how often each impression counts; None counts each once.

    Returns:
        (bins, 3): impressions of each bin, as they count, and the sums of their probabilities and labels.
    """
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(probabilities, kind="stable")
    sizes = np.full(bins, total // bins) + (np.arange(bins) < total % bins)
    edges = np.clip(np.cumsum([0, *sizes]) - first, 0, len(labels))
    return np.array([
        [np.sum(w[part]), np.sum(w[part] * probabilities[part]), np.sum(w[part] * labels[part])]
        for part in (order[start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True))
    ])  # fmt: skip


def calibration_of_sums(sums: np.ndarray) -> dict[str, Any] | None:
    """How well probabilities agree with what happened; None without impressions.

    Args:
        sums: (bins, 3), the sum of `calibration_sums` over disjoint impressions.

    Returns:
        `ratio`, the mean probability over the click rate (None without a click); `ece`, the expected
        calibration error, the mean over impressions of the distance of their bin's mean probability and click
        rate; and `bins`, of each its `n`, `predicted` and `observed`.
    """
    total, predicted, clicks = sums.sum(axis=0)
    if not total:
        return None
    rows = [{"n": round(n), "predicted": float(p / n), "observed": float(c / n)} for n, p, c in sums if n]
    error = sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in rows) / total
    return {"ratio": float(predicted / clicks) if clicks else None, "ece": float(error), "bins": rows}


def draw_groups(groups: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap draws of whole groups: how often each impression counts, (m,) int64, n times.

    Args:
        groups: (m,) integer id of the group of each impression.
        n: number of draws.
        seed: of the draws.
    """
    codes, count = group_codes(groups)
    for counts in draw_counts(count, n, seed):
        yield counts[codes]


def draw_counts(count: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap draws: how often each of `count` groups is drawn, (count,) int64, n times."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield np.bincount(rng.integers(count, size=count), minlength=count)


def interval(draws: np.ndarray, confidence: float = 0.95) -> list[float] | None:
    """Percentile interval of draws, undefined ones left out; None where none is defined."""
    draws = np.asarray(draws, np.float64)
    if np.isnan(draws).all():
        return None
    tail = (1 - confidence) / 2
    return [float(end) for end in np.nanquantile(draws, [tail, 1 - tail])]


def paired_bootstrap(
    labels: np.ndarray,
    base_scores: np.ndarray,
    mim_scores: np.ndarray,
    groups: np.ndarray,
    seed: int,
    n: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """AUC of `mim_scores` minus AUC of `base_scores`, with a percentile interval over groups.

    Whole groups (users) are drawn with replacement, because impressions of one user are not independent,
    and both models are scored on the same draw.

    Args:
        labels: (m,) zeros and ones.
        base_scores: (m,).
        mim_scores: (m,), of the same impressions in the same order.
        groups: (m,) integer id of the group of each impression.
        seed: seed of the draws.
        n: number of draws.
        confidence: share of the draws inside the interval.

    Returns:
        The difference on all impressions, the low and the high end of the interval.

    Raises:
        ValueError: the labels do not hold both classes.
    """
    labels = np.asarray(labels)
    base, mim = auc(labels, base_scores), auc(labels, mim_scores)
    if base is None or mim is None:
        raise ValueError("the difference of two AUCs needs impressions of both classes")
    ranked = [GroupedAUC(labels, scores) for scores in (base_scores, mim_scores)]
    draws = np.array([ranked[1](w)[0] - ranked[0](w)[0] for w in draw_groups(groups, n, seed)])
    found = interval(draws, confidence)
    if found is None:
        raise ValueError(f"none of {n} draws of groups has impressions of both classes")
    return mim - base, found[0], found[1]
