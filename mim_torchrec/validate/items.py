"""Items and pairs: ids, texts, and images that decode."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mim_torchrec.data.errors import DataError, Location, Problems
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.schema import (
    ITEMS,
    ITEMS_REQUIRED,
    Dataset,
    TableFile,
    open_parquet,
    present_columns,
    read_row_group,
)
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.validate.report import Report, sampled

LEFT_OUT = "fix them, or leave them out with --on-bad-row skip"
COUNTED = ("title", "category", "image", "listed_at")


def check_items(dataset: Dataset, share: float, images: int, report: Report) -> ItemStore | None:
    """Check the items.

    Args:
        dataset: the data set.
        share: of the row groups whose texts and images are read; ids are read of all.
        images: how many are decoded, spread over these row groups.
        report: gets what is found.

    Returns:
        All items without texts and images, None where ids cannot be told.
    """
    units: list[tuple[TableFile, Path | Url, int]] = []
    items: ItemStore | None = None
    with report.collecting():
        items = ItemStore.read(dataset, ("item_id", "category"))
        for file in dataset.items():
            parquet = open_parquet(file, ITEMS, ITEMS_REQUIRED, dataset.conventions)
            units += [(parquet, file, group) for group in range(parquet.num_row_groups)]
    if items is None:
        return None
    counts = dict.fromkeys(COUNTED, 0)
    read, decoded, problems = 0, 0, Problems()
    chosen = sampled(units, share)
    for at, (parquet, file, group) in enumerate(chosen):
        with report.collecting():
            table = read_row_group(parquet, group, present_columns(parquet, ITEMS), file)
            read += len(table)
            for name in set(COUNTED).intersection(table.column_names):
                counts[name] += len(table) - table[name].null_count
            if "image" in table.column_names:
                there = np.flatnonzero(table["image"].is_valid().to_numpy()).tolist()
                wanted = images * (at + 1) // len(chosen) - images * at // len(chosen)
                read_one = partial(_value, table["image"])
                locate = partial(Location, file, group, column="image")
                decoded += decode_some(there, wanted, read_one, locate, problems)
    report.add("items", problems, LEFT_OUT)
    report.facts["items"] = {
        "rows": len(items),
        **{f"with {name}": counts[name] / max(read, 1) for name in COUNTED},
        "images decoded": decoded,
    }
    for name, count in counts.items():
        if 0 < count < read:
            report.warn("items", f"{read - count:,} of {read:,} have no {name}")
    return items


def check_pairs(dataset: Dataset, items: ItemStore, images: int, report: Report) -> None:
    """Check all pairs, and decode some of the images that queries have of their own."""
    with report.collecting():
        pairs = PairDataset(dataset.pairs(), items, on_bad_row="skip", conventions=dataset.conventions)
        report.add("pairs", pairs.problems, LEFT_OUT)
        own, problems = np.flatnonzero(~pairs.query_is_item), Problems()
        decoded = decode_some(own.tolist(), images, pairs.query_image, pairs.query_location, problems)
        report.add("pairs", problems, LEFT_OUT)
        report.facts["pairs"] = {
            "rows": len(pairs) + pairs.skipped,
            "queries": len(np.unique(pairs.query_ids)),
            "bought items": len(np.unique(pairs.item_ids)),
            "with an image of their own": len(own) / len(pairs),
            "images decoded": decoded,
        }


def _value(column: pa.ChunkedArray, row: int) -> Any:
    return column[row].as_py()


def decode_some(
    rows: Sequence[int],
    wanted: int,
    read: Callable[[int], bytes],
    locate: Callable[[int], Location],
    problems: Problems,
) -> int:
    """Decode some of the images of rows, spread evenly; returns how many were tried."""
    chosen = sampled(rows, min(1.0, wanted / len(rows))) if wanted and rows else []
    for row in chosen:
        try:
            decode_image(read(row))
        except DataError:
            problems.add("the image cannot be decoded", 1, locate(row))
    return len(chosen)
