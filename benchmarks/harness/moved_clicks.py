"""Clicked items that content moved up most, with what their users did before: pictures for a report."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mim_torchrec.benchmarks.harness.comparison import read_predictions
from mim_torchrec.benchmarks.harness.pages import Strip
from mim_torchrec.data.images import encode_jpeg
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset

BEHAVIORS = 4
THUMBNAIL = 96


def moved_clicks(base: Path, mim: Path, dataset: Dataset, items: ItemStore, count: int = 6) -> list[Strip]:
    """Test requests in which MIM ranks the clicked item highest above where Base ranks it, one a user.

    Args:
        base: directory of the Base run.
        mim: directory of the MIM run, on the same data.
        dataset: the data set, with requests and items by number.
        items: of the data set, with titles and images.
        count: requests at most.

    Returns:
        Of each request the last behaviors and the clicked item.

    Raises:
        ValueError: the runs have not scored the same impressions.
    """
    rows = read_predictions(base)
    other = read_predictions(mim)
    for name in ("request_id", "item_id", "label"):
        if not np.array_equal(rows[name], other[name]):
            raise ValueError(f"{mim} and {base} differ in {name}: not the same test impressions")
    before, after = (_ranks(rows["request_id"], scores) for scores in (rows["score"], other["score"]))
    rise = np.where(rows["label"] == 1, before - after, 0)
    found: dict[int, int] = {}  # of each user, the impression that rose most
    for k in np.argsort(-rise, kind="stable"):
        if rise[k] <= 0 or len(found) == count:
            break
        found.setdefault(int(rows["user_id"][k]), int(k))
    chosen = list(found.values())
    histories = _histories(dataset, rows["request_id"][chosen])
    strips = []
    for k in chosen:
        behaviors = histories[int(rows["request_id"][k])][-BEHAVIORS:]
        shown = items.rows_of(np.array([*behaviors, rows["item_id"][k]], np.int64))
        titles = items.titles(shown)
        pictures = [encode_jpeg(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))
                    for image in items.images(shown)]  # fmt: skip
        size = int((rows["request_id"] == rows["request_id"][k]).sum())
        strips.append(
            Strip(
                pictures=list(zip(pictures, titles, strict=True)),
                caption=f"{titles[-1]}: rank {before[k]} of {size} by Base, {after[k]} by MIM",
            )
        )
    return strips


def _ranks(requests: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Rank of each impression in its request from 1, the highest score first.

    >>> _ranks(np.array([7, 7, 7, 8]), np.array([0.1, 0.3, 0.2, 0.5]))
    array([3, 1, 2, 1])
    """
    order = np.lexsort((-scores, requests))
    _, first, group = np.unique(requests[order], return_index=True, return_inverse=True)
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - first[group] + 1
    return ranks


def _histories(dataset: Dataset, requests: np.ndarray) -> dict[int, list[int]]:
    """Item ids of the behaviors of test requests, the oldest first."""
    wanted = pa.array(requests)
    found: dict[int, list[int]] = {}
    for file in dataset.requests("test"):
        table = pq.read_table(str(file), columns=["request_id", "behavior_item_ids"])
        kept = table.filter(pc.is_in(table["request_id"], value_set=wanted))
        found |= dict(zip(*(column.to_pylist() for column in kept.columns), strict=True))
    return found
