"""Frozen collections on 1 and on 2 ranks against plain indexing: unpooled, pooled, mapped, trained around."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    DATA_TYPES,
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
from mim_torchrec.embeddings.table.format import DTYPES, Table
from tests.frozen import DIM, FEATURES, ITEMS, Unpooled, batch, shard, whole, write_tables
from tests.ranks import run_ranks


class Pooled(nn.Module):
    def __init__(self, configs: list[EmbeddingBagConfig], is_weighted: bool = False) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingBagCollection(configs, is_weighted=is_weighted)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.mm(features)


def weighted(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    weights = torch.rand(features.values().numel(), generator=torch.Generator().manual_seed(1))
    return KeyedJaggedTensor(
        features.keys(), features.values(), weights.requires_grad_(), lengths=features.lengths()
    )


def naive_pool(vectors: Tensor, features: KeyedJaggedTensor, mode: str) -> Tensor:
    """(num_requests, 2 * DIM), a loop over bags."""
    out = []
    weights = features.weights_or_none()
    start = 0
    for length in features.lengths().tolist():
        rows = range(start, start + length)
        total = torch.zeros(DIM)
        for at in rows:
            scale = 1.0 if weights is None else weights[at]
            total = total + scale * vectors[features.values()[at]]
        out.append(total / length if mode == "mean" and length else total)
        start += length
    return torch.cat(torch.stack(out).chunk(2), dim=1)


def _lookups_are_the_vectors(path: Path, dtype: str) -> None:
    table = open_table(path)
    for mapped in (False, True):
        model = shard(Unpooled(table))
        load_table(model, table, mapped=mapped)
        for step in range(4):
            features = batch(step, 1 + ITEMS + 3)
            found = model(features)
            for key in FEATURES:
                assert torch.equal(found[key], whole(table)[features[key].values()]), (mapped, step, key)
                assert found[key].dtype == torch.float32 and not found[key].requires_grad


def _pooled_lookups_are_the_sums(path: Path, pooling: PoolingType, is_weighted: bool) -> None:
    table = open_table(path)
    model = shard(Pooled([frozen_bag_config(table, FEATURES, pooling=pooling)], is_weighted))
    load_table(model, table)
    for step in range(4):
        features = batch(step, 1 + ITEMS)
        features = weighted(features) if is_weighted else features
        found = model(features).values()
        expected = naive_pool(whole(table), features, pooling.name.lower())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        if is_weighted and features.weights().numel():
            slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
            gradients = [
                torch.autograd.grad((out * slope).sum(), features.weights(), retain_graph=True)[0]
                for out in (found, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def _tables_of_other_types_and_dims_stand_beside_each_other(folder: Path) -> None:
    tables = {"mm": open_table(folder / "float16"), "other": open_table(folder / "int8")}
    configs = [
        frozen_bag_config(tables["mm"], ["candidate"], "mm"),
        frozen_bag_config(tables["other"], ["candidate", "behavior"], "other"),
        EmbeddingBagConfig(name="narrow", num_embeddings=30, embedding_dim=4, feature_names=["behavior"]),
    ]
    model = shard(Pooled(configs))
    for name, table in tables.items():
        load_table(model, table, name)
    features = batch(0, ITEMS)
    found = model(features).to_dict()
    assert list(found) == ["candidate@mm", "candidate@other", "behavior@other", "behavior@narrow"]
    for name, table in tables.items():
        expected = naive_pool(whole(table), features, "sum")[:, :DIM]
        torch.testing.assert_close(found[f"candidate@{name}"], expected, rtol=1e-5, atol=1e-6)
    assert found["behavior@narrow"].shape == (features.stride(), 4)


def _only_distinct_rows_cross_in_their_own_type(path: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table))
    load_table(model, table)
    rows = torch.tensor([1, 1, 25, 25, 25, 2])
    features = KeyedJaggedTensor(FEATURES, rows, lengths=torch.tensor([3, 3]))
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(output, input, *args, **options):
        if input.dtype == torch.uint8:
            sent.append(input.numel())
        return exchange(output, input, *args, **options)

    dist.all_to_all_single = counted
    try:
        list(model(features).values())
    finally:
        dist.all_to_all_single = exchange
    owned = (2, 1)[dist.get_rank()]  # distinct rows of this rank, asked for by both
    assert sent == [2 * owned * table.manifest.row_bytes]


def _a_row_that_is_not_there_is_refused(path: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table))
    load_table(model, table)
    for row in (-1, 1 + ITEMS + 3):
        features = KeyedJaggedTensor(FEATURES, torch.tensor([0, row]), lengths=torch.tensor([1, 1]))
        with pytest.raises(IndexError, match=f"mm: row {row} is not within 0:27"):
            model(features)


class Scored(nn.Module):
    """A frozen table in a model that is trained."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)])
        self.pooled = FrozenEmbeddingBagCollection([frozen_bag_config(table, FEATURES, "pooled")])
        self.dense = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        found, pooled = self.mm(features), self.pooled(features)
        logits = self.dense(torch.cat([found[key].values() for key in FEATURES])).sum()
        loss = (logits + self.dense(pooled["behavior"]).sum() - 1.0) ** 2 / 100
        return loss, loss.detach()


