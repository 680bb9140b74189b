"""``output_dtype`` of both frozen collections: unsharded, and on 1 and 2 gloo ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.load import load_table
from mim_torchrec.embeddings.sharded.sharded import VectorsBack
from mim_torchrec.embeddings.table.format import DTYPES, Table
from tests.distributed.test_frozen_exchange import FEATURES, batch, shard, whole, write_table
from tests.ranks import run_ranks

DTYPE_NAMES = ("float16", "bfloat16", "float32")


class Both(nn.Module):
    def __init__(self, table: Table, output_dtype: torch.dtype, device: str = "meta") -> None:
        super().__init__()
        self.pooled = FrozenEmbeddingBagCollection(
            [frozen_bag_config(table, FEATURES, "pooled")], device=device, output_dtype=output_dtype
        )
        self.each = FrozenEmbeddingCollection(
            [frozen_config(table, FEATURES, "each")], device=device, output_dtype=output_dtype
        )

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, dict[str, Tensor]]:
        pooled, each = self.pooled(features), self.each(features)
        return pooled.values(), {key: each[key].values() for key in FEATURES}


def expected_sums(table: Table, features: KeyedJaggedTensor) -> Tensor:
    """(batch_size, 2 x dim) float32, bag by bag."""
    rows = whole(table)
    bags = [
        torch.stack([rows[own].sum(0) for own in each.values().split(each.lengths().tolist())])
        for each in (features[key] for key in FEATURES)
    ]
    return torch.cat(bags, dim=1)


def look_up(path: Path, name: str) -> list[torch.dtype]:
    """Compare two steps of a sharded model with plain sums; returns the types in which rows travelled."""
    table, dtype = Table.open(path), DTYPES[name]
    model = shard(Both(table, dtype))
    for each in ("pooled", "each"):
        load_table(model, table, name=each)
    sent: list[torch.dtype] = []
    make = VectorsBack.__init__

    def recorded(self: VectorsBack, stored: Tensor, *rest: object) -> None:
        sent.append(stored.dtype)
        make(self, stored, *rest)

    VectorsBack.__init__ = recorded
    for step in (0, 2):
        features = batch(step, 1 + table.manifest.capacity)
        pooled, each = model(features)
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled, expected_sums(table, features).to(dtype))
        for key in FEATURES:
            assert torch.equal(each[key], whole(table)[features[key].values()].to(dtype))
    return sent


@pytest.mark.parametrize("name", DTYPE_NAMES)
@pytest.mark.parametrize("stored", ["int8", "float16"])
def test_two_ranks_give_output_dtype_and_exchange_rows_as_stored(tmp_path, name, stored):
    path = write_table(tmp_path / "table", dtype=stored)
    run_ranks(look_up, 1, path, name)
    for sent in run_ranks(look_up, 2, path, name):
        assert sent and set(sent) == {DTYPES[stored]}


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_a_bag_collection_that_is_not_sharded_gives_output_dtype(tmp_path, name):
    table, dtype = Table.open(write_table(tmp_path / "table")), DTYPES[name]
    model = Both(table, dtype, device="cpu")
    for each in ("pooled", "each"):
        load_table(model, table, name=each)
    features = KeyedJaggedTensor(FEATURES, torch.tensor([3, 3, 5, 1]), lengths=torch.tensor([2, 0, 1, 1]))
    pooled, each = model(features)
    assert pooled.dtype == dtype and each["candidate"].dtype == dtype
    torch.testing.assert_close(pooled, expected_sums(table, features).to(dtype))


def test_weights_get_a_gradient_through_another_output_dtype(tmp_path):
    table = Table.open(write_table(tmp_path / "table"))
    module = FrozenEmbeddingBagCollection(
        [frozen_bag_config(table, FEATURES)], is_weighted=True, device="cpu", output_dtype=torch.bfloat16
    )
    load_table(module, table)
    weights = torch.tensor([0.5, 2.0, 1.0, 1.0], requires_grad=True)
    features = KeyedJaggedTensor(
        FEATURES, torch.tensor([3, 4, 5, 1]), weights, lengths=torch.tensor([2, 0, 1, 1])
    )
    module(features).values().float().sum().backward()
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, whole(table)[features.values()].sum(1))
