"""Bad data is refused by an error that says where it is."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS, REQUESTS_REQUIRED, Dataset, open_parquet, read_row_group
from mim_torchrec.data.writing import DatasetWriter
from tests.datasets import (
    SECOND,
    item,
    open_items,
    pair,
    png,
    request,
    write_items,
    write_pairs,
    write_requests,
)


def read_all(path, **options):
    for _ in RequestReader([path], batch_size=4, **options):
        pass


def test_a_missing_required_column_names_the_file_and_what_it_has(tmp_path):
    path = write_requests(tmp_path / "r.parquet", [request(0)], without=["labels"])
    with pytest.raises(DataError, match="r.parquet, column labels: the column is missing; .*request_id"):
        read_all(path)


def test_a_wrong_type_names_the_one_found_and_the_one_expected(tmp_path):
    schema = REQUESTS.set(REQUESTS.get_field_index("user_id"), pa.field("user_id", pa.float64()))
    path = write_requests(tmp_path / "r.parquet", [request(0)], schema=schema)
    with pytest.raises(DataError, match="r.parquet, column user_id: expected int64, found double"):
        read_all(path)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "r.parquet").touch()
    with pytest.raises(DataError, match="r.parquet: the file is empty"):
        read_all(tmp_path / "r.parquet")


def test_bytes_that_are_no_parquet_are_refused(tmp_path):
    (tmp_path / "r.parquet").write_bytes(b"PAR1 no, it is not")
    with pytest.raises(DataError, match="r.parquet: not a readable Parquet file"):
        read_all(tmp_path / "r.parquet")


def test_a_file_without_rows_is_refused(tmp_path):
    path = write_requests(tmp_path / "r.parquet", [])
    with pytest.raises(DataError, match="r.parquet: the file has no rows"):
        read_all(path)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="absent.parquet: no such file"):
        read_all(tmp_path / "absent.parquet")
    with pytest.raises(DataError, match="absent: no such directory"):
        Dataset(tmp_path / "absent")
    with pytest.raises(DataError, match=r"items: no \*.parquet file there"):
        Dataset(tmp_path).items()


def test_damaged_bytes_name_the_row_group(tmp_path):
    path = write_requests(tmp_path / "r.parquet", [request(k) for k in range(8)])
    metadata = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + metadata.total_compressed_size] = b"\xff" * metadata.total_compressed_size
    path.write_bytes(data)
    parquet = open_parquet(path, REQUESTS, REQUESTS_REQUIRED)
    read_row_group(parquet, 0, ["request_id"], path)
    with pytest.raises(DataError, match="r.parquet, row group 1: cannot be read"):
        read_row_group(parquet, 1, ["request_id"], path)


BAD_ROWS = {
    "a behavior at the time of its request": (
        {"behavior_ts": [90 * SECOND, 107 * SECOND, 107 * SECOND]},
        "column behavior_ts: a behavior is not before its request",
    ),
    "behaviors out of order": (
        {"behavior_ts": [91 * SECOND, 90 * SECOND, 92 * SECOND]},
        "column behavior_ts: the behaviors are not in the order of time",
    ),
    "uneven behaviors": (
        {"behavior_ts": [90 * SECOND]},
        "column behavior_ts: its length is not that of behavior_item_ids",
    ),
    "uneven candidates": ({"labels": [1, 0, 1]}, "column labels: its length is not that of candidate_item"),
    "a label of 2": ({"labels": [0, 2]}, "column labels: a label is neither 0 nor 1"),
    "a null id": ({"user_id": None}, "column user_id: is null"),
    "a null list": ({"behavior_item_ids": None}, "column behavior_item_ids: is null"),
    "a null in a list": (
        {"candidate_item_ids": [75, None]},
        "column candidate_item_ids: a value in the list is null",
    ),
    "no candidate": (
        {"candidate_item_ids": [], "candidate_categories": [], "labels": []},
        "column candidate_item_ids: there is no candidate",
    ),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_request_names_file_row_group_row_and_column(tmp_path, bad):
    changes, problem = BAD_ROWS[bad]
    rows = [request(k) for k in range(12)]
    rows[7] = request(7, candidate_item_ids=[75, 76], candidate_categories=["c0", "c1"], labels=[0, 1])
    rows[7] |= changes
    path = write_requests(tmp_path / "r.parquet", rows)
    with pytest.raises(DataError, match=f"r.parquet, row group 1, row 3, {problem}"):
        read_all(path)


ITEM_IDS = [item(k)["item_id"] for k in range(8)]
BAD_PAIRS = {
    "an unknown item": (pair(1, 999), "column item_id: item 999 is not in the item table"),
    "an unknown query item": (
        pair(998, ITEM_IDS[0], query_image=None),
        "column query_id: item 998 is not in the item table, and there is no query_image",
    ),
    "an unknown hard negative": (
        pair(1, ITEM_IDS[0], hard_negative_item_id=997),
        "column hard_negative_item_id: item 997 is not in the item table",
    ),
    "the positive as hard negative": (
        pair(1, ITEM_IDS[0], hard_negative_item_id=ITEM_IDS[0]),
        f"column hard_negative_item_id: item {ITEM_IDS[0]} is the positive itself",
    ),
    "an unknown signal": (pair(1, ITEM_IDS[0], signal="like"), "column signal: 'like' is not one of"),
    "a null item": (pair(1, None), "column item_id: is null"),
}


@pytest.mark.parametrize("bad", BAD_PAIRS)
def test_a_bad_pair_names_file_row_group_row_and_column(tmp_path, bad):
    row, problem = BAD_PAIRS[bad]
    write_items(tmp_path, [item(k) for k in range(8)])
    rows = [pair(k, ITEM_IDS[k % 8]) for k in range(6)] + [row]
    path = write_pairs(tmp_path / "p.parquet", rows)
    with pytest.raises(DataError, match=re.escape("p.parquet, row group 1, row 2, " + problem)):
        PairDataset([path], open_items(tmp_path))


def test_an_item_id_that_is_there_twice_names_both_places(tmp_path):
    write_items(tmp_path, [item(k) for k in range(6)])
    write_items(tmp_path, [item(9), item(5)], part=1)
    with pytest.raises(DataError) as caught:
        open_items(tmp_path)
    assert f"item id {item(5)['item_id']} is there twice" in str(caught.value)
    assert "part-0.parquet, row group 1, row 1" in str(caught.value)
    assert "part-1.parquet, row group 0, row 1" in str(caught.value)


def test_a_null_item_id_is_named(tmp_path):
    write_items(tmp_path, [item(k) for k in range(5)] + [item(5, item_id=None)])
    with pytest.raises(DataError, match="part-0.parquet, row group 1, row 1, column item_id: is null"):
        open_items(tmp_path)


def test_a_truncated_picture_of_an_item_names_its_place(tmp_path):
    write_items(tmp_path, [item(k) for k in range(5)] + [item(5, image=png(5)[:50])])
    items = open_items(tmp_path)
    with pytest.raises(DataError, match="part-0.parquet, row group 1, row 1, column image: .*decoded"):
        items.images(items.rows_of([item(5)["item_id"]]))


def test_the_place_of_a_query_picture_is_its_row_in_the_pairs(tmp_path):
    write_items(tmp_path, [item(k) for k in range(8)])
    path = write_pairs(tmp_path / "p.parquet", [pair(k, ITEM_IDS[k % 8]) for k in range(6)])
    pairs = PairDataset([path], open_items(tmp_path))
    assert str(pairs.query_location(5)).endswith("p.parquet, row group 1, row 1, column query_image")


def test_a_writer_refuses_a_folder_that_is_there(tmp_path):
    with pytest.raises(DataError, match="exists; choose another"):
        DatasetWriter(tmp_path, name="x", source={})


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail():
        with DatasetWriter(tmp_path / "out", name="x", source={}) as writer:
            writer.write("items", pa.table({"item_id": [1]}))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []
