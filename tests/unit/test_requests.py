"""RequestReader against a naive row-by-row reading, over ranks, epochs and kinds of columns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.requests import RequestReader
from tests.datasets import SECOND, START, request_rows, without, write_requests
from tests.request_rows import FEATURES, as_rows, expected, ids, read

NUM_REQUESTS = 47


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """47 requests in two files with row groups of 4."""
    folder, rows = tmp_path_factory.mktemp("requests"), request_rows(NUM_REQUESTS)
    return [
        write_requests(folder / "part-0.parquet", rows[:30]),
        write_requests(folder / "part-1.parquet", rows[30:]),
    ]


def test_batches_are_the_rows_of_the_files_in_order(files):
    assert as_rows(read(files)) == expected(request_rows(NUM_REQUESTS))


def test_shuffled_batches_are_the_same_rows(files):
    rows = as_rows(read(files, shuffle=True))
    assert [row["request_id"] for row in rows] != list(range(1, NUM_REQUESTS + 1))
    assert sorted(rows, key=lambda row: row["request_id"]) == expected(request_rows(NUM_REQUESTS))


def test_shuffling_moves_requests_beyond_a_buffer_of_row_groups(tmp_path):
    file = write_requests(tmp_path / "r.parquet", request_rows(100), row_group_size=2)
    order = ids(read([file], shuffle=True))
    assert sorted(order) == list(range(1, 101))
    assert min(order[:50]) <= 25 and max(order[:50]) > 75


def test_keys_come_in_a_fixed_order_with_the_stride_of_the_requests(files):
    for batch in read(files):
        assert batch.sparse.keys() == list(FEATURES)
        assert batch.sparse.stride() == batch.num_requests == len(batch.request_ids)
        assert batch.num_candidates == batch.sparse["candidate_item_id"].values().numel()


def test_types_are_what_models_take(files):
    batch = read(files)[0]
    integers = (batch.sparse.values(), batch.request_ids, batch.request_ts, batch.behavior_ts)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.labels.dtype == torch.float32


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_read_every_request_once(files, world_size, shuffle):
    parts = [read(files, rank=r, world_size=world_size, shuffle=shuffle) for r in range(world_size)]
    assert sorted(sum((ids(part) for part in parts), [])) == list(range(1, NUM_REQUESTS + 1))


@pytest.mark.parametrize("drop_remainder", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_every_rank_has_the_number_of_batches_announced(
    files, world_size, shuffle, drop_remainder, batch_size
):
    announced = set()
    for rank in range(world_size):
        reader = RequestReader(
            files, batch_size=batch_size, rank=rank, world_size=world_size, shuffle=shuffle,
            drop_remainder=drop_remainder,
        )  # fmt: skip
        batches = list(reader)
        announced.add(reader.num_batches)
        assert len(batches) == len(reader) == reader.num_batches
        assert all(batch.num_requests > 0 for batch in batches)
    assert len(announced) == 1


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_without_the_remainder_ranks_have_equally_many_requests(files, world_size, shuffle):
    parts = [
        ids(read(files, rank=r, world_size=world_size, shuffle=shuffle, drop_remainder=True))
        for r in range(world_size)
    ]
    assert {len(part) for part in parts} == {NUM_REQUESTS // world_size}
    assert len(set(sum(parts, []))) == world_size * (NUM_REQUESTS // world_size)


def test_batches_have_about_batch_size_candidates(files):
    sizes = [batch.num_candidates for batch in read(files, batch_size=8)]
    assert np.mean(sizes) == pytest.approx(8, rel=0.15)


def test_batches_differ_by_at_most_one_request(files):
    sizes = {batch.num_requests for batch in read(files, batch_size=12)}
    assert max(sizes) - min(sizes) <= 1


def test_equal_seed_and_epoch_give_an_equal_order(files):
    first, again = (ids(read(files, shuffle=True, seed=3, epoch=2)) for _ in range(2))
    assert first == again


def test_a_reader_used_twice_gives_an_equal_order(files):
    reader = RequestReader(files, batch_size=7, shuffle=True)
    assert ids(list(reader)) == ids(list(reader))


@pytest.mark.parametrize("other", [{"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 3}], ids=["seed", "epoch"])
def test_another_seed_or_epoch_gives_another_order(files, other):
    assert ids(read(files, shuffle=True, seed=3, epoch=2)) != ids(read(files, shuffle=True, **other))


def test_without_shuffling_the_epoch_changes_nothing(files):
    assert ids(read(files, epoch=5)) == list(range(1, NUM_REQUESTS + 1))


def test_max_behaviors_keeps_the_last_ones(files):
    rows = request_rows(NUM_REQUESTS)
    for row in rows:
        for column in ("behavior_item_ids", "behavior_categories", "behavior_ts"):
            row[column] = row[column][-2:]
    assert as_rows(read(files, max_behaviors=2)) == expected(rows)


def test_files_that_differ_in_columns_are_refused(tmp_path, files):
    other = write_requests(tmp_path / "other.parquet", without(request_rows(), "query_id"))
    with pytest.raises(DataError, match=r"other\.parquet: has columns .*part-0\.parquet has .*query_id"):
        read([*files, other])


def write_some_bad(folder: Path) -> tuple[list[Path], set[int]]:
    """Two files of 30 requests, and the ids of the bad ones, three of them in one row group."""
    rows = request_rows(30)
    rows[3]["user_id"] = None
    rows[8]["labels"] = [2] * len(rows[8]["labels"])
    rows[9]["behavior_ts"] = rows[9]["behavior_ts"][::-1]
    rows[10]["candidate_categories"] = rows[10]["candidate_categories"] * 2
    rows[29]["behavior_item_ids"] = None
    folder.mkdir(exist_ok=True)
    files = [
        write_requests(folder / "part-0.parquet", rows[:18]),
        write_requests(folder / "part-1.parquet", rows[18:]),
    ]
    return files, {4, 9, 10, 11, 30}


def test_skipping_leaves_out_exactly_the_bad_rows(tmp_path):
    files, bad = write_some_bad(tmp_path)
    good = [row for row in request_rows(30) if row["request_id"] not in bad]
    assert as_rows(read(files, on_bad_row="skip")) == expected(good)


def test_skipping_counts_the_bad_rows(tmp_path):
    files, bad = write_some_bad(tmp_path)
    reader = RequestReader(files, batch_size=7, on_bad_row="skip")
    good = [row for row in request_rows(30) if row["request_id"] not in bad]
    assert reader.skipped == len(bad)
    assert reader.num_requests == len(good)
    assert reader.num_candidates == sum(len(row["labels"]) for row in good)


def test_skipping_says_how_many_it_skips(tmp_path, caplog):
    read(write_some_bad(tmp_path)[0], on_bad_row="skip")
    assert "5 malformed requests skipped of 30" in caplog.text


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_skip_read_every_good_request_once(tmp_path, world_size, shuffle):
    files, bad = write_some_bad(tmp_path)
    parts = [
        read(files, rank=r, world_size=world_size, shuffle=shuffle, on_bad_row="skip")
        for r in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert sorted(sum((ids(part) for part in parts), [])) == sorted(set(range(1, 31)) - bad)


def test_a_row_group_of_bad_rows_only_is_passed_over(tmp_path):
    rows = request_rows()
    for row in rows[4:8]:
        row["user_id"] = None
    file = write_requests(tmp_path / "r.parquet", rows)
    assert ids(read([file], on_bad_row="skip")) == [1, 2, 3, 4, 9, 10, 11, 12]


def test_without_bad_rows_nothing_is_skipped(files):
    assert RequestReader(files, batch_size=7, on_bad_row="skip").skipped == 0


def test_fewer_requests_than_ranks_are_refused(tmp_path):
    file = write_requests(tmp_path / "r.parquet", request_rows(2))
    with pytest.raises(DataError, match="2 good requests cannot be divided over 3 ranks"):
        read([file], world_size=3)


def test_only_bad_requests_are_refused_rather_than_skipped(tmp_path):
    rows = [row | {"user_id": None} for row in request_rows(3)]
    file = write_requests(tmp_path / "r.parquet", rows)
    with pytest.raises(DataError, match="0 good requests"):
        read([file], on_bad_row="skip")


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"max_behaviors": 0}, {"rank": 1}, {"rank": -1}, {"on_bad_row": "ignore"}],
    ids=str,
)  # fmt: skip
def test_impossible_arguments_are_refused(files, options):
    with pytest.raises(ValueError, match="impossible|on_bad_row"):
        read(files, **options)


def test_a_history_may_begin_before_that_of_the_request_ahead(tmp_path):
    rows = request_rows()
    for k, row in enumerate(rows):
        row["behavior_ts"] = [START - (100 * k - b) * SECOND for b in range(len(row["behavior_ts"]))]
    assert as_rows(read([write_requests(tmp_path / "r.parquet", rows)])) == expected(rows)


def test_a_batch_of_empty_histories_has_no_behaviors(tmp_path):
    nothing = {"behavior_item_ids": [], "behavior_categories": [], "behavior_ts": []}
    rows = [row | nothing for row in request_rows()]
    batches = read([write_requests(tmp_path / "r.parquet", rows)])
    assert as_rows(batches) == expected(rows)
    assert sum(batch.behavior_ts.numel() for batch in batches) == 0


def test_a_data_loader_passes_the_batches_on(files):
    reader = RequestReader(files, batch_size=7)
    assert ids(list(DataLoader(reader, batch_size=None))) == list(range(1, NUM_REQUESTS + 1))


def test_a_batch_moves_with_all_of_its_tensors(files):
    batch = read(files)[0].to(torch.device("meta"))
    tensors = (batch.sparse.values(), batch.labels, batch.request_ids, batch.request_ts, batch.behavior_ts)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def read_part(
    files: list[Path], world_size: int, done: list[tuple[int, int]], batches: int | None
) -> tuple[list[RequestBatch], int]:
    """The first batches of every rank of what is left of epoch 3, and how many a rank has of them."""
    found, counts = [], set()
    for rank in range(world_size):
        reader = RequestReader(files, batch_size=24 // world_size, rank=rank, world_size=world_size,
                               shuffle=True, seed=1, drop_remainder=True)  # fmt: skip
        reader.set_epoch(3, done)
        mine = list(reader)
        assert len(mine) == reader.num_batches
        counts.add(len(mine))
        found += mine[:batches]
    assert len(counts) == 1
    return found, counts.pop()


@pytest.mark.parametrize("parts", [
    [(2, 2), (1, None)], [(1, 3), (2, None)], [(2, 1), (3, 1), (1, 1), (2, None)],
])  # fmt: skip
def test_what_some_ranks_have_left_of_an_epoch_others_read_once(files, parts):
    done, seen = [], []
    for world_size, batches in parts:
        found, count = read_part(files, world_size, done, batches)
        seen += ids(found)
        done.append((world_size, count if batches is None else batches))
    assert len(seen) == len(set(seen))
    assert len(seen) >= NUM_REQUESTS - sum(world_size - 1 for world_size, _ in parts)


def test_what_is_left_comes_in_the_order_it_had(files):
    one = ids(read_part(files, 1, [], None)[0])
    assert ids(read_part(files, 1, [(1, 2)], None)[0]) == one[len(ids(read_part(files, 1, [], 2)[0])) :]


def test_the_next_epoch_is_whole_again(files):
    reader = RequestReader(files, batch_size=24, shuffle=True)
    reader.set_epoch(0, [(2, 2)])
    assert reader.num_batches < len(read(files, batch_size=24, shuffle=True))
    reader.set_epoch(1)
    assert sorted(ids(list(reader))) == sorted(ids(read(files)))
