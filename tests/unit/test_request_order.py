"""Order and memory of the reader: what a buffer permutes, what is read for it, where a pass begins."""

import threading
from pathlib import Path

import numpy as np
import pytest

from mim_torchrec.data import request_files
from mim_torchrec.data.features import NO_FEATURES
from mim_torchrec.data.request_buffer import RequestBuffer
from mim_torchrec.data.request_columns import RequestColumns
from mim_torchrec.data.request_files import RequestFiles, count_good_rows
from mim_torchrec.data.request_order import RequestOrder
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.errors import OptionError
from tests.datasets import request_rows, write_requests
from tests.request_rows import as_rows, expected, ids

COUNT = 90


def order_of(rows: list[int], rank: int = 0, world_size: int = 1, **changes) -> RequestOrder:
    options = {"batch_size": 3, "seed": 1, "shuffle": True, "buffer_rows": None, "drop_remainder": True}
    return RequestOrder(rows, sum(rows), rank=rank, world_size=world_size, **options | changes)


def of_eight_row_groups(rows: list[int], seed: int, epoch: int, rank: int, world_size: int) -> list[int]:
    """Naive: what readers gave before buffers had a limit in rows."""
    first, each = np.cumsum([0, *rows]), sum(rows) // world_size
    groups = np.random.default_rng((seed, epoch)).permutation(len(rows))
    sequence = [(place, number) for place, group in enumerate(groups)
                for number in range(first[group], first[group + 1])]  # fmt: skip
    mine = sequence[rank * each : (rank + 1) * each]
    rng, found = np.random.default_rng((seed, epoch, rank + 1)), []
    places = sorted({place for place, _ in mine})
    for start in range(0, len(places), 8):
        chunk = [number for place, number in mine if place in places[start : start + 8]]
        found += [chunk[k] for k in rng.permutation(len(chunk))]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [[4] * 30, [7, 1, 12, 3] * 6, [50]], ids=["equal", "unequal", "one"])
def test_by_default_the_order_is_that_of_buffers_of_eight_row_groups(rows, world_size):
    for rank in range(world_size):
        order = order_of(rows, rank, world_size)
        order.set_epoch(2, ())
        found = np.concatenate(list(order.chunks())).tolist()
        assert found == of_eight_row_groups(rows, 1, 2, rank, world_size)


