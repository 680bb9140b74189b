"""`mim csft` on pairs and items that are damaged: an error that says where, or a counted skip."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.csft.main import main
from mim_torchrec.data.errors import DataError
from tests.programs import TINY_TOWERS, small_shop, words

FLAGS = TINY_TOWERS | {"batch-size": "64", "epochs": "1", "freeze-towers": "True", "init": "random"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return small_shop(tmp_path_factory.mktemp("bad"))


def run(data: Path, out: Path, **changes: str) -> dict:
    main(words(data, out, FLAGS, **changes))
    return json.loads((out / "metrics.json").read_text())


def damaged(shop: Path, to: Path, part: str, column: str, rows: dict) -> tuple[Path, pa.Table]:
    """A copy of the shop in which some values of a column are replaced; and the table as it was."""
    shutil.copytree(shop, to)
    file = next((to / part).glob("*.parquet"))
    table = pq.read_table(file)
    values = table[column].to_pylist()
    for row, change in rows.items():
        values[row] = change(values[row]) if callable(change) else change
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), file)
    return to, table


def cut(image: bytes) -> bytes:
    return image[:40]


def test_a_pair_whose_item_is_missing_is_named(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "pairs", "item_id", {4: 7})
    with pytest.raises(DataError, match="row 4, column item_id: item 7 is not in the item table"):
        run(data, tmp_path / "out")


def test_a_pair_without_query_id_is_named(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "pairs", "query_id", {2: None})
    with pytest.raises(DataError, match="row 2, column query_id: is null"):
        run(data, tmp_path / "out")


def test_a_query_without_an_item_or_an_image_is_named(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "pairs", "query_image", {0: None})
    with pytest.raises(DataError, match="row 0, column query_id: item 1 .* there is no query_image"):
        run(data, tmp_path / "out")


def test_pairs_of_no_item_are_skipped_and_counted(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "pairs", "item_id", {4: 7, 6: 8})
    metrics = run(data, tmp_path / "out", on_bad_row="skip")
    assert metrics["skipped_pairs"] == 2
    assert metrics["pairs"] + metrics["held_out_pairs"] == 298


def test_a_truncated_item_image_is_named(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "items", "image", {3: cut})
    with pytest.raises(DataError, match="row 3, column image: the image of 40 bytes cannot be decoded"):
        run(data, tmp_path / "out")


def test_pairs_with_unreadable_images_are_skipped_and_counted(shop, tmp_path):
    pairs = pq.read_table(next((shop / "pairs").glob("*.parquet")), filters=[("signal", "=", "purchase")])
    data, items = damaged(shop, tmp_path / "one", "items", "image", {3: cut})
    with_item = sum(item == items["item_id"][3].as_py() for item in pairs["item_id"].to_pylist())
    data, table = damaged(data, tmp_path / "shop", "pairs", "query_image", {8: cut})
    assert table["signal"][8].as_py() == "purchase"
    assert table["item_id"][8] != items["item_id"][3]
    metrics = run(data, tmp_path / "out", on_bad_row="skip")
    assert (metrics["skipped_pairs"], metrics["unreadable_items"]) == (with_item + 1, 1)


def test_an_item_without_an_image_is_left_out(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "items", "image", {5: None})
    assert run(data, tmp_path / "out", on_bad_row="skip")["unreadable_items"] == 1


def test_empty_titles_are_counted(shop, tmp_path):
    data, _ = damaged(shop, tmp_path / "shop", "items", "title", {1: "", 2: None, 3: "  "})
    assert run(data, tmp_path / "out")["untitled_items"] == 3


def test_nothing_left_is_an_error(shop, tmp_path):
    everywhere = dict.fromkeys(range(600), 7)
    data, _ = damaged(shop, tmp_path / "shop", "pairs", "item_id", everywhere)
    with pytest.raises(DataError, match="no pair with signal 'purchase' .300 pairs are left out."):
        run(data, tmp_path / "out", on_bad_row="skip")
