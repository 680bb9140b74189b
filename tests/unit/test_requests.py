"""The streaming reader: every request once, as many batches on every rank, what is kept and what is not."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS
from tests.datasets import SECOND, request, write_requests

COUNT = 31


@pytest.fixture
def files(tmp_path):
    """Two files of 31 requests in row groups of 4."""
    rows = [request(k) for k in range(COUNT)]
    return [
        write_requests(tmp_path / "a.parquet", rows[:17]),
        write_requests(tmp_path / "b.parquet", rows[17:]),
    ]


def unpack(batches):
    """One dict a request, from batches."""
    found = []
    for batch in batches:
        parts = {}
        for key in ("behavior_item_id", "candidate_item_id"):
            feature = batch.sparse[key]
            parts[key] = [p.tolist() for p in feature.values().split(feature.lengths().tolist())]
        lengths = batch.sparse["candidate_item_id"].lengths().tolist()
        labels = [p.tolist() for p in batch.labels.split(lengths)]
        ts = batch.behavior_ts.split(batch.sparse["behavior_item_id"].lengths().tolist())
        for k in range(batch.num_requests):
            found.append(
                {
                    "request_id": int(batch.request_ids[k]),
                    "user_id": int(batch.sparse["user_id"].values()[k]),
                    "query_id": int(batch.sparse["query_id"].values()[k]),
                    "ts": int(batch.request_ts[k]),
                    "behavior_item_ids": parts["behavior_item_id"][k],
                    "behavior_ts": ts[k].tolist(),
                    "candidate_item_ids": parts["candidate_item_id"][k],
                    "labels": [int(label) for label in labels[k]],
                }
            )
    return found


def ids(reader):
    return list(chain.from_iterable(batch.request_ids.tolist() for batch in reader))


def test_what_is_read_is_what_was_written_in_its_order(files):
    found = unpack(RequestReader(files, batch_size=5))
    names = found[0].keys()
    assert found == [{name: request(k)[name] for name in names} for k in range(COUNT)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_read_every_request_once_in_as_many_batches(files, world_size, shuffle):
    readers = [
        RequestReader(files, batch_size=5, rank=rank, world_size=world_size, shuffle=shuffle)
        for rank in range(world_size)
    ]
    batches = [list(reader) for reader in readers]
    assert {len(own) for own in batches} == {readers[0].num_batches}
    read = [request["request_id"] for own in batches for request in unpack(own)]
    assert sorted(read) == [1000 + k for k in range(COUNT)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_without_the_remainder_all_ranks_have_equally_many_requests(files, world_size):
    read = [
        ids(RequestReader(files, batch_size=5, rank=rank, world_size=world_size, drop_remainder=True))
        for rank in range(world_size)
    ]
    assert {len(own) for own in read} == {COUNT // world_size}
    assert len(set(chain.from_iterable(read))) == COUNT // world_size * world_size


def test_the_order_is_that_of_seed_and_epoch(files):
    def order(seed, epoch):
        reader = RequestReader(files, batch_size=5, seed=seed, shuffle=True)
        reader.set_epoch(epoch)
        return ids(reader)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert sorted(order(0, 1)) == sorted(order(1, 2))


def test_a_batch_has_the_features_in_order_and_a_stride_of_its_requests(files):
    batch = next(iter(RequestReader(files, batch_size=10)))
    assert batch.sparse.keys() == [
        "user_id", "query_id", "candidate_item_id", "behavior_item_id", "candidate_category",
        "behavior_category",
    ]  # fmt: skip
    assert batch.sparse.stride() == batch.num_requests == len(batch.request_ids)
    assert batch.num_candidates == batch.sparse["candidate_item_id"].values().numel()


def test_the_batch_size_counts_candidates(files):
    reader = RequestReader(files, batch_size=8)
    sizes = [batch.num_candidates for batch in reader]
    assert abs(np.mean(sizes) - 8) < 2


def test_of_a_long_history_the_last_behaviors_are_kept(files):
    by_id = {
        found["request_id"]: found for found in unpack(RequestReader(files, batch_size=5, max_behaviors=2))
    }
    assert by_id[1003]["behavior_item_ids"] == request(3)["behavior_item_ids"][-2:]
    assert by_id[1001]["behavior_item_ids"] == request(1)["behavior_item_ids"]
    assert by_id[1000]["behavior_item_ids"] == []


def test_columns_that_are_not_required_may_be_absent(tmp_path):
    without = ["query_id", "ts", "behavior_ts", "behavior_categories", "candidate_categories"]
    path = write_requests(tmp_path / "r.parquet", [request(k) for k in range(5)], without=without)
    (batch,) = RequestReader([path], batch_size=100)
    assert batch.sparse.keys() == ["user_id", "candidate_item_id", "behavior_item_id"]
    assert batch.request_ts is None and batch.behavior_ts is None


def test_files_that_differ_in_columns_are_refused(tmp_path):
    first = write_requests(tmp_path / "a.parquet", [request(0)])
    second = write_requests(tmp_path / "b.parquet", [request(1)], without=["query_id"])
    with pytest.raises(DataError, match=r"b.parquet: has columns .*, but .*a.parquet has .*query_id"):
        RequestReader([first, second], batch_size=4)


def test_categories_of_only_one_side_are_refused(tmp_path):
    path = write_requests(tmp_path / "r.parquet", [request(0)], without=["behavior_categories"])
    with pytest.raises(DataError, match="categories of behaviors and of candidates go together"):
        RequestReader([path], batch_size=4)


def test_skipping_leaves_out_the_bad_rows_and_counts_them(tmp_path):
    rows = [request(k) for k in range(12)]
    rows[2]["user_id"] = None
    rows[9]["labels"] = [3] * len(rows[9]["labels"])
    path = write_requests(tmp_path / "r.parquet", rows)
    reader = RequestReader([path], batch_size=4, on_bad_row="skip")
    assert reader.skipped == 2 and reader.num_requests == 10
    assert ids(reader) == [1000 + k for k in range(12) if k not in (2, 9)]


def test_skipping_changes_nothing_where_all_rows_are_good(files):
    reader = RequestReader(files, batch_size=5, on_bad_row="skip")
    assert reader.skipped == 0
    assert ids(reader) == ids(RequestReader(files, batch_size=5))


def test_fewer_requests_than_ranks_are_refused(tmp_path):
    path = write_requests(tmp_path / "r.parquet", [request(0)])
    with pytest.raises(DataError, match="1 good requests cannot be divided over 2 ranks"):
        RequestReader([path], batch_size=4, rank=0, world_size=2)


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
def test_times_of_any_unit_come_out_in_microseconds(tmp_path, unit):
    schema = REQUESTS
    for name, kind in (("ts", pa.timestamp(unit)), ("behavior_ts", pa.list_(pa.timestamp(unit)))):
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    scale = {"s": 1, "ms": 10**3, "ns": 10**9}[unit]
    row = request(3) | {
        "ts": 103 * scale,
        "behavior_ts": [t // SECOND * scale for t in request(3)["behavior_ts"]],
    }
    (batch,) = RequestReader([write_requests(tmp_path / "r.parquet", [row], schema=schema)], batch_size=4)
    assert batch.request_ts.tolist() == [103 * SECOND]
    assert batch.behavior_ts.tolist() == request(3)["behavior_ts"]


def test_narrow_integers_are_read_as_int64(tmp_path):
    schema = REQUESTS.set(1, pa.field("user_id", pa.int32()))
    schema = schema.set(schema.get_field_index("labels"), pa.field("labels", pa.list_(pa.bool_())))
    row = request(4) | {"labels": [bool(label) for label in request(4)["labels"]]}
    (batch,) = RequestReader([write_requests(tmp_path / "r.parquet", [row], schema=schema)], batch_size=4)
    assert batch.sparse["user_id"].values().tolist() == [request(4)["user_id"]]
    assert batch.labels.tolist() == [float(label) for label in request(4)["labels"]]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"max_behaviors": 0}])
def test_impossible_sizes_are_refused(files, options):
    with pytest.raises(ValueError, match="impossible"):
        RequestReader(files, **{"batch_size": 4} | options)
