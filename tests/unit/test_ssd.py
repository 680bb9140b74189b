"""Rows on an SSD: what the cache keeps, what is read from files, and that prefetching reads ahead."""

import threading

import pytest
import torch

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.live import ItemIndex, update_items
from mim_torchrec.embeddings.sharded.load import load_table, table_digest
from mim_torchrec.embeddings.sharded.rows import MappedRows
from mim_torchrec.embeddings.sharded.ssd import WAYS, SsdRows
from mim_torchrec.embeddings.table.format import Table, TableError, TableWriter
from mim_torchrec.embeddings.table.quantize import row_bytes

ROWS, DIM = 200, 8


class Backing(MappedRows):
    """Says which rows were read from it, and waits for ``gate`` before it gives them."""

    def __init__(self, stored: torch.Tensor) -> None:
        super().__init__("float32", ROWS, DIM, [(0, stored)])
        self.read: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.gate.wait()
        self.read += rows.tolist()
        return super().gather(rows)


@pytest.fixture
def stored():
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backing(stored):
    return Backing(stored.clone())


def behind(backing, sets):
    return SsdRows(backing, sets * WAYS * (row_bytes("float32", DIM) + 8))


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def test_a_row_is_read_once_however_often_it_is_asked_for(backing):
    store = behind(backing, sets=4)
    for _ in range(3):
        store.gather(tensor(5, 9, 5, 5))
    assert sorted(backing.read) == [5, 9]
    assert (store.hits, store.misses, store.rows_read) == (8, 4, 2)


def test_the_row_used_longest_ago_makes_room(backing):
    store = behind(backing, sets=1)
    for row in range(WAYS):
        store.gather(tensor(row))
    store.gather(tensor(0))
    store.gather(tensor(100))  # takes the place of row 1
    backing.read.clear()
    store.gather(tensor(0, 2, 3, 4, 5, 6, 7, 100))
    assert backing.read == []
    store.gather(tensor(1))
    assert backing.read == [1]


def test_more_rows_of_a_set_than_it_has_slots_are_all_found(backing, stored):
    store = behind(backing, sets=2)
    rows = torch.arange(0, ROWS, 2)
    for _ in range(2):
        assert torch.equal(store.gather(rows), stored[rows])
    assert store.rows_read >= 2 * rows.numel() - WAYS


def test_random_lookups_prefetches_and_writes_give_the_rows_of_a_tensor(backing, stored):
    store, generator = behind(backing, sets=3), torch.Generator().manual_seed(1)
    batches = [torch.randint(0, ROWS, (30,), generator=generator) ** 2 // ROWS for _ in range(60)]
    for step, rows in enumerate(batches[:-1]):
        store.prefetch(batches[step + 1])
        assert torch.equal(store.gather(rows), stored[rows])
        if step % 7 == 0:
            new = rows.unique()[:4]
            stored[new] = float(step)
            store.write(new, stored[new])
    assert torch.equal(torch.cat(list(store.blocks())), stored)


def test_a_prefetch_returns_before_rows_are_read_and_the_lookup_waits_for_it(backing, stored):
    store = behind(backing, sets=4)
    backing.gate.clear()
    store.prefetch(tensor(3, 4, 3))
    assert backing.read == []
    backing.gate.set()
    assert torch.equal(store.gather(tensor(4, 3)), stored[[4, 3]])
    assert sorted(backing.read) == [3, 4]
    assert (store.hits, store.misses) == (2, 0)


def test_a_lookup_waits_for_the_last_of_several_prefetches(backing, stored):
    store = behind(backing, sets=8)
    backing.gate.clear()
    for first in (0, 10, 20):
        store.prefetch(torch.arange(first, first + 10))
    backing.gate.set()
    assert torch.equal(store.gather(torch.arange(5, 25)), stored[5:25])
    assert sorted(backing.read) == [*range(30)] and store.misses == 0


def test_a_lookup_does_not_wait_for_a_prefetch_of_other_rows(backing, stored):
    store = behind(backing, sets=4)
    store.gather(tensor(1, 2))
    backing.gate.clear()
    store.prefetch(tensor(50))
    assert torch.equal(store.gather(tensor(2, 1)), stored[[2, 1]])
    backing.gate.set()
    assert torch.equal(store.gather(tensor(50)), stored[[50]])


def test_rows_that_are_written_replace_those_in_the_cache_and_those_on_the_way(backing, stored):
    store = behind(backing, sets=4)
    store.gather(tensor(1))
    store.prefetch(tensor(2))
    store.write(tensor(1, 2, 3), torch.ones(3, DIM))
    assert torch.equal(store.gather(tensor(1, 2, 3)), torch.ones(3, DIM))


def test_an_error_of_a_prefetch_is_raised_by_the_lookup(backing, stored, monkeypatch):
    store = behind(backing, sets=4)

    def fail(rows):
        raise OSError("the disk is gone")

    monkeypatch.setattr(backing, "gather", fail)
    store.prefetch(tensor(7))
    with pytest.raises(OSError, match="the disk is gone"):
        store.gather(tensor(7))
    monkeypatch.undo()
    assert torch.equal(store.gather(tensor(7)), stored[[7]])


def test_a_cache_that_holds_nothing_is_refused(backing):
    with pytest.raises(ValueError, match="a cache needs 320 bytes or more, found 319"):
        SsdRows(backing, 319)
    assert SsdRows(backing, 1 << 20).cache_bytes == ROWS * 40  # no more slots than rows


@pytest.fixture
def table(tmp_path, stored):
    writer = TableWriter(
        tmp_path / "t", table_version="v1", dim=DIM, dtype="float16", encoder={}, spare_rows=5
    )
    writer.write_shard(torch.arange(ROWS) + 1000, stored)
    writer.finish()
    return Table.open(tmp_path / "t")


def frozen(table):
    return FrozenEmbeddingCollection([frozen_config(table, ["item"])], device="cpu")


def test_a_table_behind_a_cache_has_the_digest_of_one_in_memory_and_takes_updates(table):
    memory, ssd = frozen(table), frozen(table)
    load_table(memory, table)
    report = load_table(ssd, table, mapped=True, cache_bytes=16 * 40)
    assert report.memory == "SsdRows"
    for module in (memory, ssd):
        new = torch.full((2, DIM), 0.5)
        update_items(module, ItemIndex.of(table), tensor(1003, 5), new, table_version="v1", seq=1)
    assert table_digest(ssd) == table_digest(memory)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cache_bytes": 1 << 20}, "cache_bytes is for mapped rows; use mapped=True"),
        ({"cache_bytes": 10, "mapped": True}, "table mm: a cache needs 192 bytes or more, found 10"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_by_name(table, options, problem):
    with pytest.raises(TableError, match=problem):
        load_table(frozen(table), table, **options)
