"""ItemStore: items by row in any order, from files in any order, indexed once."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from tests.datasets import SECOND, START, Rows, item_rows, open_items, png, without, write_items

NUM_ITEMS = 23


def write_parts(root: Path) -> Rows:
    """23 items in three files of one to three row groups; returns their rows by id."""
    rows = item_rows(NUM_ITEMS)
    for part, (start, stop) in enumerate([(0, 9), (9, 10), (10, NUM_ITEMS)]):
        write_items(root / "items" / f"part-{part}.parquet", rows[start:stop], row_group_size=5)
    return sorted(rows, key=lambda row: row["item_id"])


def opened(root: Path) -> ItemStore:
    return ItemStore.open(Dataset(root), root / "cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("items")


@pytest.fixture(scope="module")
def expected(root) -> Rows:
    return write_parts(root)


@pytest.fixture(scope="module")
def items(root, expected) -> ItemStore:
    return opened(root)


def test_rows_ascend_by_id_although_the_files_do_not(items, expected):
    written = [row["item_id"] for row in item_rows(NUM_ITEMS)]
    assert written != sorted(written)
    assert items.item_ids.tolist() == sorted(written)
    assert len(items) == NUM_ITEMS


@pytest.mark.parametrize("seed", [0, 1])
def test_access_in_any_order_gives_what_is_in_the_files(items, expected, seed):
    rows = np.random.default_rng(seed).integers(NUM_ITEMS, size=60)
    wanted = [expected[row] for row in rows]
    assert items.titles(rows) == [row["title"] for row in wanted]
    assert items.categories(rows) == [row["category"] for row in wanted]
    assert items.image_bytes(rows) == [row["image"] for row in wanted]
    assert items.listed_at(rows).tolist() == [row["listed_at"] for row in wanted]


def test_images_are_decoded_to_rgb(items, expected):
    for row, image in enumerate(items.images(np.arange(NUM_ITEMS))):
        assert image.mode == "RGB"
        assert image.tobytes() == decode_image(expected[row]["image"]).tobytes()


def test_no_rows_give_nothing(items):
    nothing = np.array([], np.int64)
    assert items.titles(nothing) == items.image_bytes(nothing) == items.listed_at(nothing).tolist() == []
    assert items.rows_of(nothing).tolist() == []


def test_rows_of_ids_have_the_shape_of_the_ids(items):
    ids = np.array([[122, 100], [105, 105]])
    assert items.rows_of(ids).tolist() == [[22, 0], [5, 5]]


def test_unknown_ids_are_named(items):
    with pytest.raises(DataError, match="3 item ids are not in the item table: -1, 99, 200; add"):
        items.rows_of(np.array([100, 200, 99, 101, 99, -1]))


def test_of_many_unknown_ids_the_first_ten_are_named(items):
    with pytest.raises(DataError, match="20 item ids are not .*: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …; add"):
        items.rows_of(np.arange(20))


def test_the_location_of_a_row_is_where_its_id_stands_in_the_files(root, items):
    for row in range(NUM_ITEMS):
        where = items.location(row, "image")
        assert where.column == "image"
        table = pq.ParquetFile(where.file).read_row_group(where.row_group)
        assert table["item_id"][where.row].as_py() == items.item_ids[row]


def test_an_item_without_title_or_category_has_empty_ones(tmp_path):
    rows = item_rows()
    rows[6] |= {"title": None, "category": None}
    items = open_items(tmp_path, rows)
    row = items.rows_of(np.array([rows[6]["item_id"]]))
    assert items.titles(row) == items.categories(row) == [""]


@pytest.mark.parametrize(
    "column, read", [("image", ItemStore.image_bytes), ("listed_at", ItemStore.listed_at)]
)
def test_a_null_that_is_asked_for_is_refused_with_its_place(tmp_path, column, read):
    rows = item_rows()
    rows[6][column] = None
    items = open_items(tmp_path, rows)
    with pytest.raises(DataError, match=rf"is null \(item {rows[6]['item_id']}\)") as error:
        read(items, np.arange(len(items)))
    assert error.value.location == Location(str(tmp_path / "items" / "part-0.parquet"), 1, 2, column)


@pytest.mark.parametrize(
    "column, read", [("image", ItemStore.image_bytes), ("listed_at", ItemStore.listed_at)]
)
def test_a_null_that_is_not_asked_for_does_no_harm(tmp_path, column, read):
    rows = item_rows()
    rows[6][column] = None
    items = open_items(tmp_path, rows)
    others = np.flatnonzero(items.item_ids != rows[6]["item_id"])
    assert len(read(items, others)) == len(rows) - 1


@pytest.mark.parametrize(
    "column, read",
    [
        ("title", ItemStore.titles),
        ("image", ItemStore.images),
        ("category", ItemStore.categories),
        ("listed_at", ItemStore.listed_at),
    ],
)
def test_a_column_that_the_items_do_not_have_is_refused_when_asked_for(tmp_path, column, read):
    items = open_items(tmp_path, without(item_rows(), column))
    with pytest.raises(
        DataError, match=rf"part-0\.parquet, column {column}: the item table has no such column"
    ):
        read(items, np.array([0]))


def test_files_that_differ_in_columns_are_refused(tmp_path):
    write_items(tmp_path / "items" / "part-0.parquet", item_rows()[:5])
    write_items(tmp_path / "items" / "part-1.parquet", without(item_rows()[5:], "title"))
    with pytest.raises(DataError, match=r"part-1\.parquet: has columns .*part-0\.parquet has .*title"):
        opened(tmp_path)


def test_an_id_in_two_files_names_both(tmp_path):
    write_items(tmp_path / "items" / "part-0.parquet", item_rows()[:6])
    write_items(tmp_path / "items" / "part-1.parquet", item_rows()[5:])
    with pytest.raises(
        DataError, match=r"part-1\.parquet, row group 0, row 0.*part-0\.parquet, row group 1, row 1"
    ):
        opened(tmp_path)


@pytest.mark.parametrize(
    "column, kind",
    [
        ("item_id", pa.int32()),
        ("title", pa.large_string()),
        ("category", pa.dictionary(pa.int32(), pa.string())),
        ("image", pa.large_binary()),
        ("listed_at", pa.timestamp("ms")),
        ("listed_at", pa.timestamp("ns")),
    ],
    ids=str,
)
def test_columns_of_another_type_give_the_same_items(tmp_path, column, kind):
    file = write_items(tmp_path / "items" / "part-0.parquet")
    table = pq.read_table(file)
    values = table[column].cast(kind)
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, file, row_group_size=4)
    items, expected = opened(tmp_path), sorted(item_rows(), key=lambda row: row["item_id"])
    rows = np.arange(len(items))
    assert items.item_ids.tolist() == [row["item_id"] for row in expected]
    assert items.titles(rows) == [row["title"] for row in expected]
    assert items.categories(rows) == [row["category"] for row in expected]
    assert items.image_bytes(rows) == [row["image"] for row in expected]
    assert items.listed_at(rows).tolist() == [row["listed_at"] for row in expected]


def test_categories_that_are_integers_become_text(tmp_path):
    file = write_items(tmp_path / "items" / "part-0.parquet")
    table = pq.read_table(file)
    numbers = pa.array(range(len(table)), pa.int64())
    table = table.set_column(table.column_names.index("category"), "category", numbers)
    pq.write_table(table, file)
    items = opened(tmp_path)
    rows = items.rows_of(table["item_id"].to_numpy())
    assert items.categories(rows) == [str(k) for k in range(len(table))]


def index_of(root: Path) -> tuple[int, int]:
    """What changes when the index is written again."""
    stat = (root / "cache" / "items.arrow").stat()
    return stat.st_ino, stat.st_mtime_ns


def test_an_index_is_used_again_while_the_files_are_the_same(tmp_path):
    write_parts(tmp_path)
    opened(tmp_path)
    before = index_of(tmp_path)
    opened(tmp_path)
    assert index_of(tmp_path) == before


def test_an_index_is_built_again_when_a_file_changes(tmp_path):
    write_parts(tmp_path)
    opened(tmp_path)
    changed = [row | {"title": "changed"} for row in item_rows(NUM_ITEMS)[:9]]
    write_items(tmp_path / "items" / "part-0.parquet", changed, row_group_size=5)
    items = opened(tmp_path)
    assert items.titles(items.rows_of(np.array([changed[0]["item_id"]]))) == ["changed"]


def test_an_index_is_built_again_when_only_the_time_of_a_file_changes(tmp_path):
    write_parts(tmp_path)
    opened(tmp_path)
    before = index_of(tmp_path)
    os.utime(tmp_path / "items" / "part-1.parquet", ns=(1, 1))
    opened(tmp_path)
    assert index_of(tmp_path) != before


def test_an_index_is_built_again_when_a_file_is_added(tmp_path):
    write_items(tmp_path / "items" / "part-0.parquet")
    opened(tmp_path)
    more = item_rows()[0] | {"item_id": 7, "image": png(9)}
    write_items(tmp_path / "items" / "part-1.parquet", [more])
    items = opened(tmp_path)
    assert len(items) == len(item_rows()) + 1
    assert items.image_bytes(items.rows_of(np.array([7]))) == [png(9)]


def test_building_leaves_nothing_but_the_index(tmp_path):
    write_parts(tmp_path)
    opened(tmp_path)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["items.arrow"]


def test_times_finer_than_a_microsecond_are_cut_off(tmp_path):
    path = write_items(tmp_path / "items" / "part-0.parquet")
    table = pq.read_table(path)
    at = table.column_names.index("listed_at")
    fine = table["listed_at"].cast(pa.timestamp("ns")).cast(pa.int64())
    fine = pc.add(fine, 7).cast(pa.timestamp("ns"))
    pq.write_table(table.set_column(at, "listed_at", fine), path)
    items = ItemStore.open(Dataset(tmp_path), tmp_path / "cache")
    row = items.rows_of(np.array([103]))
    assert items.listed_at(row).tolist() == [START + 3 * SECOND]


def test_some_columns_are_read_without_an_index(tmp_path):
    write_parts(tmp_path)
    items = ItemStore.read(Dataset(tmp_path), ("item_id", "category", "listed_at"))
    expected = sorted(item_rows(NUM_ITEMS), key=lambda row: row["item_id"])
    rows = np.arange(len(items))
    assert items.item_ids.tolist() == [row["item_id"] for row in expected]
    assert items.categories(rows) == [row["category"] for row in expected]
    assert items.listed_at(rows).tolist() == [row["listed_at"] for row in expected]
    with pytest.raises(DataError, match="column image: the item table has no such column"):
        items.image_bytes(rows)
    assert not (tmp_path / "cache").exists()


def test_what_is_read_without_an_index_is_checked_and_has_its_place(tmp_path):
    rows = item_rows(9)
    rows[7] |= {"listed_at": None}
    write_items(tmp_path / "items" / "part-0.parquet", rows, row_group_size=5)
    items = ItemStore.read(Dataset(tmp_path), ("item_id", "listed_at"))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 1, row 2, column listed_at: is null"):
        items.listed_at(np.arange(9))
    write_items(tmp_path / "items" / "part-1.parquet", rows[:1])
    with pytest.raises(DataError, match="is there twice"):
        ItemStore.read(Dataset(tmp_path), ("item_id",))
