"""The normalization at the entry of the tower keeps what shrinkage has done to ids: `--keep-shrinkage`."""

import numpy as np
import pytest
import torch

from mim_torchrec.ctr.dense import DeepCTR
from mim_torchrec.ctr.shrinkage import change_scale, input_scale, scale_of, set_scale
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.dense.folding import fold_batch_norms
from mim_torchrec.training.batch_norm import ScaledBatchNorm1d
from tests.unit.test_normalize_ids import DIM, MM_DIM, SIZES, build, score

KEPT = {"normalize_ids": True, "keep_shrinkage": True, "id_shrinkage": 4.0}


def vocabularies() -> dict[str, Vocabulary]:
    """Row k was shown k times; categories are not shrunk."""
    return {
        name: Vocabulary(torch.arange(1, n), n, torch.arange(n), 0.0 if name == "category" else 4.0)
        for name, n in SIZES.items()
    }


@pytest.mark.parametrize("ubm", ["din", "sim"])
def test_columns_are_as_small_as_the_tables_they_depend_on(tmp_path, ubm):
    shown = {
        name: np.sqrt(sum(k * (k / (k + 4)) ** 2 for k in range(n)) / sum(range(n)))
        for name, n in SIZES.items()
    }
    shown["category"] = 1.0
    item, brand, numbers = shown["item_id"], shown["candidate_brand"], 1.0
    model = build(tmp_path, ubm, **KEPT)
    both = [item] * DIM + [1.0] * DIM
    interest = both if ubm == "din" else [np.sqrt((item**2 + 1) / 2)] * model.ciubm.ubm.out_dim
    expected = [
        *[shown["user_id"]] * DIM, *[shown["tags"]] * DIM, *both, *[brand] * DIM, numbers, numbers,
        *[np.sqrt((item**4 + 1) / 2)] * 2, numbers,
        *interest, *[numbers] * MM_DIM, *both, *[numbers] * (model.ciubm.similarity_dim + 1),
    ]  # fmt: skip
    found = input_scale(model, vocabularies())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    set_scale(model, found)
    assert all(tower.layers[0].scale.equal(found) for tower in (model.tower, model.second_tower))
    assert scale_of(model).equal(found)
    score(model.train())  # the sizes fit


@pytest.mark.parametrize("training", [True, False])
def test_features_are_normalized_and_multiplied_as_in_a_loop(training):
    torch.manual_seed(0)
    norm = ScaledBatchNorm1d(3).train(training)
    norm.scale.copy_(torch.tensor([1.0, 0.25, 0.0]))
    mean = norm.running_mean.copy_(torch.randn(3)).clone()
    var = norm.running_var.copy_(torch.rand(3) + 0.5).clone()
    x = torch.randn(6, 3) * 3 + 1
    if training:
        mean, var = x.mean(0), x.var(0, correction=0)
    columns = zip(x.T, mean, var, norm.scale.clone(), strict=True)
    expected = [s * (column - m) / (d + norm.eps).sqrt() for column, m, d, s in columns]
    torch.testing.assert_close(norm(x), torch.stack(expected, dim=1))


def towers(model) -> list[DeepCTR]:
    torch.manual_seed(0)
    for tower in (model.tower, model.second_tower):
        for name, value in tower.state_dict().items():
            if value.is_floating_point() and "scale" not in name:
                value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    return [model.tower.eval(), model.second_tower.eval()]


@torch.no_grad()
def test_other_scales_leave_a_trained_tower_the_same_function_and_so_does_folding(tmp_path):
    model = build(tmp_path, **KEPT)
    width = len(scale_of(model))
    set_scale(model, torch.rand(width) + 0.5)
    both, x = towers(model), torch.randn(7, width)
    before = [tower(x) for tower in both]
    change_scale(model, torch.rand(width) + 0.5)
    for tower, expected in zip(both, before, strict=True):
        torch.testing.assert_close(tower(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fold_batch_norms(tower)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words", [{"id_shrinkage": 0.0}, {"normalize_ids": False}, {"batch_norm": False}], ids=str
)
def test_there_must_be_a_shrinkage_that_is_undone(tmp_path, words):
    with pytest.raises(OptionError, match="--keep-shrinkage .* needs --id-shrinkage"):
        build(tmp_path, **KEPT | words)