@pytest.mark.parametrize("size_per_rank", [False, True])
def test_other_numbers_of_ranks_had_batches_of_one_size_together_or_each(size_per_rank):
    rows, batches = [12] * 10, 4
    before = [order_of(rows, rank, 2, size_per_rank=size_per_rank, batch_size=3) for rank in range(2)]
    after = [
        order_of(rows, rank, 3, size_per_rank=size_per_rank, batch_size=3 if size_per_rank else 2)
        for rank in range(3)
    ]
    read = [np.concatenate(list(one.chunks()))[: one.bounds()[batches]].tolist() for one in before]
    for one in after:
        one.set_epoch(0, [(2, batches)])
    left = [np.concatenate(list(one.chunks())).tolist() for one in after]
    assert sorted(sum(read + left, [])) == list(range(120))
    assert {len(part) for part in read} == {3 * batches}
    assert {one.num_batches for one in after} == {-(-(96 // 3) // (3 if size_per_rank else 2))}


@pytest.mark.parametrize("buffer_rows", [1, 5, 13, 64, 1000])
@pytest.mark.parametrize("rows", [[4] * 30, [7, 1, 12, 3] * 6, [120]], ids=["equal", "unequal", "one"])
def test_a_buffer_has_as_many_requests_as_asked_for_whatever_the_row_groups(rows, buffer_rows):
    chunks = list(order_of(rows, buffer_rows=buffer_rows).chunks())
    assert sorted(np.concatenate(chunks).tolist()) == list(range(sum(rows)))
    assert {len(chunk) for chunk in chunks[:-1]} <= {buffer_rows}
    assert len(chunks[-1]) <= buffer_rows


def test_row_groups_beyond_the_default_limit_are_cut(monkeypatch):
    monkeypatch.setattr("mim_torchrec.data.request_order.BUFFER_ROWS", 32)
    assert [len(chunk) for chunk in order_of([50] * 3).chunks()] == [32, 32, 32, 32, 22]
    assert [len(chunk) for chunk in order_of([3] * 20).chunks()] == [24, 24, 12]


def test_an_impossible_buffer_is_refused(files):
    with pytest.raises(OptionError, match="buffer_rows is 0"):
        RequestReader(files, batch_size=3, buffer_rows=0)


@pytest.fixture(params=[3, 20, COUNT])
def files(tmp_path, request) -> list[Path]:
    rows = request_rows(COUNT)
    return [write_requests(tmp_path / "0.parquet", rows[:50], row_group_size=request.param),
            write_requests(tmp_path / "1.parquet", rows[50:], row_group_size=request.param)]  # fmt: skip


@pytest.fixture(params=["whole", "blocks"])
def decoded(request, monkeypatch) -> None:
    """Row groups decoded whole, and in blocks of four rows where they have more than sixteen."""
    if request.param == "blocks":
        monkeypatch.setattr(request_files, "BLOCK_ROWS", 4)


@pytest.mark.parametrize("buffer_rows", [None, 1, 7, 30])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_the_requests_of_the_files(files, decoded, buffer_rows, shuffle):
    rows = as_rows(list(RequestReader(files, batch_size=9, shuffle=shuffle, buffer_rows=buffer_rows)))
    assert sorted(rows, key=lambda row: row["request_id"]) == expected(request_rows(COUNT))
    assert shuffle or [row["request_id"] for row in rows] == list(range(1, COUNT + 1))


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("buffer_rows", [1, 7, 30, 200])
def test_a_second_buffer_that_a_thread_fills_changes_nothing(files, decoded, buffer_rows, first):
    reader = RequestReader(files, batch_size=9, shuffle=True, buffer_rows=buffer_rows)
    reader.set_epoch(1)
    begun = reader.batches(first, ahead=True)
    assert ids(list(begun)) == ids(list(reader.batches(first)))


def test_a_pass_that_has_begun_keeps_its_order(files):
    reader = RequestReader(files, batch_size=9, shuffle=True, buffer_rows=30)
    begun = {}
    for epoch in (1, 2):
        reader.set_epoch(epoch)
        begun[epoch] = reader.batches()
    second = ids(list(begun[2]))
    assert second == ids(list(reader.batches()))
    reader.set_epoch(1)
    assert ids(list(begun[1])) == ids(list(reader.batches())) != second


def test_batches_that_nobody_wants_any_more_end_the_thread(files):
    before = threading.active_count()
    batches = RequestReader(files, batch_size=9, shuffle=True, buffer_rows=7).batches(ahead=True)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_blocks_give_what_whole_row_groups_give(files, monkeypatch, on_bad_row):
    def read() -> list[int]:
        return ids(list(RequestReader(files, batch_size=9, shuffle=True, on_bad_row=on_bad_row)))

    whole = read()
    monkeypatch.setattr(request_files, "BLOCK_ROWS", 4)
    assert read() == whole


def test_bad_rows_are_named_and_skipped_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(request_files, "BLOCK_ROWS", 4)
    rows = request_rows(20)
    rows[13]["user_id"] = rows[2]["labels"] = None
    file = write_requests(tmp_path / "r.parquet", rows, row_group_size=20)
    reader = RequestReader([file], batch_size=5, on_bad_row="skip")
    assert reader.skipped == 2 and sorted(ids(list(reader))) == [k for k in range(1, 21) if k not in (3, 14)]
    rows[2] = request_rows(3)[2]
    with pytest.raises(ValueError, match="row group 0, row 13, column user_id: is null"):
        list(RequestReader([write_requests(file, rows, row_group_size=20)], batch_size=5))


@pytest.mark.parametrize("first", [0, 1, 5, 9, 10, 99])
def test_a_pass_may_begin_at_any_batch(files, decoded, first):
    reader = RequestReader(files, batch_size=18, shuffle=True, buffer_rows=17)
    whole = [ids([batch]) for batch in reader]
    assert [ids([batch]) for batch in reader.batches(first)] == whole[first:]


def test_what_is_before_the_first_batch_is_not_decoded(tmp_path, monkeypatch):
    file = write_requests(tmp_path / "r.parquet", request_rows(COUNT), row_group_size=5)
    decoded = []

    def decode(table, *words) -> tuple[RequestColumns, int]:
        decoded.append(len(table))
        return plain(table, *words)

    plain = request_files.decode
    monkeypatch.setattr(request_files, "decode", decode)
    reader = RequestReader([file], batch_size=20, shuffle=True, buffer_rows=10)
    assert len(list(reader.batches(reader.num_batches - 1))) == 1
    assert sum(decoded) <= 20  # of 90: the last batch of ten, from one or two buffers of ten
    decoded.clear()
    list(reader)
    assert sum(decoded) == COUNT


def test_rows_are_read_by_their_numbers_in_any_order(files, decoded):
    rows, known = RequestFiles(files, 50, "fail", NO_FEATURES), np.arange(1, COUNT + 1)
    rng = np.random.default_rng(0)
    buffer = RequestBuffer()
    for count in (1, 10, COUNT):
        numbers = rng.permutation(COUNT)[:count]
        columns, which = rows.read(numbers, buffer)
        assert columns.scalars["request_id"][which].tolist() == known[numbers].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_good_rows_that_ranks_count_together_are_those_that_one_counts(tmp_path, world_size):
    rows = request_rows(30)
    for bad in (3, 4, 17, 29):
        rows[bad]["user_id"] = None
    file = write_requests(tmp_path / "r.parquet", rows, row_group_size=4)
    parts = [count_good_rows([file], NO_FEATURES, rank, world_size) for rank in range(world_size)]
    assert sum(map(len, parts)) == 8
    found = {k: counts for part in parts for k, counts in part.items()}
    readers = [RequestReader([file], batch_size=4, on_bad_row="skip", good_rows=g) for g in (found, None)]
    assert [reader.skipped for reader in readers] == [4, 4]
    assert readers[0].num_candidates == readers[1].num_candidates
    assert as_rows(list(readers[0])) == as_rows(list(readers[1]))
