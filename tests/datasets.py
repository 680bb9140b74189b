"""Tiny Parquet files in the schema of a shop: rows as dicts, which a test changes before it writes them."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import ITEMS, PAIRS, REQUESTS, Dataset

ROW_GROUP = 4
SECOND = 1_000_000
START = 1_700_000_000 * SECOND
CATEGORIES = ("lamp", "rug", "vase")

Rows = list[dict[str, Any]]


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 255 - color)).save(buffer, "PNG")
    return buffer.getvalue()


def item_rows(count: int = 10) -> Rows:
    """Items 100, 101, ... in an order that is not sorted; item k of category k modulo 3."""
    order = [(7 * k) % count for k in range(count)] if count % 7 else list(reversed(range(count)))
    return [
        {"item_id": 100 + k, "title": f"item {k}", "image": png(k), "category": CATEGORIES[k % 3],
         "listed_at": START + k * SECOND}
        for k in order
    ]  # fmt: skip


def request_rows(count: int = 12) -> Rows:
    """Requests 1, 2, ... a minute apart, with 0 to 4 behaviors and 1 to 3 candidates."""
    rows = []
    for k in range(count):
        ts = START + 60 * k * SECOND
        behaviors, candidates = range(k % 5), range(1 + k % 3)
        rows.append({
            "request_id": 1 + k,
            "user_id": 500 + k % 4,
            "query_id": 10 + k % 2,
            "ts": ts,
            "behavior_item_ids": [100 + (k + b) % 10 for b in behaviors],
            "behavior_categories": [CATEGORIES[(k + b) % 3] for b in behaviors],
            "behavior_ts": [ts - (9 - b) * SECOND for b in behaviors],
            "candidate_item_ids": [100 + (2 * k + c) % 10 for c in candidates],
            "candidate_categories": [CATEGORIES[(2 * k + c) % 3] for c in candidates],
            "labels": [(k + c) % 2 for c in candidates],
        })  # fmt: skip
    return rows


def pair_rows(count: int = 8) -> Rows:
    """Purchases of items 100, 101, ...; queries 1, 2, ... with images of their own."""
    return [
        {"query_image": png(200 + k), "query_id": 1 + k, "item_id": 100 + k % 10,
         "hard_negative_item_id": None, "signal": "purchase", "ts": START + k * SECOND}
        for k in range(count)
    ]  # fmt: skip


def without(rows: Rows, *columns: str) -> Rows:
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def write_rows(path: Path, rows: Rows, schema: pa.Schema, row_group_size: int = ROW_GROUP) -> Path:
    """Write the columns that the first row has, in the types of the schema."""
    fields = [field for field in schema if field.name in rows[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), path, row_group_size=row_group_size)
    return path


def write_items(path: Path, rows: Rows | None = None, **options: Any) -> Path:
    return write_rows(path, item_rows() if rows is None else rows, ITEMS, **options)


def write_requests(path: Path, rows: Rows | None = None, **options: Any) -> Path:
    return write_rows(path, request_rows() if rows is None else rows, REQUESTS, **options)


def write_pairs(path: Path, rows: Rows | None = None, **options: Any) -> Path:
    return write_rows(path, pair_rows() if rows is None else rows, PAIRS, **options)


def open_items(root: Path, rows: Rows | None = None) -> ItemStore:
    """The store of items written to `<root>/items/part-0.parquet`."""
    write_items(root / "items" / "part-0.parquet", rows)
    return ItemStore.open(Dataset(root), root / "cache")
