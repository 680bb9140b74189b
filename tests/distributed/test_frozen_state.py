"""Frozen collections on 1 and on 2 ranks: updates, windows and checkpoints against plain indexing."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.live import (
    ItemIndex,
    apply_window,
    delete_items,
    table_state,
    update_items,
)
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table
from mim_torchrec.embeddings.sharded.rows import MappedRows
from mim_torchrec.embeddings.table.format import Table, TableError, VersionMismatch
from mim_torchrec.embeddings.windows.log import WindowLog
from tests.frozen import DIM, FEATURES, IDS, ITEMS, Unpooled, batch, shard, whole, write_tables
from tests.ranks import RankError, run_ranks


def _updates_are_seen_by_the_next_lookup(path: Path) -> None:
    table = open_table(path)
    for mapped in (False, True):
        model, index = shard(Unpooled(table)), ItemIndex.of(table)
        load_table(model, table, mapped=mapped)
        ids = torch.tensor([1000, int(IDS[0]), int(IDS[-1]), 999])
        vectors = torch.arange(4 * DIM).view(4, DIM) / 8
        written = update_items(model, index, ids, vectors, table_version="v1", seq=1).rows
        total = torch.tensor(written)
        dist.all_reduce(total)
        assert int(total) == 4
        rows = index.rows(ids)
        features = KeyedJaggedTensor(FEATURES, rows, lengths=torch.tensor([3, 1]))
        found = model(features)
        assert torch.equal(torch.cat([found[key] for key in FEATURES]), vectors)
        delete_items(model, index, ids[:1], table_version="v1", seq=2)
        assert index.rows(ids[:1]).tolist() == [0]
        found = model(features)  # mapped before the window: the row is zero
        assert torch.equal(found["candidate"], vectors[:3] * torch.tensor([[0.0], [1.0], [1.0]]))
        if mapped:
            assert isinstance(find_frozen(model, "mm")[1].store, MappedRows)
            assert torch.equal(whole(Table.open(path)), whole(table))  # the files are as they were


def _windows_of_a_log_are_seen_by_the_next_lookup(path: Path, log: Path) -> None:
    table = open_table(path)
    model, index = shard(Unpooled(table)), ItemIndex.of(table)
    load_table(model, table)
    windows = list(WindowLog(log, "v1", start=0).after(0))
    rows = []
    for window in [*windows, *windows]:  # delivered twice
        report = apply_window(model, index, window)
        rows += [0 if report is None else report.rows]
    total = torch.tensor(rows)
    dist.all_reduce(total)
    assert total.tolist() == [3, 2, 0, 0]
    mapped = index.rows(torch.tensor([1000, 999, int(IDS[0]), int(IDS[5])]))
    features = KeyedJaggedTensor(FEATURES, mapped, lengths=torch.tensor([3, 1]))
    found = model(features)
    expected = torch.stack([torch.full((DIM,), value) for value in (4.0, 0.0, 1.0)])
    torch.testing.assert_close(found["candidate"].float(), expected)
    torch.testing.assert_close(found["behavior"].float(), table.read_float(IDS[5:6]))
    assert table_state(model).seq == 2


def _a_checkpoint_knows_its_vectors(folder: Path) -> None:
    table, other = open_table(folder / "float16"), open_table(folder / "v2")
    model = shard(Unpooled(table))
    load_table(model, table)
    state = model.state_dict()
    assert state == {"mm._extra_state": '{"mm": ["v1", 0]}'}
    model.load_state_dict(state)
    fresh = shard(Unpooled(table))
    fresh.load_state_dict(state)
    with pytest.raises(VersionMismatch, match="rows are of table_version v2, the checkpoint .* v1"):
        load_table(fresh, other)
    load_table(fresh, table)
    changed = shard(Unpooled(other))
    load_table(changed, other)
    with pytest.raises(VersionMismatch, match="rows are of table_version v2, the checkpoint .* v1"):
        changed.load_state_dict(state)


def _save(path: Path, checkpoint: Path) -> None:
    table = open_table(path)
    model, index = shard(Unpooled(table, store_rows=True)), ItemIndex.of(table)
    load_table(model, table)
    update_items(model, index, IDS[:2], torch.ones(2, DIM), table_version="v1", seq=5)
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(checkpoint))


def _restore(path: Path, checkpoint: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table, store_rows=True))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(checkpoint))
    model.load_state_dict(state["model"])
    vectors = whole(table)
    vectors[1:3] = 1.0
    features = batch(0, 1 + ITEMS)
    found = model(features)
    for key in FEATURES:
        assert torch.equal(found[key], vectors[features[key].values()])
    frozen = find_frozen(model, "mm")[1]
    assert (frozen.state.table_version, frozen.state.seq) == ("v1", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_are_seen_by_the_next_lookup_on_every_rank(folder, world_size):
    run_ranks(_updates_are_seen_by_the_next_lookup, world_size, folder / "float16")


@pytest.mark.parametrize("world_size", [1, 2])
def test_windows_of_a_log_are_seen_by_the_next_lookup_on_every_rank(folder, tmp_path, world_size):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    ids = torch.tensor([int(IDS[0]), 1000, 999])
    log.append("first", ids, torch.arange(1.0, 4.0)[:, None].expand(-1, DIM))
    log.append("second", ids[1:2], torch.full((1, DIM), 4.0), removed=ids[2:])
    run_ranks(_windows_of_a_log_are_seen_by_the_next_lookup, world_size, folder / "float16", tmp_path / "log")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_knows_its_vectors_and_refuses_others(folder, world_size):
    run_ranks(_a_checkpoint_knows_its_vectors, world_size, folder)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (1, 2)])
def test_rows_that_are_stored_are_restored_on_other_ranks(folder, tmp_path, saved, loaded, dtype):
    run_ranks(_save, saved, folder / dtype, tmp_path / "checkpoint")
    run_ranks(_restore, loaded, folder / dtype, tmp_path / "checkpoint")


def _mapped_rows_are_not_stored(path: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table, store_rows=True))
    load_table(model, table, mapped=True)
    model.state_dict()


def test_mapped_rows_are_not_stored_in_checkpoints(folder):
    with pytest.raises(RankError, match=f"{TableError.__name__}: .*use store_rows=False"):
        run_ranks(_mapped_rows_are_not_stored, 1, folder / "float16")
