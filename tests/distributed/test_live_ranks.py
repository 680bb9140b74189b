"""Live tables on two ranks: what they hold is compared, and older checkpoints are loaded."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.live import check_ranks, table_state, update_items
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.sharded.state_keys import frozen_keys
from mim_torchrec.embeddings.table.format import Table, TableError
from tests.frozen import DIM, FEATURES, IDS, Unpooled, shard, write_table
from tests.ranks import run_ranks


class Newer(nn.Module):
    """A model to which frozen tables were added."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)])
        self.pooled = FrozenEmbeddingBagCollection([frozen_bag_config(table, FEATURES, "pooled")])
        self.dense = nn.Linear(DIM, 1)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_table(tmp_path / "table")


def _a_rank_that_skips_a_window_is_noticed(path: Path) -> None:
    table, rank = open_table(path), dist.get_rank()
    for store_rows in (False, True):
        model, index = shard(Unpooled(table, store_rows=store_rows)), ItemIndex.of(table)
        load_table(model, table)
        vectors = torch.ones(1, DIM)
        update_items(model, index, IDS[:1], vectors, table_version="v1", seq=1)
        check_ranks(model)
        if rank == 0:
            update_items(model, index, torch.tensor([1000]), vectors, table_version="v1", seq=2)
        with pytest.raises(
            TableError, match=r"mm: rank 1 .* up to 1 with 0 new .* rank 0 .* up to 2 with 1 new"
        ):
            check_ranks(model)
        if store_rows:
            with pytest.raises(TableError, match="mm: rank 1 .* up to 1"):
                model.state_dict()
        # the same windows by number, of different items
        update_items(model, index, torch.tensor([999 + rank]), vectors, table_version="v1", seq=3)
        with pytest.raises(TableError, match="rank 1 .* up to 3 with 1 new .* rank 0 .* up to 3 with"):
            check_ranks(model)


def _a_checkpoint_from_before_the_table_is_loaded(path: Path, checkpoint: Path) -> None:
    table = open_table(path)
    older, model = nn.Module(), Newer(table)
    older.dense = nn.Linear(DIM, 1)
    for parameter in older.parameters():
        nn.init.constant_(parameter, 0.5)
    dcp.save({"model": older.state_dict()}, checkpoint_id=str(checkpoint))
    model = shard(model)
    for name in ("mm", "pooled"):
        load_table(model, table, name)
    state = model.state_dict()
    assert sorted(frozen_keys(model)) == ["mm._extra_state", "pooled._extra_state"]
    own = {key: state.pop(key) for key in frozen_keys(model)}
    dcp.load({"model": state}, checkpoint_id=str(checkpoint))
    model.load_state_dict({**state, **own})
    assert (model.state_dict()["dense.weight"] == 0.5).all()
    missing = model.load_state_dict({f"{name}": value for name, value in older.state_dict().items()})
    assert missing.missing_keys == []
    assert table_state(model).table_version == "v1"


def test_a_rank_that_skips_a_window_is_noticed_at_a_checkpoint(path):
    run_ranks(_a_rank_that_skips_a_window_is_noticed, 2, path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_from_before_the_table_is_loaded(path, tmp_path, world_size):
    run_ranks(_a_checkpoint_from_before_the_table_is_loaded, world_size, path, tmp_path / "saved")
