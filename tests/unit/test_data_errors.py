"""Bad input data is refused with the file, row group, row and column where it is."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import ITEMS, REQUESTS, REQUESTS_REQUIRED, Dataset
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.errors import OutputExists
from tests.datasets import (
    Rows,
    item_rows,
    open_items,
    pair_rows,
    png,
    request_rows,
    without,
    write_items,
    write_pairs,
    write_requests,
    write_rows,
)

BAD = 7  # behaviors and candidates are two each: row 3 of row group 1
PLACE = "row group 1, row 3"


def read(file: Path) -> None:
    list(RequestReader([file], batch_size=3))


def changed(rows: Rows, **changes) -> Rows:
    return [*rows[:BAD], rows[BAD] | changes, *rows[BAD + 1 :]]


def replaced_type(path: Path, column: str, kind: pa.DataType) -> Path:
    """Write the file again with a column of nulls of another type."""
    table = pq.read_table(path)
    nulls = pa.nulls(len(table), kind)
    pq.write_table(table.set_column(table.column_names.index(column), column, nulls), path)
    return path


def damage(path: Path, row_group: int, column: int) -> Path:
    """Flip all bits of the middle half of a column chunk."""
    chunk = pq.ParquetFile(path).metadata.row_group(row_group).column(column)
    first = chunk.data_page_offset
    if chunk.has_dictionary_page:
        first = min(first, chunk.dictionary_page_offset)
    data = bytearray(path.read_bytes())
    size = chunk.total_compressed_size
    for k in range(first + size // 4, first + 3 * size // 4):
        data[k] ^= 0xFF
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("column", REQUESTS_REQUIRED)
def test_a_missing_column_of_requests_names_file_and_column(tmp_path, column):
    file = write_requests(tmp_path / "r.parquet", without(request_rows(), column))
    with pytest.raises(DataError, match=rf"r\.parquet, column {column}: the column is missing"):
        read(file)


def test_a_missing_column_is_refused_by_the_scan_of_ids(tmp_path):
    file = write_requests(tmp_path / "r.parquet", without(request_rows(), "labels"))
    with pytest.raises(DataError, match=r"r\.parquet, column labels: the column is missing"):
        scan_ids([file])


def test_items_without_item_id_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"part-0\.parquet, column item_id: the column is missing"):
        open_items(tmp_path, without(item_rows(), "item_id"))


@pytest.mark.parametrize("column", ["query_id", "item_id"])
def test_a_missing_column_of_pairs_names_file_and_column(tmp_path, column):
    file = write_pairs(tmp_path / "p.parquet", without(pair_rows(), column))
    with pytest.raises(DataError, match=rf"p\.parquet, column {column}: the column is missing"):
        PairDataset([file], open_items(tmp_path))


@pytest.mark.parametrize(
    "column, kind",
    [
        ("user_id", pa.float64()),
        ("user_id", pa.decimal128(10, 2)),
        ("user_id", pa.binary()),
        ("ts", pa.int64()),
        ("behavior_ts", pa.list_(pa.int64())),
        ("behavior_item_ids", pa.int64()),
        ("candidate_item_ids", pa.list_(pa.float32())),
        ("candidate_categories", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.string())),
    ],
    ids=str,
)
def test_a_wrong_type_names_file_column_and_both_types(tmp_path, column, kind):
    file = replaced_type(write_requests(tmp_path / "r.parquet"), column, kind)
    with pytest.raises(DataError, match=rf"r\.parquet, column {column}: expected ") as error:
        read(file)
    assert str(REQUESTS.field(column).type) in str(error.value)
    assert f"found {pq.read_schema(file).field(column).type}" in str(error.value)


@pytest.mark.parametrize(
    "column, kind", [("image", pa.string()), ("title", pa.int64()), ("item_id", pa.float64())]
)
def test_a_wrong_type_of_items_names_file_and_column(tmp_path, column, kind):
    file = replaced_type(write_items(tmp_path / "items" / "i.parquet"), column, kind)
    with pytest.raises(DataError, match=rf"{file}, column {column}: expected .*, found {kind}"):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")


def test_a_file_of_no_bytes_is_called_empty(tmp_path):
    (tmp_path / "r.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"r\.parquet: the file is empty"):
        read(tmp_path / "r.parquet")


def test_a_file_that_is_no_parquet_is_called_so(tmp_path):
    (tmp_path / "r.parquet").write_bytes(b"request_id,user_id\n1,2\n")
    with pytest.raises(DataError, match=r"r\.parquet: not a readable Parquet file"):
        read(tmp_path / "r.parquet")


def test_a_file_cut_in_the_middle_is_called_no_parquet(tmp_path):
    file = write_requests(tmp_path / "r.parquet")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=r"r\.parquet: not a readable Parquet file"):
        read(file)


def test_files_without_rows_are_refused_where_there_are_no_others(tmp_path):
    pq.write_table(REQUESTS.empty_table(), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet: no file has a row"):
        read(tmp_path / "r.parquet")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.parquet: no such file"):
        read(tmp_path / "gone.parquet")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such directory"):
        Dataset(tmp_path / "gone")


@pytest.mark.parametrize(
    "files, folder",
    [
        (Dataset.items, "items"),
        (Dataset.pairs, "pairs"),
        (lambda dataset: dataset.requests("test"), "requests/test"),
    ],
    ids=["items", "pairs", "requests"],
)
def test_a_folder_without_files_is_named(tmp_path, files, folder):
    with pytest.raises(DataError, match=rf"{tmp_path}/{folder}: no \*\.parquet file there"):
        files(Dataset(tmp_path))


def test_damaged_bytes_of_requests_name_file_and_row_group(tmp_path):
    file = damage(write_requests(tmp_path / "r.parquet"), 1, REQUESTS.get_field_index("candidate_item_ids"))
    with pytest.raises(DataError, match=r"r\.parquet, row group 1: cannot be read"):
        read(file)


def test_damaged_bytes_of_items_name_file_and_row_group(tmp_path):
    damage(write_items(tmp_path / "items" / "i.parquet"), 2, ITEMS.get_field_index("listed_at"))
    with pytest.raises(DataError, match=r"i\.parquet, row group 2: cannot be read"):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")


def test_damaged_items_leave_no_index_behind(tmp_path):
    damage(write_items(tmp_path / "items" / "i.parquet"), 2, ITEMS.get_field_index("listed_at"))
    with pytest.raises(DataError):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def refuse_request(folder: Path, column: str, problem: str, **changes) -> None:
    file = write_requests(folder / "r.parquet", changed(request_rows(), **changes))
    with pytest.raises(DataError, match=rf"r\.parquet, {PLACE}, column {column}: .*{problem}"):
        read(file)


def test_a_behavior_at_the_time_of_its_request_is_refused(tmp_path):
    now = request_rows()[BAD]["ts"]
    refuse_request(tmp_path, "behavior_ts", "not before its request", behavior_ts=[now - 5, now])


def test_a_behavior_after_its_request_is_refused(tmp_path):
    now = request_rows()[BAD]["ts"]
    refuse_request(tmp_path, "behavior_ts", "not before its request", behavior_ts=[now + 5, now - 5])


def test_behaviors_out_of_order_are_refused(tmp_path):
    times = request_rows()[BAD]["behavior_ts"]
    refuse_request(tmp_path, "behavior_ts", "not in the order of time", behavior_ts=times[::-1])


@pytest.mark.parametrize(
    "column, other",
    [
        ("behavior_categories", "behavior_item_ids"),
        ("behavior_ts", "behavior_item_ids"),
        ("candidate_categories", "candidate_item_ids"),
        ("labels", "candidate_item_ids"),
    ],
)
@pytest.mark.parametrize("cut", [slice(1), slice(0)], ids=["shorter", "empty"])
def test_parallel_lists_of_uneven_lengths_are_refused(tmp_path, column, other, cut):
    values = request_rows()[BAD][column][cut]
    refuse_request(tmp_path, column, f"its length is not that of {other}", **{column: values})


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_neither_0_nor_1_is_refused(tmp_path, label):
    refuse_request(tmp_path, "labels", "a label is neither 0 nor 1", labels=[1, label])


@pytest.mark.parametrize("label", [0.5, float("nan")])
def test_a_label_of_floats_neither_0_nor_1_is_refused(tmp_path, label):
    rows = changed(request_rows(), labels=[1.0, label])
    schema = REQUESTS.set(REQUESTS.get_field_index("labels"), pa.field("labels", pa.list_(pa.float32())))
    file = write_rows(tmp_path / "r.parquet", rows, schema)
    with pytest.raises(DataError, match=rf"r\.parquet, {PLACE}, column labels: a label is neither 0 nor 1"):
        read(file)


@pytest.mark.parametrize("column", [name for name in REQUESTS.names if not name.startswith("behavior")])
def test_a_null_names_file_row_group_row_and_column(tmp_path, column):
    refuse_request(tmp_path, column, "is null", **{column: None})


@pytest.mark.parametrize("column", ["behavior_categories", "behavior_ts"])
def test_a_null_beside_behaviors_is_refused(tmp_path, column):
    refuse_request(tmp_path, column, "its length is not that of behavior_item_ids", **{column: None})


def test_behaviors_of_no_item_are_refused(tmp_path):
    problem = "its length is not that of behavior_item_ids"
    refuse_request(tmp_path, "behavior_categories", problem, behavior_item_ids=None)


@pytest.mark.parametrize("column", [field.name for field in REQUESTS if pa.types.is_list(field.type)])
def test_a_null_in_a_list_names_file_row_group_row_and_column(tmp_path, column):
    values = [request_rows()[BAD][column][0], None]
    refuse_request(tmp_path, column, "a value in the list is null", **{column: values})


def test_a_request_without_candidates_is_refused(tmp_path):
    nothing = {"candidate_item_ids": [], "candidate_categories": [], "labels": []}
    refuse_request(tmp_path, "candidate_item_ids", "there is no candidate", **nothing)


def test_the_first_of_several_bad_rows_is_named(tmp_path):
    rows = changed(request_rows(), user_id=None)
    rows[BAD - 2] = rows[BAD - 2] | {"labels": [3] * len(rows[BAD - 2]["labels"])}
    file = write_requests(tmp_path / "r.parquet", rows)
    with pytest.raises(DataError, match=r"row group 1, row 1, column labels"):
        read(file)


def refuse_pair(folder: Path, column: str, problem: str, **changes) -> None:
    file = write_pairs(folder / "p.parquet", changed(pair_rows(), **changes))
    with pytest.raises(DataError, match=rf"p\.parquet, {PLACE}, column {column}: .*{problem}"):
        PairDataset([file], open_items(folder))


@pytest.mark.parametrize(
    "column, problem, changes",
    [
        ("item_id", "item 99 is not in the item table", {"item_id": 99}),
        ("item_id", "is null", {"item_id": None}),
        ("query_id", "is null", {"query_id": None}),
        ("query_id", "item 8 is not in the item table, and there is no query_image", {"query_image": None}),
        ("signal", "'view' is not one of purchase, click", {"signal": "view"}),
        ("signal", "None is not one of purchase, click", {"signal": None}),
        ("hard_negative_item_id", "item 99 is not in the item table", {"hard_negative_item_id": 99}),
        ("hard_negative_item_id", "item 107 is the positive itself", {"hard_negative_item_id": 107}),
    ],
)
def test_a_bad_pair_names_file_row_group_row_and_column(tmp_path, column, problem, changes):
    refuse_pair(tmp_path, column, problem, **changes)


def test_the_row_of_a_bad_pair_counts_pairs_of_other_signals(tmp_path):
    rows = changed(pair_rows(), item_id=99)
    rows[5]["signal"] = rows[6]["signal"] = "click"
    file = write_pairs(tmp_path / "p.parquet", rows)
    with pytest.raises(DataError, match=rf"p\.parquet, {PLACE}, column item_id: item 99"):
        PairDataset([file], open_items(tmp_path), signal="purchase")


def test_an_item_id_that_is_there_twice_names_both_places(tmp_path):
    rows = item_rows()
    rows[BAD] = rows[BAD] | {"item_id": rows[2]["item_id"]}
    first = r"part-0\.parquet, row group 0, row 2"
    second = rf"part-0\.parquet, {PLACE}, column item_id"
    with pytest.raises(
        DataError, match=rf"{second}: item id {rows[2]['item_id']} .*twice, first in .*{first}"
    ):
        open_items(tmp_path, rows)


def test_a_null_item_id_names_its_place(tmp_path):
    with pytest.raises(DataError, match=rf"part-0\.parquet, {PLACE}, column item_id: is null"):
        open_items(tmp_path, changed(item_rows(), item_id=None))


@pytest.mark.parametrize("data", [png(0)[:50], b"", b"not an image"], ids=["truncated", "empty", "text"])
def test_an_image_that_cannot_be_decoded_names_its_place(tmp_path, data):
    items = open_items(tmp_path, changed(item_rows(), image=data))
    rows = items.rows_of(np.array([item_rows()[BAD]["item_id"]]))
    with pytest.raises(DataError, match=rf"part-0\.parquet, {PLACE}, column image: .* cannot be decoded"):
        items.images(rows)


def test_a_directory_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists, match=rf"{tmp_path}/out exists"):
        DatasetWriter(tmp_path / "out", name="x", source={})


def test_a_directory_made_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputExists, match="exists"):
        with DatasetWriter(tmp_path / "out", name="x", source={}):
            (tmp_path / "out").mkdir()
    assert not list((tmp_path / "out").iterdir())


def test_writing_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="midway"):
        with DatasetWriter(tmp_path / "out", name="x", source={}) as writer:
            writer.write("items", pa.table({"item_id": [1]}))
            raise RuntimeError("midway")
    assert not list(tmp_path.iterdir())


def test_a_data_set_has_its_name_only_when_all_of_it_is_there(tmp_path):
    with DatasetWriter(tmp_path / "out", name="x", source={}) as writer:
        writer.write("items", pa.table({"item_id": [1]}))
        assert not (tmp_path / "out").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_text_that_is_no_text_names_the_row_group_and_the_column(tmp_path):
    path = tmp_path / "r.parquet"
    table = pq.read_table(write_requests(tmp_path / "good.parquet"))
    at = table.schema.get_field_index("candidate_categories")
    lengths = table["candidate_categories"].combine_chunks().offsets
    values = pa.array([b"\xff\xfe"] * int(lengths[-1].as_py()), pa.binary()).view(pa.string())
    broken = pa.ListArray.from_arrays(lengths, values)
    pq.write_table(table.set_column(at, "candidate_categories", broken), path)
    with pytest.raises(DataError, match="r.parquet, row group 0, column candidate_categories: cannot"):
        list(RequestReader([path], batch_size=4))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_byte_is_damaged_the_error_is_about_the_file(tmp_path, seed):
    path = write_requests(tmp_path / "r.parquet")
    good = path.read_bytes()
    rng = np.random.default_rng(seed)
    refused = 0
    for at in rng.integers(4, len(good) - 8, 25):
        data = bytearray(good)
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            list(RequestReader([path], batch_size=4))
        except DataError as error:
            assert "r.parquet" in str(error)
            refused += 1
    assert refused
