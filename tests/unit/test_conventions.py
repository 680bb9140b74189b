"""Columns that are compared hold the same kind of thing in all files; otherwise both are named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import Dataset
from tests.datasets import open_items, request_rows, write_items, write_pairs, write_requests
from tests.request_rows import as_rows, expected, read


def changed(file: Path, **columns: pa.DataType | pa.Array | pa.ChunkedArray) -> Path:
    """The file with columns cast or replaced."""
    table = pq.read_table(file)
    for name, made in columns.items():
        column = table[name].cast(made) if isinstance(made, pa.DataType) else made
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, file, row_group_size=4)
    return file


def test_an_aware_request_time_beside_naive_behavior_times_is_refused(tmp_path):
    file = write_requests(tmp_path / "r.parquet")
    local = pc.assume_timezone(pq.read_table(file)["ts"], "Asia/Shanghai")
    with pytest.raises(DataError) as error:
        read([changed(file, ts=local)])
    said = str(error.value)
    assert said == (
        f"{file}, column behavior_ts: holds a time without a zone, but column ts of {file}, with which it is "
        "compared, holds an instant; write all as times in UTC"
    )


def test_aware_and_naive_times_in_two_files_are_refused_by_both_names(tmp_path):
    zone = pa.timestamp("us", "UTC")
    first = write_requests(tmp_path / "a.parquet")
    second = changed(write_requests(tmp_path / "b.parquet"), ts=zone, behavior_ts=pa.list_(zone))
    with pytest.raises(DataError, match=r"b\.parquet, column ts: .*column ts of .*a\.parquet"):
        read([first, second])


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai", "America/New_York", "+05:30"])
def test_times_of_any_zones_are_compared_in_utc(tmp_path, zone):
    of_requests, of_behaviors = pa.timestamp("ms", zone), pa.list_(pa.timestamp("us", "UTC"))
    file = changed(write_requests(tmp_path / "r.parquet"), ts=of_requests, behavior_ts=of_behaviors)
    assert as_rows(read([file])) == expected(request_rows())


def test_dates_beside_times_are_refused(tmp_path):
    file = changed(write_requests(tmp_path / "r.parquet"), behavior_ts=pa.list_(pa.date32()))
    with pytest.raises(
        DataError, match="column behavior_ts: holds a date, but column ts .* holds a time without"
    ):
        read([file])


def test_times_of_two_splits_are_compared(tmp_path):
    zone = pa.timestamp("us", "UTC")
    train = write_requests(tmp_path / "requests" / "train" / "a.parquet")
    test = write_requests(tmp_path / "requests" / "test" / "b.parquet")
    changed(test, ts=zone, behavior_ts=pa.list_(zone))
    dataset = Dataset(tmp_path)
    RequestReader([train], batch_size=3, conventions=dataset.conventions)
    with pytest.raises(DataError, match=r"b\.parquet, column ts: .*a\.parquet"):
        RequestReader(dataset.requests("test"), batch_size=3, conventions=dataset.conventions)


def numbers_for(table: pa.Table, column: str) -> pa.Array:
    return pa.array([[7] * len(row) for row in table[column].to_pylist()], pa.list_(pa.int64()))


def test_categories_of_numbers_in_one_column_and_text_in_another_are_refused(tmp_path):
    file = write_requests(tmp_path / "r.parquet")
    changed(file, behavior_categories=numbers_for(pq.read_table(file), "behavior_categories"))
    with pytest.raises(
        DataError, match="column candidate_categories: holds text, but column behavior_categories"
    ):
        read([file])


def test_categories_of_numbers_in_one_file_and_text_in_another_are_refused(tmp_path):
    first, second = (write_requests(tmp_path / f"{name}.parquet") for name in "ab")
    table = pq.read_table(second)
    columns = ("behavior_categories", "candidate_categories")
    changed(second, **{name: numbers_for(table, name) for name in columns})
    with pytest.raises(
        DataError, match=r"b\.parquet, column behavior_categories: holds integers, but .*a\.parquet"
    ):
        read([first, second])


def test_a_sparse_feature_of_numbers_in_one_file_and_text_in_another_is_refused(tmp_path):
    files = []
    for name, values in (("a", pa.array([1] * 12)), ("b", pa.array(["1"] * 12))):
        file = write_requests(tmp_path / f"{name}.parquet")
        pq.write_table(pq.read_table(file).append_column("city", values), file)
        files.append(file)
    with pytest.raises(
        DataError, match=r"b\.parquet, column city: holds text, but column city of .*a\.parquet"
    ):
        read(files, features=Features(sparse=("city",)))


def test_a_file_without_a_value_agrees_with_any(tmp_path):
    files = []
    for name, values in (("a", pa.array(["x"] * 12)), ("b", pa.nulls(12))):
        file = write_requests(tmp_path / f"{name}.parquet")
        pq.write_table(pq.read_table(file).append_column("city", values), file)
        files.append(file)
    found = [
        batch.sparse["city"].lengths().tolist() for batch in read(files, features=Features(sparse=("city",)))
    ]
    assert sum(found, []) == [1] * 12 + [0] * 12


def test_item_ids_of_text_in_items_and_numbers_in_requests_are_refused(tmp_path):
    file = write_items(tmp_path / "items" / "i.parquet")
    changed(file, item_id=pa.string())
    write_requests(tmp_path / "requests" / "train" / "r.parquet")
    dataset = Dataset(tmp_path)
    assert len(ItemStore.open(dataset, tmp_path / "cache")) == 10
    with pytest.raises(
        DataError, match=r"column behavior_item_ids: holds integers, but column item_id of .*i\.parquet"
    ):
        RequestReader(dataset.requests("train"), batch_size=3, conventions=dataset.conventions)


def test_times_of_pairs_in_two_files_are_compared(tmp_path):
    items = open_items(tmp_path)
    first, second = (write_pairs(tmp_path / f"{name}.parquet") for name in "ab")
    changed(second, ts=pa.timestamp("us", "UTC"))
    with pytest.raises(
        DataError, match=r"b\.parquet, column ts: holds an instant, but column ts of .*a\.parquet"
    ):
        PairDataset([first, second], items)


def test_times_of_listing_in_two_files_are_compared(tmp_path):
    write_items(tmp_path / "items" / "a.parquet")
    changed(write_items(tmp_path / "items" / "b.parquet"), listed_at=pa.timestamp("us", "UTC"))
    with pytest.raises(DataError, match=r"b\.parquet, column listed_at: .*a\.parquet"):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")


def test_the_unit_of_integer_times_is_that_of_the_data_set(tmp_path):
    file = write_items(tmp_path / "items" / "a.parquet")
    seconds = pa.array([v.value // 1_000_000 for v in pq.read_table(file)["listed_at"].combine_chunks()])
    changed(file, listed_at=seconds)
    (tmp_path / "dataset.json").write_text('{"time_unit": "s"}')
    items = ItemStore.open(Dataset(tmp_path), tmp_path / "cache")
    assert items.listed_at([0, 1]).tolist() == [1_700_000_000_000_000, 1_700_000_001_000_000]
    (tmp_path / "dataset.json").write_text('{"time_unit": "ms"}')
    with pytest.raises(DataError, match="in the unit 'ms'"):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")


@pytest.mark.parametrize("text", ["[1]", "{", "\xff"])
def test_a_damaged_dataset_json_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"dataset\.json: is no JSON object"):
        Dataset(tmp_path)
