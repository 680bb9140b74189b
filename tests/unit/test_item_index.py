"""The index of a live table against a dictionary, in one process and in the workers of a DataLoader."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from mim_torchrec.embeddings.sharded.item_index import ItemIndex, SpareRowsExhausted
from mim_torchrec.embeddings.sharded.new_items import NewItems
from mim_torchrec.embeddings.sharded.saved_index import SavedIndex
from mim_torchrec.embeddings.table.format import RowIndex, Table, TableError, TableWriter
from mim_torchrec.embeddings.table.row_index import map_distinct

SMALL = st.integers(-40, 40)
ANY = st.integers(-(2**63), 2**63 - 1)
EDGES = st.sampled_from([-(2**63), -1, 0, 1, 2**32, 2**63 - 1])
ITEMS = st.one_of(SMALL, ANY, EDGES)


def tensor(ids) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64)


class Naive:
    """The index as a dictionary: every item that ever had a row, and those that are deleted."""

    def __init__(self, ids: list[int], capacity: int) -> None:
        self.home = {item: row for row, item in enumerate(ids, 1)}
        self.capacity, self.deleted = capacity, set()

    def add(self, ids: list[int]) -> list[int] | None:
        fresh = sorted(set(ids) - set(self.home))
        if len(self.home) + len(fresh) > self.capacity:
            return None
        for item in fresh:
            self.home[item] = 1 + len(self.home)
        self.deleted -= set(ids)
        return [self.home[item] for item in ids]

    def remove(self, ids: list[int]) -> list[int]:
        known = [item for item in ids if item in self.home]
        self.deleted |= set(known)
        return [self.home[item] for item in known]

    def rows(self, ids: list[int]) -> list[int]:
        return [0 if item in self.deleted else self.home.get(item, 0) for item in ids]


@given(parts=st.lists(st.integers(0, 6), max_size=4), ids=st.sets(ITEMS, max_size=24), asked=st.data())
def test_rows_are_positions_whatever_the_parts_and_the_order_of_ids(parts, ids, asked):
    ascending = sorted(ids)
    stops = sorted({min(sum(parts[:k]), len(ascending)) for k in range(len(parts) + 1)} | {len(ascending)})
    pieces = [tensor(ascending[a:b]) for a, b in zip([0, *stops], stops, strict=False)]
    index = RowIndex(*pieces)
    wanted = asked.draw(st.lists(st.one_of(ITEMS, st.sampled_from(ascending or [0])), max_size=60))
    expected = {item: row for row, item in enumerate(ascending, 1)}
    assert index.rows(tensor(wanted)).tolist() == [expected.get(item, 0) for item in wanted]
    assert index.ids.tolist() == ascending and len(index) == len(ascending)
    at = np.arange(0, len(ascending), 2)
    assert index.at(at).tolist() == ascending[::2]


def test_ids_of_any_shape_and_integer_type_are_mapped_and_others_refused():
    index = RowIndex(tensor([10, 30]))
    assert index.rows(torch.tensor([[10, 11], [30, 10]], dtype=torch.int32)).tolist() == [[1, 0], [2, 1]]
    assert index.rows(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)
    with pytest.raises(TypeError, match="ids are integers, found torch.float32"):
        index.rows(torch.tensor([10.0]))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sets(ITEMS, max_size=30),
    spare=st.integers(0, 25),
    steps=st.lists(st.tuples(st.booleans(), st.lists(ITEMS, unique=True, max_size=12)), max_size=12),
    asked=st.lists(ITEMS, max_size=30),
)
def test_any_order_of_changes_gives_the_rows_of_a_dictionary(base, spare, steps, asked):
    ids = sorted(base)
    index, naive = ItemIndex(tensor(ids), len(ids) + spare), Naive(ids, len(ids) + spare)
    touched = [item for _, items in steps for item in items]
    for is_new, items in steps:
        if not is_new:
            assert index.remove(tensor(items)).tolist() == naive.remove(items)
        elif (rows := naive.add(items)) is None:
            with pytest.raises(SpareRowsExhausted):
                index.add(tensor(items))
        else:
            assert index.add(tensor(items)).tolist() == rows
        wanted = [*asked, *touched, *ids, *asked]
        assert index.rows(tensor(wanted)).tolist() == naive.rows(wanted)
        assert index.homes(tensor(wanted)).tolist() == [naive.home.get(item, 0) for item in wanted]
        assert len(index) == len(naive.home) - len(naive.deleted)
        assert index.spare_rows == naive.capacity - len(naive.home)
    saved = SavedIndex.from_json(json.loads(json.dumps(index.saved().to_json())))
    restored = ItemIndex(tensor(ids), len(ids) + spare)
    restored.restore(saved)
    for other in (restored, copy.deepcopy(index)):
        assert other.rows(tensor(wanted := [*touched, *ids])).tolist() == naive.rows(wanted)
        assert other.saved().digest == index.saved().digest and len(other) == len(index)


@pytest.mark.parametrize("size", [1_000, 30_000])
def test_windows_and_lookups_at_larger_sizes_give_the_rows_of_a_dictionary(size):
    rng = np.random.default_rng(size)
    pool = np.unique(rng.integers(-(2**62), 2**62, 3 * size))
    rng.shuffle(pool)
    ids = sorted(pool[:size].tolist())
    parts = tensor(ids).split(size // 3 + 1)
    index, naive = ItemIndex(RowIndex(*parts), 2 * size), Naive(ids, 2 * size)
    for seq, window in enumerate(np.array_split(pool[: 2 * size], 9), 1):
        removed = rng.choice(pool[: 2 * size], size // 10, replace=False)
        assert index.add(tensor(window), seq).tolist() == naive.add(window.tolist())
        assert index.remove(tensor(removed), seq).tolist() == naive.remove(removed.tolist())
        asked = rng.choice(pool, 2 * size)
        assert index.rows(tensor(asked)).tolist() == naive.rows(asked.tolist())
    assert index.seq == 9 and index.spare_rows == 0


def test_hashes_that_are_full_or_collide_are_searched_to_the_end():
    ids = np.arange(5_000, dtype=np.int64) << 40
    items = NewItems(ids.size, 1, 0)
    for part in np.array_split(ids[::-1], 7):
        items.append(part)
    assert items.positions(ids).tolist() == list(range(ids.size))[::-1]
    assert (items.positions(ids + 1) == -1).all()


def test_an_index_is_restored_only_where_its_rows_are_the_same():
    index = ItemIndex(tensor([1, 5]), 4, "here")
    index.add(tensor([9, 7]), seq=3)
    saved = index.saved()
    with pytest.raises(TableError, match="here has other items than the table of the checkpoint"):
        ItemIndex(tensor([1, 6]), 4, "here").restore(saved)
    other = ItemIndex(tensor([1, 5]), 4, "here")
    other.add(tensor([8]))
    with pytest.raises(TableError, match="has other new items than the checkpoint"):
        other.restore(saved)
    with pytest.raises(SpareRowsExhausted, match="2 new items, here 1 rows for them"):
        ItemIndex(tensor([1, 5]), 3, "here").restore(saved)
    with pytest.raises(ValueError, match="2 items need a capacity"):
        ItemIndex(tensor([1, 5]), 1)


def test_an_index_is_not_pickled_where_it_would_go_stale():
    with pytest.raises(TableError, match="can be given to a process only when that is started"):
        pickle.dumps(ItemIndex(tensor([1]), 2))


class Requests(Dataset):
    """Batches of rows, mapped in a worker; one of the ids given to `write` is added there."""

    def __init__(self, index: ItemIndex, ids: torch.Tensor, write: bool = False) -> None:
        self.index, self.ids, self.write = index, ids, write

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> torch.Tensor:
        if self.write:
            self.index.add(self.ids[at : at + 1])
        return self.index.rows(self.ids[at])


def make_index(folder, kind: str) -> ItemIndex:
    if kind == "ids":
        return ItemIndex(tensor([10, 20, 30]), 6)
    writer = TableWriter(folder / kind, table_version="v1", dim=4, encoder={}, spare_rows=3)
    shards = {"one table": [[10, 20], [30]], "overlapping shards": [[10, 30], [20]]}[kind]
    for ids in shards:
        writer.write_shard(tensor(ids), torch.ones(len(ids), 4))
    writer.finish()
    return ItemIndex.of(Table.open(folder / kind))


# Python 3.12 and later warn of every fork in a process that has threads
FORKED = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ("forkserver", "one table"),
        ("forkserver", "ids"),
        ("forkserver", "overlapping shards"),
        ("spawn", "ids"),
        ("fork", "one table"),
        ("fork", "ids"),
        ("fork", "overlapping shards"),
    ],
)
@FORKED
def test_workers_that_run_already_see_items_that_are_added_and_deleted(tmp_path, start, kind):
    index, asked = make_index(tmp_path, kind), tensor([30, 10, 7, 8, 20])
    loader = DataLoader(Requests(index, asked), batch_size=None, num_workers=1, persistent_workers=True,
                        multiprocessing_context=start)  # fmt: skip
    assert [int(row) for row in loader] == [3, 1, 0, 0, 2]
    worker = loader._iterator._workers[0].pid
    index.add(tensor([8, 7]), seq=1)
    index.remove(tensor([10]), seq=1)
    assert [int(row) for row in loader] == [3, 0, 4, 5, 2]
    index.add(tensor([10]), seq=2)
    assert [int(row) for row in loader] == [3, 1, 4, 5, 2] == index.rows(asked).tolist()
    assert loader._iterator._workers[0].pid == worker


@pytest.mark.slow
@pytest.mark.parametrize("start", ["forkserver", "fork"])
@FORKED
def test_a_worker_does_not_change_the_index(start):
    loader = DataLoader(Requests(ItemIndex(tensor([10]), 2), tensor([7]), write=True), batch_size=None,
                        num_workers=1, multiprocessing_context=start)  # fmt: skip
    with pytest.raises(TableError, match="is changed by the process that made it"):
        next(iter(loader))


@pytest.mark.parametrize("first", [-(2**63), -3, 0, 1, 7, 2**63 - 5])
def test_ids_without_a_gap_have_the_rows_that_a_search_finds(first):
    ids = torch.tensor([first + k for k in range(5)])
    asked = torch.tensor([-(2**63), -4, -3, 0, 1, 5, 7, 11, 12, 2**63 - 5, 2**63 - 1]).view(1, -1)
    split = RowIndex(ids[:2], ids[2:])
    assert split.rows(asked).tolist() == map_distinct(asked, split.rows_of_ascending).tolist()
    assert split.rows(ids).tolist() == [1, 2, 3, 4, 5]
