"""Metrics of impressions that may lie on several ranks, on one rank; `distributed/` has them on two."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from mim_torchrec.errors import Diverged
from mim_torchrec.training import metrics
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.impressions import Impressions
from tests.click_metrics import grouped_auc, normalized_entropy

ONE = DistributedContext(0, 1, torch.device("cpu"))
COUNT = 400


@pytest.fixture
def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = (rng.integers(1, 30, COUNT) / 31).astype(np.float32)  # many ties
    labels = (rng.random(COUNT) < scores).astype(np.float32)
    return {"label": labels, "score": scores, "user": rng.integers(-40, 40, COUNT) * 2**55,
            "part": rng.integers(0, 3, COUNT)}  # fmt: skip


def impressions(sample: dict[str, np.ndarray], drawn: bool = False) -> Impressions:
    return Impressions(sample["label"], sample["score"], ONE, parts={"kind": (sample["part"], 4)},
                       groups={"gauc": sample["user"]}, drawn=sample["user"] if drawn else None)  # fmt: skip


def test_metrics_are_those_of_scikit_learn(sample):
    found = impressions(sample).compute()
    labels, scores = sample["label"], sample["score"].astype(np.float64)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["logloss"] == pytest.approx(log_loss(labels, scores), abs=1e-12)
    assert found["ne"] == pytest.approx(normalized_entropy(labels, scores), abs=1e-12)
    assert found["calibration_ratio"] == pytest.approx(scores.mean() / labels.mean(dtype=np.float64))


def test_grouped_auc_is_that_of_a_loop_over_users(sample):
    assert impressions(sample).compute()["gauc"] == pytest.approx(
        grouped_auc(sample["label"], sample["score"], sample["user"])
    )


def test_every_part_has_its_auc_and_an_empty_one_none(sample):
    found = impressions(sample).compute()["kind"]
    for part in range(3):
        mine = sample["part"] == part
        assert found[part] == pytest.approx(roc_auc_score(sample["label"][mine], sample["score"][mine]))
    assert np.isnan(found[3])


def test_a_draw_counts_the_impressions_of_its_users(sample):
    own = impressions(sample, drawn=True)
    users = np.unique(sample["user"])
    assert own.num_drawn == len(users)
    counts = np.random.default_rng(1).integers(0, 3, len(users))
    repeated = np.repeat(np.arange(COUNT), counts[np.searchsorted(users, sample["user"])])
    labels, scores = sample["label"][repeated], sample["score"][repeated]
    (found,) = own.compute_draws([counts])
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["gauc"] == pytest.approx(grouped_auc(labels, scores, sample["user"][repeated]))
    assert found["logloss"] == pytest.approx(log_loss(labels, scores.astype(np.float64)))


def test_calibration_is_that_of_all_impressions(sample):
    sums = metrics.calibration_sums(sample["label"], sample["score"], 10, 0, COUNT)
    assert impressions(sample).calibration() == metrics.calibration_of_sums(sums)


def test_one_class_leaves_what_needs_two_undefined(sample):
    found = impressions(sample | {"label": np.zeros(COUNT, np.float32)}).compute()
    assert all(np.isnan(found[name]) for name in ("auc", "ne", "gauc"))
    assert found["logloss"] > 0


def test_predictions_that_are_nan_are_an_error(sample):
    sample["score"][7] = np.nan
    with pytest.raises(Diverged, match="the model predicts NaN"):
        impressions(sample)


@pytest.mark.parametrize("cut", [0, 1, 150, COUNT])
def test_sums_of_ranges_of_scores_merge_to_those_of_all(sample, cut):
    order = np.argsort(sample["score"], kind="stable")
    ascending = sample["score"][order]
    cut = int(np.searchsorted(ascending, ascending[min(cut, COUNT - 1)])) if cut < COUNT else COUNT
    weights = np.random.default_rng(3).integers(0, 3, COUNT)
    parts = [
        metrics.GroupedAUC(sample["label"][rows], sample["score"][rows], sample["part"][rows], 4).sums(
            weights[rows]
        )
        for rows in (order[:cut], order[cut:])
    ]
    whole = metrics.GroupedAUC(sample["label"], sample["score"], sample["part"], 4).sums(weights)
    np.testing.assert_array_equal(metrics.merge_sums(parts), whole)


def test_weights_count_impressions_as_often_as_they_say(sample):
    weights = np.random.default_rng(4).integers(0, 4, COUNT)
    repeated = np.repeat(np.arange(COUNT), weights)
    own = Impressions(sample["label"], sample["score"], ONE, parts={"kind": (sample["part"], 4)},
                      groups={"gauc": sample["user"]}, weights=weights.astype(np.float32))  # fmt: skip
    found, expected = (
        one.compute() for one in (own, impressions({k: v[repeated] for k, v in sample.items()}))
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)
    assert own.calibration()["ratio"] == pytest.approx(found["calibration_ratio"])
