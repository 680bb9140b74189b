"""Click metrics by loops and scikit-learn, to compare ours with."""

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """Mean AUC of the groups that have both classes, weighted by their impressions."""
    parts = [groups == group for group in np.unique(groups) if len(set(labels[groups == group])) == 2]
    return float(np.average([roc_auc_score(labels[mine], scores[mine]) for mine in parts],
                            weights=[mine.sum() for mine in parts]))  # fmt: skip


def normalized_entropy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Log loss over that of always predicting the click rate."""
    return log_loss(labels, scores) / log_loss(labels, np.full(len(labels), labels.mean(dtype=np.float64)))
