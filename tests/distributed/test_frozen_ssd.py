"""Rows on an SSD in sharded models: the vectors of rows in memory, read a step ahead by a pipeline."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.ssd import SsdRows
from mim_torchrec.embeddings.table.format import DTYPES, Table
from tests.frozen import FEATURES, ITEMS, Unpooled, batch, shard, whole, write_tables
from tests.ranks import run_ranks

CACHE_BYTES = 600  # of a set or a few; the table has more rows than that


class Scored(nn.Module):
    """A model that a pipeline trains, with the rows of its lookups behind a cache."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)])
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        found = self.mm(features)
        loss = self.weight * sum(found[key].values().square().sum() for key in FEATURES)
        return loss, loss.detach()


def _lookups_are_the_vectors(folder: Path) -> None:
    for dtype in DTYPES:
        table = open_table(folder / dtype)
        model, in_memory = shard(Unpooled(table)), shard(Unpooled(table))
        load_table(model, table, mapped=True, cache_bytes=CACHE_BYTES)
        load_table(in_memory, table)
        for step in range(6):
            features = batch(step, 1 + ITEMS)
            found = model(features)
            for key in FEATURES:
                assert torch.equal(found[key], whole(table)[features[key].values()]), (dtype, step, key)
        assert table_digest(model) == table_digest(in_memory)


def _a_pipeline_reads_the_rows_of_the_next_step(path: Path) -> None:
    table = open_table(path)
    model = shard(Scored(table))
    load_table(model, table, mapped=True, cache_bytes=1 << 20)
    store = find_frozen(model, "mm")[1].store
    assert isinstance(store, SsdRows)
    batches = [batch(step, 1 + ITEMS) for step in range(4)]
    pipeline = TrainPipelineSparseDist(
        model, torch.optim.SGD(model.parameters(), lr=0.0), torch.device("cpu")
    )
    steps = iter(batches)
    losses = [float(pipeline.progress(steps)) for _ in range(4)]
    expected = [float(sum(whole(table)[f[key].values()].square().sum() for key in FEATURES)) for f in batches]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert store.misses == 0  # the cache was empty: all rows were there before their lookup
    assert store.rows_read == torch.cat([features.values() for features in batches]).unique().numel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_lookups_are_the_vectors_of_rows_in_memory(folder, world_size):
    run_ranks(_lookups_are_the_vectors, world_size, folder)


def test_a_pipeline_reads_the_rows_of_the_next_step(folder):
    run_ranks(_a_pipeline_reads_the_rows_of_the_next_step, 1, folder / "float16")
