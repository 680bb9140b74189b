"""Batch normalization at the entry of the tower that leaves what comes of ID embeddings as it is."""

from types import SimpleNamespace

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from mim_torchrec.ciubm.ubm.registry import find_model
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.dense import DeepCTR, Prediction
from mim_torchrec.ctr.model import CTRModel
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.dense.folding import fold_batch_norms
from mim_torchrec.training.batch_norm import PartialBatchNorm1d

DIM, MM_DIM, CANDIDATES, BEHAVIORS = 4, 6, [3, 2, 4], [5, 1, 7]
IDS = ("item_id", "category")
SIZES = {"user_id": 5, "item_id": 9, "category": 3, "candidate_brand": 3, "tags": 4}


def build(folder, ubm: str = "din", **words) -> CTRModel:
    mm = EmbeddingConfig(name="mm", embedding_dim=MM_DIM, num_embeddings=9,
                         feature_names=["candidate_mm", "behavior_mm"])  # fmt: skip
    config = CTRConfig(
        data=folder, out=folder, ubm=ubm, ubm_options=find_model(ubm)(), recency="order", embedding_dim=DIM,
        tower=(8, 5), sparse_features=("candidate_brand", "tags"), dense_features=("age", "candidate_price"),
        similarity_interest=True, second_label="purchase", seed=1,
        **{"dot_product_features": True, "normalize_ids": False, **words},
    )  # fmt: skip
    return build_model(config, SIZES, mm, torch.device("meta"))


def score(model: CTRModel) -> tuple[Prediction, list[torch.Tensor]]:
    """What the model says of random rows, and those of the rows that are embeddings of ids."""
    torch.manual_seed(0)
    lengths = torch.tensor([CANDIDATES, BEHAVIORS])
    counts = dict(zip(("candidate", "behavior"), lengths.sum(1).tolist(), strict=True))
    keys = [f"{role}_{name}" for name in IDS for role in counts]
    values = torch.cat([torch.arange(counts[role]) % 3 for _ in IDS for role in counts])
    batch = SimpleNamespace(
        sparse=KeyedJaggedTensor(keys=keys, values=values, lengths=lengths.repeat(2, 1).view(-1)),
        request_ts=None, behavior_ts=None, request_dense=torch.randn(len(CANDIDATES), 1),
        candidate_dense=torch.randn(counts["candidate"], 1), behavior_dense=None,
    )  # fmt: skip
    of_requests = torch.randn(len(CANDIDATES), 2 * DIM, requires_grad=True)
    rows, vectors = {}, {}
    for (role, count), own in zip(counts.items(), lengths, strict=True):
        for name in IDS:
            rows[f"{role}_{name}"] = torch.randn(count, DIM, requires_grad=True)
        vectors[f"{role}_mm"] = JaggedTensor(torch.randn(count, MM_DIM), lengths=own)
    rows["candidate_brand"] = torch.randn(counts["candidate"], DIM, requires_grad=True)
    of_ids = [of_requests, *rows.values()]
    jagged = {name: JaggedTensor(one, lengths=lengths[int(name.startswith("behavior"))])
              for name, one in rows.items()}  # fmt: skip
    pooled = KeyedTensor(["user_id", "tags"], [DIM, DIM], of_requests)
    return model.score(batch, pooled, jagged, vectors), of_ids


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("ubm", ["avg_pooling", "din", "dien", "bst", "sim", "twin"])
def test_what_depends_on_embeddings_of_ids_passes_and_all_else_is_normalized(tmp_path, ubm, products):
    model, given = build(tmp_path, ubm, dot_product_features=products).train(), []
    model.tower.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    _, of_ids = score(model)
    entry = model.tower.layers[0]
    assert isinstance(entry, PartialBatchNorm1d)
    for column, is_normalized in enumerate(entry.normalized.tolist()):
        total = given[0][:, column].square().sum()
        grads = torch.autograd.grad(total, of_ids, retain_graph=True, allow_unused=True) if (
            total.requires_grad
        ) else []  # fmt: skip
        depends = any(grad is not None and bool(grad.any()) for grad in grads)
        assert depends != is_normalized, column
    assert model.second_tower.layers[0].normalized.equal(entry.normalized)


def test_switched_off_interests_leave_no_columns(tmp_path):
    for words in ({"id_interest": False}, {"content_interest": False}, {"fusion_interest": False}):
        score(build(tmp_path, **words).train())  # the sizes fit


@pytest.mark.parametrize("training", [True, False])
def test_some_features_are_normalized_as_in_a_loop(training):
    torch.manual_seed(0)
    norm = PartialBatchNorm1d(torch.tensor([True, False, True])).train(training)
    norm.running_mean.copy_(torch.randn(3))
    norm.running_var.copy_(torch.rand(3) + 0.5)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(6, 3) * 3 + 1
    found = norm(x)
    for k, column in enumerate(x.T):
        if training:
            mean[k], var[k] = column.mean(), column.var(correction=0)
        expected = column if k == 1 else (column - mean[k]) / (var[k] + norm.eps).sqrt()
        torch.testing.assert_close(found[:, k], expected)
    assert "normalized" not in norm.state_dict()


def test_a_folded_tower_is_the_same_function():
    torch.manual_seed(0)
    tower = DeepCTR(6, (5, 4), True, 0.1, torch.tensor([True, False, True, True, False, False])).eval()
    for name, value in tower.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    x = torch.randn(7, 6)
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norms(tower)(x), tower(x), rtol=1e-4, atol=1e-4)


def test_by_default_everything_is_normalized_and_weights_begin_alike(tmp_path):
    plain, raw = build(tmp_path, normalize_ids=True), build(tmp_path)
    assert not isinstance(plain.tower.layers[0], PartialBatchNorm1d)
    assert list(plain.state_dict()) == list(raw.state_dict())
    for (name, value), other in zip(plain.named_parameters(), raw.parameters(), strict=True):
        assert value.is_meta or torch.equal(value, other), name


def test_without_batch_normalization_there_is_nothing_to_leave_ids_out_of(tmp_path):
    build(tmp_path, normalize_ids=True, batch_norm=False)
    with pytest.raises(OptionError, match="--normalize-ids False .* --batch-norm False .* leave one of"):
        build(tmp_path, batch_norm=False)
