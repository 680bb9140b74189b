"""Random access to items is what the Parquet files hold, whatever their order."""

import numpy as np
import pytest

from mim_torchrec.data.errors import DataError
from tests.datasets import item, open_items, write_items


@pytest.fixture
def root(tmp_path):
    rows = [item(k) for k in range(11)]
    rows[4]["title"], rows[6]["image"], rows[7]["category"] = None, None, None
    write_items(tmp_path, rows[:6])
    write_items(tmp_path, rows[6:], part=1)
    return tmp_path


def test_rows_are_in_ascending_order_of_ids(root):
    items = open_items(root)
    assert len(items) == 11
    assert items.item_ids.tolist() == sorted(item(k)["item_id"] for k in range(11))


def test_everything_of_an_item_is_found_by_its_id_in_any_order(root):
    items = open_items(root)
    asked = [9, 0, 5, 10, 0]
    rows = items.rows_of([item(k)["item_id"] for k in asked])
    assert items.titles(rows) == [item(k)["title"] for k in asked]
    assert items.categories(rows) == [item(k)["category"] for k in asked]
    assert items.image_bytes(rows) == [item(k)["image"] for k in asked]
    assert [image.getpixel((0, 0)) for image in items.images(rows)] == [(k, 10, 20) for k in asked]


def test_a_missing_title_or_category_is_empty(root):
    items = open_items(root)
    assert items.titles(items.rows_of([item(4)["item_id"]])) == [""]
    assert items.categories(items.rows_of([item(7)["item_id"]])) == [""]


def test_a_missing_picture_is_refused_with_its_place(root):
    items = open_items(root)
    with pytest.raises(DataError, match="part-1.parquet, row group 0, row 0, column image: is null"):
        items.image_bytes(items.rows_of([item(6)["item_id"]]))


def test_unknown_ids_are_named(root):
    with pytest.raises(DataError, match="2 item ids are not in the item table: 1, 2"):
        open_items(root).rows_of(np.array([2, item(0)["item_id"], 1]))


def test_a_column_that_is_not_there_is_named(tmp_path):
    write_items(tmp_path, [item(0)], without=["title"])
    items = open_items(tmp_path)
    with pytest.raises(DataError, match="column title: the item table has no such column"):
        items.titles(np.array([0]))


def test_the_index_is_built_once_and_again_when_a_file_changes(root):
    open_items(root)
    index = root / "cache" / "items.arrow"
    before = index.stat().st_ino
    open_items(root)
    assert index.stat().st_ino == before
    write_items(root, [item(k, title="new") for k in range(20, 26)], part=1)
    items = open_items(root)
    assert index.stat().st_ino != before
    assert items.titles(items.rows_of([item(20)["item_id"]])) == ["new"]
    assert [file.name for file in index.parent.iterdir()] == ["items.arrow"]
