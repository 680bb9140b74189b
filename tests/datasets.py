"""Tiny Parquet files in the schema of the library, with rows that a test can make bad."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import ITEMS, PAIRS, REQUESTS, Dataset

SECOND = 1_000_000


def png(color: int) -> bytes:
    """A small picture of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (color % 256, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def request(k: int, **changes: Any) -> dict[str, Any]:
    """Request number k: k % 4 behaviors before it, 1 + k % 3 candidates."""
    behaviors, candidates = k % 4, 1 + k % 3
    row = {
        "request_id": 1000 + k,
        "user_id": 7 + k % 5,
        "query_id": 70 + k % 3,
        "ts": (100 + k) * SECOND,
        "behavior_item_ids": [10 * k + j for j in range(behaviors)],
        "behavior_categories": [f"c{j % 2}" for j in range(behaviors)],
        "behavior_ts": [(90 + j) * SECOND for j in range(behaviors)],
        "candidate_item_ids": [10 * k + 5 + j for j in range(candidates)],
        "candidate_categories": [f"c{(k + j) % 2}" for j in range(candidates)],
        "labels": [(k + j) % 2 for j in range(candidates)],
    }
    return row | changes


def write(
    path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, without: Sequence[str] = (),
    row_group_size: int = 4,
) -> Path:  # fmt: skip
    """Write rows as one file."""
    fields = [field for field in schema if field.name not in without]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(fields))
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_requests(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    return write(path, rows, options.pop("schema", REQUESTS), **options)


def item(k: int, **changes: Any) -> dict[str, Any]:
    """Item number k; its ids do not ascend."""
    row = {
        "item_id": 100 + 37 * k % 101,
        "title": f"title {k}",
        "image": png(k),
        "category": f"c{k % 3}",
        "listed_at": (50 + k) * SECOND,
    }
    return row | changes


def write_items(root: Path, rows: Sequence[Mapping[str, Any]], part: int = 0, **options: Any) -> Path:
    return write(root / "items" / f"part-{part}.parquet", rows, ITEMS, **options)


def open_items(root: Path) -> ItemStore:
    return ItemStore.open(Dataset(root), root / "cache")


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    return write(path, rows, PAIRS, **options)


def pair(query_id: int, item_id: int, **changes: Any) -> dict[str, Any]:
    row = {
        "query_image": png(query_id), "query_id": query_id, "item_id": item_id,
        "hard_negative_item_id": None, "signal": "purchase", "ts": SECOND,
    }  # fmt: skip
    return row | changes
