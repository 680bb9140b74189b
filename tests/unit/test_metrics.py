"""Click metrics against definitions by loops."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mim_torchrec.training import metrics


def naive_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels == 1] for n in scores[labels == 0]
    ]
    return float(np.mean(wins))


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, 200) / 12  # many ties
    labels = (rng.random(200) < scores).astype(np.int64)
    return labels, scores, rng.integers(100, 130, 200)


def test_auc_counts_ties_as_one_half(sample):
    labels, scores, _ = sample
    assert metrics.auc(labels, scores) == pytest.approx(naive_auc(labels, scores))


def test_auc_of_constant_scores_is_one_half():
    assert metrics.auc(np.array([0, 1, 1]), np.zeros(3)) == 0.5


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.ones(3, int), np.zeros(0, int)])
def test_metrics_of_one_class_are_undefined(labels):
    scores = np.full(len(labels), 0.5)
    assert metrics.auc(labels, scores) is None
    assert metrics.normalized_entropy(labels, scores) is None
    assert metrics.grouped_auc(labels, scores, np.arange(len(labels))) is None


def test_grouped_auc_weighs_groups_by_impressions_and_leaves_out_those_of_one_class(sample):
    labels, scores, groups = sample
    total = weight = 0.0
    for g in np.unique(groups):
        mine = groups == g
        if 0 < labels[mine].sum() < mine.sum():
            total += mine.sum() * naive_auc(labels[mine], scores[mine])
            weight += mine.sum()
    assert metrics.grouped_auc(labels, scores, groups) == pytest.approx(total / weight)


def test_normalized_entropy_of_the_base_rate_is_one():
    labels = np.array([1, 0, 0, 0])
    assert metrics.normalized_entropy(labels, np.full(4, 0.25)) == pytest.approx(1.0)


def test_log_loss_is_the_mean_cross_entropy():
    expected = -(np.log(0.8) + np.log(1 - 0.3)) / 2
    assert metrics.log_loss(np.array([1, 0]), np.array([0.8, 0.3])) == pytest.approx(expected)


def test_log_loss_of_a_certain_error_is_finite():
    assert np.isfinite(metrics.log_loss(np.array([1]), np.array([0.0])))


def test_bootstrap_of_equal_scores_is_zero(sample):
    labels, scores, groups = sample
    assert metrics.paired_bootstrap(labels, scores, scores, groups, seed=0, n=20) == (0.0, 0.0, 0.0)


def test_bootstrap_draws_whole_groups(sample):
    labels, scores, groups = sample
    better = scores + labels * 0.3
    diff, low, high = metrics.paired_bootstrap(labels, scores, better, groups, seed=1, n=300)
    rng = np.random.default_rng(1)
    ids = np.unique(groups)
    draws = []
    for _ in range(300):
        rows = np.concatenate(
            [np.flatnonzero(groups == ids[g]) for g in rng.integers(len(ids), size=len(ids))]
        )
        draws.append(roc_auc_score(labels[rows], better[rows]) - roc_auc_score(labels[rows], scores[rows]))
    assert diff == pytest.approx(roc_auc_score(labels, better) - roc_auc_score(labels, scores))
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert 0 < low < diff < high


def test_bootstrap_is_seeded(sample):
    labels, scores, groups = sample
    noise = np.random.default_rng(5).random(len(scores))
    runs = [metrics.paired_bootstrap(labels, scores, noise, groups, seed=7, n=50) for _ in range(2)]
    assert runs[0] == runs[1]
