"""Metrics of click prediction, exact and on the whole test set.

AUC counts ties as one half, unlike windowed streaming metrics that order them arbitrarily. Where a metric
is undefined (one class only) it is None, never 0 or 0.5.
"""

import numpy as np
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


def _group_codes(groups: np.ndarray) -> np.ndarray:
    return np.unique(groups, return_inverse=True)[1]


def _sums_by_group(
    labels: np.ndarray, scores: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUC and impressions of each group; the AUC is NaN without both classes."""
    num_groups = int(codes.max()) + 1
    order = np.lexsort((scores, codes))
    code, score, label = codes[order], scores[order], labels[order].astype(bool)
    count = np.bincount(code, minlength=num_groups)
    start = np.concatenate(([0], np.cumsum(count)[:-1]))
    # mid-ranks within each group: tied scores share the mean of the ranks they occupy
    fresh = np.ones(len(code), bool)
    fresh[1:] = (code[1:] != code[:-1]) | (score[1:] != score[:-1])
    run = np.cumsum(fresh) - 1
    first = np.flatnonzero(fresh)
    last = np.concatenate((first[1:], [len(code)])) - 1
    rank = (first + last)[run] / 2 - start[code] + 1
    positives = np.bincount(code, weights=label, minlength=num_groups)
    negatives = count - positives
    rank_sum = np.bincount(code, weights=rank * label, minlength=num_groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    value[(positives == 0) | (negatives == 0)] = np.nan
    return value, count


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean AUC of groups (users), weighted by their impressions.

    Groups without both classes are left out; None when no group has both.

    Args:
        labels: (n,) zeros and ones.
        scores: (n,).
        groups: (n,) integer id of the group of each impression.
    """
    if len(labels) == 0:
        return None
    value, count = _sums_by_group(np.asarray(labels), np.asarray(scores), _group_codes(groups))
    defined = ~np.isnan(value)
    if not defined.any():
        return None
    return float(np.average(value[defined], weights=count[defined]))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Mean binary cross entropy in nats; probabilities are kept 1e-7 away from 0 and 1."""
    if len(labels) == 0:
        return None
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(np.asarray(labels) > 0, np.log(p), np.log1p(-p))))


def normalized_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Log loss divided by that of always predicting the click rate (He et al., 2014); lower is better.

    None without both classes.
    """
    rate = float(np.mean(labels)) if len(labels) else 0.0
    if rate in (0.0, 1.0):
        return None
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    return log_loss(labels, probabilities) / entropy


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
    codes = _group_codes(groups)
    rng = np.random.default_rng(seed)
    ranked = [_RankedScores(labels, s) for s in (base_scores, mim_scores)]
    draws = np.empty(n)
    num_groups = int(codes.max()) + 1
    for i in range(n):
        weights = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)[codes]
        draws[i] = ranked[1].auc(weights) - ranked[0].auc(weights)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return mim - base, float(low), float(high)


class _RankedScores:
    """Scores sorted once, so that the AUC of any weighting of the impressions is one pass."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray) -> None:
        scores = np.asarray(scores)
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._label = labels[self._order].astype(np.float64)
        fresh = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        self._run_start = np.flatnonzero(fresh)

    def auc(self, weights: np.ndarray) -> float:
        """AUC with the i-th impression counted `weights[i]` times; NaN without both classes."""
        w = weights[self._order].astype(np.float64)
        positive = np.add.reduceat(w * self._label, self._run_start)
        negative = np.add.reduceat(w * (1 - self._label), self._run_start)
        below = np.cumsum(negative) - negative
        total = positive.sum() * negative.sum()
        return float((positive * (below + negative / 2)).sum() / total) if total else float("nan")
