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
def test_auc_of_one_class_is_undefined(labels):
    scores = np.full(len(labels), 0.5)
    assert metrics.auc(labels, scores) is None


def test_the_loss_of_a_certain_error_is_finite():
    assert np.isfinite(metrics.losses(np.array([1]), metrics.clipped(np.array([0.0]))))


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


def test_the_auc_of_each_group_is_that_of_a_loop_for_any_weighting(sample):
    labels, scores, groups = sample
    codes, count = metrics.group_codes(groups)
    weights = np.random.default_rng(2).integers(0, 3, len(labels))
    found = metrics.GroupedAUC(labels, scores, codes, count)(weights)
    repeated = np.repeat(np.arange(len(labels)), weights)
    for g in range(count):
        mine = repeated[codes[repeated] == g]
        if 0 < labels[mine].sum() < len(mine):
            assert found[g] == pytest.approx(naive_auc(labels[mine], scores[mine]))
        else:
            assert np.isnan(found[g])


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> dict | None:
    return metrics.calibration_of_sums(metrics.calibration_sums(labels, probabilities, bins, 0, len(labels)))


def test_calibration_compares_probabilities_with_what_happened():
    probabilities = np.array([0.1, 0.2, 0.9, 0.6])
    found = calibration(np.array([0, 1, 1, 1]), probabilities, bins=2)
    assert found["ratio"] == pytest.approx(1.8 / 3)
    low, high = found["bins"]
    assert low == {"n": 2, "predicted": pytest.approx(0.15), "observed": 0.5}
    assert high == {"n": 2, "predicted": pytest.approx(0.75), "observed": 1.0}
    assert found["ece"] == pytest.approx((2 * 0.35 + 2 * 0.25) / 4)


def test_calibration_without_a_click_has_no_ratio():
    assert calibration(np.zeros(3), np.full(3, 0.5))["ratio"] is None
    assert calibration(np.zeros(0), np.zeros(0)) is None


def test_draws_take_whole_groups_as_many_as_there_are(sample):
    groups = sample[2]
    for weights in metrics.draw_groups(groups, 5, seed=0):
        of_group = {g: set(weights[groups == g]) for g in np.unique(groups)}
        assert all(len(values) == 1 for values in of_group.values())
        assert sum(values.pop() for values in of_group.values()) == len(np.unique(groups))


def test_an_interval_leaves_out_undefined_draws():
    assert metrics.interval(np.array([np.nan, *np.arange(101.0)])) == pytest.approx([2.5, 97.5])
    assert metrics.interval(np.array([np.nan, np.nan])) is None