def _pipelines_give_the_losses_of_a_plain_loop(path: Path) -> None:
    table = open_table(path)

    def losses(pipeline) -> tuple[list[float], str]:
        torch.manual_seed(0)
        model = shard(Scored(table))
        for name in ("mm", "pooled"):
            load_table(model, table, name)
        before = [table_digest(model, name) for name in ("mm", "pooled")]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        batches = iter([batch(step, 1 + ITEMS) for step in range(5)])
        if pipeline is None:
            found = []
            for features in batches:
                loss, seen = model(features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(float(seen))
        else:
            steps = pipeline(model, optimizer, torch.device("cpu"))
            found = [float(steps.progress(batches)) for _ in range(5)]
        assert [table_digest(model, name) for name in ("mm", "pooled")] == before
        return found

    plain = losses(None)
    assert len(set(plain)) == 5
    for pipeline in (TrainPipelineBase, TrainPipelineSparseDist):
        assert losses(pipeline) == pytest.approx(plain, rel=1e-5)


def _all(claims: list[tuple]) -> None:
    """Try several claims in one world: starting one costs more than they do."""
    for claim, *args in claims:
        try:
            claim(*args)
        except BaseException as error:
            error.add_note(f"claim {claim.__name__}{args}")
            raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_lookups_are_the_vectors_in_every_storage_type_loaded_or_mapped(folder, world_size):
    run_ranks(_all, world_size, [(_lookups_are_the_vectors, folder / dtype, dtype) for dtype in DATA_TYPES])


@pytest.mark.parametrize("world_size", [1, 2])
def test_pooled_lookups_are_the_sums_and_weights_get_gradients(folder, world_size):
    kinds = [(PoolingType.SUM, False), (PoolingType.MEAN, False), (PoolingType.SUM, True)]
    claims = [(_pooled_lookups_are_the_sums, folder / dtype, *kind) for dtype in DTYPES for kind in kinds]
    run_ranks(_all, world_size, claims)


@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_of_other_types_and_dims_stand_beside_each_other(folder, world_size):
    run_ranks(_tables_of_other_types_and_dims_stand_beside_each_other, world_size, folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_distinct_rows_cross_in_their_own_type(folder, dtype):
    run_ranks(_only_distinct_rows_cross_in_their_own_type, 2, folder / dtype)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_row_that_is_not_there_is_refused_and_not_remapped(folder, world_size):
    run_ranks(_a_row_that_is_not_there_is_refused, world_size, folder / "float16")


@pytest.mark.parametrize("world_size", [1, 2])
def test_pipelines_give_the_losses_of_a_plain_loop(folder, world_size):
    run_ranks(_pipelines_give_the_losses_of_a_plain_loop, world_size, folder / "float16")
