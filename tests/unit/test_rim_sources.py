"""New items with ids of text: numbered as the table is, and named as people know them."""

import json

import pyarrow as pa
import pytest

from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import ITEMS
from mim_torchrec.rim.dead_letter import DeadLetterFile
from mim_torchrec.rim.sources import DirectorySource, StreamSource
from tests.datasets import item_rows, png, write_items, write_rows


def number(text: str) -> int:
    return stable_ids(pa.array([text]))[0].as_py()


def test_items_of_files_may_have_ids_of_text(tmp_path):
    rows = [row | {"item_id": f"sku-{row['item_id']}"} for row in item_rows()]
    schema = pa.schema([pa.field("item_id", pa.string()) if f.name == "item_id" else f for f in ITEMS])
    write_rows(tmp_path / "new" / "a.parquet", rows, schema)
    found = DirectorySource(tmp_path / "new").read(100, 0.0)
    assert [arrival.item_name for arrival in found] == [row["item_id"] for row in rows]
    assert [arrival.item_id for arrival in found] == [number(row["item_id"]) for row in rows]
    assert [(arrival.title, arrival.image) for arrival in found] == [(r["title"], r["image"]) for r in rows]
    letters = DeadLetterFile(tmp_path / "dead.jsonl")
    letters.add([(found[0], "why")])
    assert json.loads((tmp_path / "dead.jsonl").read_text())["item_id"] == rows[0]["item_id"]


def test_items_of_files_with_numbers_have_no_other_name(tmp_path):
    write_items(tmp_path / "new" / "a.parquet")
    found = DirectorySource(tmp_path / "new").read(100, 0.0)
    assert [arrival.item_id for arrival in found] == [row["item_id"] for row in item_rows()]
    assert {arrival.item_name for arrival in found} == {None}


@pytest.mark.parametrize(
    ("fields", "item_id", "name"),
    [
        ({b"item_id": b"-7"}, -7, None),
        ({b"item_id": b"18446744073709551615"}, -1, None),
        ({b"item_id_text": b"sku-7"}, number("sku-7"), "sku-7"),
        ({b"item_id_text": b"7"}, number("7"), "7"),
    ],
)
def test_entries_of_a_stream_have_a_number_or_a_text(fields, item_id, name):
    source = StreamSource.__new__(StreamSource)  # without a server
    source._unit, source._at = "arrivals", "redis://x#arrivals"
    arrival = source._arrival("1-0", fields | {b"title": b"x", b"image": png(1)})
    assert (arrival.item_id, arrival.item_name, arrival.problem) == (item_id, name, None)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({b"title": b"x"}, "there is no item_id"), ({b"item_id": b"18446744073709551616"}, "is beyond 64 bits"),
     ({b"item_id": b"sku-7"}, "invalid literal")],
)  # fmt: skip
def test_entries_without_an_id_are_bad_items(fields, problem):
    source = StreamSource.__new__(StreamSource)
    source._unit, source._at = "arrivals", "redis://x#arrivals"
    assert problem in source._arrival("1-0", fields).problem
