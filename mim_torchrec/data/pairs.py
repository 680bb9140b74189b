"""Pairs for C-SFT (§3.3): the image that a user searched with, and the item that was then bought or clicked.

Every pair comes with a hard negative: the one logged, or else the item of another pair of the same category.
It is drawn from what is bought, not from what is listed: otherwise the vectors learn to tell what sells from
what does not, which is easy, and is no interest.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset as TorchDataset

from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import (
    PAIRS,
    PAIRS_REQUIRED,
    SIGNALS,
    TIME,
    open_parquet,
    present_columns,
    read_row_group,
)
from mim_torchrec.embeddings.remote.places import Url, place
from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

_NO_TIME = np.iinfo(np.int64).min


class PairDataset(TorchDataset):
    """Pairs by index, held in memory.

    An entry is a dict of `query_image` (bytes), `query_id`, `item_id` and `hard_negative_item_id` (ints). A
    pair whose `query_image` is null or not logged is a search with the image of the item `query_id`.

    Args:
        files: Parquet files of pairs, see `schema.PAIRS`.
        items: the items that the pairs name.
        signal: only pairs of this signal, "purchase" or "click"; None for all.
        seed: of the sampled hard negatives, with the epoch and the index of the pair.
        on_bad_row: what happens to a pair that names no item, or one that is not in the store: "fail" raises
            an error, "skip" leaves it out and counts it in `skipped`.

    `query_ids`, `item_ids` (num_pairs,) int64 and `query_is_item` (num_pairs,) bool are there for those who
    work with vectors computed once per query and item.

    Raises:
        DataError: a file is malformed, an item is not in the store, or no pair has the signal.
    """

    def __init__(
        self,
        files: Sequence[str | Path | Url],
        items: ItemStore,
        *,
        signal: str | None = None,
        seed: int = 0,
        on_bad_row: Literal["fail", "skip"] = "fail",
    ) -> None:
        if signal is not None and signal not in SIGNALS:
            raise OptionError(f"signal {signal!r} is not one of {', '.join(SIGNALS)}")
        self._items, self._seed, self._epoch = items, seed, 0
        read = [part for file in files for part in _read(place(file), items, signal, on_bad_row == "skip")]
        parts = [part for part in read if len(part["item_id"])]
        self.skipped: int = sum(part["skipped"] for part in read)
        if not parts:
            left = f" ({self.skipped} pairs are left out)" if self.skipped else ""
            what = "no pair" if signal is None else f"no pair with signal {signal!r}"
            remedy = (
                "fix the pairs" if signal is None else "--interest-signal all takes pairs of every signal"
            )
            raise DataError(f"{what}{left}; {remedy}", file=files[0] if files else None)
        if self.skipped:
            log.warning("%d of %d pairs are left out: they name no item, or one that is not there",
                        self.skipped, self.skipped + sum(len(part["item_id"]) for part in parts))  # fmt: skip
        self._usable: np.ndarray = items.item_ids
        self._images = pa.chunked_array([part["query_image"] for part in parts])
        self._origin = [origin for part in parts for origin in part["origin"]]
        self.query_ids: np.ndarray = np.concatenate([part["query_id"] for part in parts])
        self.item_ids: np.ndarray = np.concatenate([part["item_id"] for part in parts])
        self._logged: np.ndarray = np.concatenate([part["hard_negative_item_id"] for part in parts])
        self._has_logged: np.ndarray = np.concatenate([part["has_hard_negative"] for part in parts])
        self.query_is_item: np.ndarray = self._images.is_null().to_numpy()
        self._times: np.ndarray = np.concatenate([part["ts"] for part in parts])
        if len(items) < 3:
            raise DataError(
                f"{len(items)} items are too few to draw hard negatives from; at least 3 are needed"
            )
        self._members = self._members_by_category()

    def __len__(self) -> int:
        return len(self.item_ids)

    def set_epoch(self, epoch: int) -> None:
        """Choose the sampled hard negatives."""
        self._epoch = epoch

    def select(self, keep: np.ndarray, usable_items: np.ndarray) -> None:
        """Leave out pairs, and items from the hard negatives.

        Args:
            keep: (num_pairs,) bool, the pairs that stay.
            usable_items: (n,) int64, item ids that a sampled hard negative may have.

        Raises:
            DataError: no pair stays, or fewer than three items.
        """
        if not keep.any() or len(usable_items) < 3:
            found = f"{int(keep.sum())} pairs and {len(usable_items)} items are left"
            raise DataError(f"{found}; at least 1 and 3 with readable images are needed")
        index = np.flatnonzero(keep)
        self._images = self._images.take(pa.array(index))
        self._origin = [self._origin[i] for i in index]
        for name in ("query_ids", "item_ids", "_logged", "_has_logged", "query_is_item", "_times"):
            setattr(self, name, getattr(self, name)[index])
        self._usable = usable_items
        self._members = self._members_by_category()

    def logged_negatives(self) -> np.ndarray:
        """(num_pairs,) int64, the hard negative of each pair that was logged, else the pair's own item."""
        return np.where(self._has_logged, self._logged, self.item_ids)

    def times(self) -> np.ndarray:
        """(num_pairs,) int64, microseconds since 1970. Raises DataError where a pair has no time."""
        missing = np.flatnonzero(self._times == _NO_TIME)
        if len(missing):
            file, row_group, row = self._origin[missing[0]]
            problem = "is null or not there, so the last pairs cannot be held out"
            raise DataError(f"{problem}; --validation-fraction 0 trains on all", file, row_group, row, "ts")
        return self._times

    def __getitem__(self, index: int) -> dict[str, bytes | int]:
        index = range(len(self))[index]
        return {
            "query_image": self.query_image(index),
            "query_id": int(self.query_ids[index]),
            "item_id": int(self.item_ids[index]),
            "hard_negative_item_id": self.hard_negative(index),
        }

    def query_image(self, index: int) -> bytes:
        """Encoded image of the query."""
        if self.query_is_item[index]:
            return self._items.image_bytes(self._items.rows_of(self.query_ids[index : index + 1]))[0]
        return self._images[index].as_py()

    def query_location(self, index: int) -> Location:
        """Where the query image comes from, for the message about one that cannot be decoded."""
        if self.query_is_item[index]:
            return self._items.location(int(self._items.rows_of(self.query_ids[index])), "image")
        file, row_group, row = self._origin[index]
        return Location(file, row_group, row, "query_image")

    def hard_negative(self, index: int) -> int:
        """Item id of the hard negative: the logged one, or a draw of (seed, epoch, index).

        The draw is the item of another pair, of the positive's category where there is one, without the
        positive and without the query where that is an item. Where all pairs have the same item, the draw is
        from all items.
        """
        if self._has_logged[index]:
            return int(self._logged[index])
        rng = np.random.default_rng((self._seed, self._epoch, index))
        row = int(self._items.rows_of(self.item_ids[index]))
        excluded = {int(self.item_ids[index])}
        if self.query_is_item[index]:
            excluded.add(int(self.query_ids[index]))
        for members in (self._members[self._category_of[row]], self.item_ids, self._usable):
            if self._has_others(members, excluded):
                break
        while True:
            drawn = int(members[rng.integers(len(members))])
            if drawn not in excluded:
                return drawn

    def _members_by_category(self) -> list[np.ndarray]:
        names = self._items.categories(np.arange(len(self._items)))
        _, self._category_of = np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)
        bought = self._category_of[self._items.rows_of(self.item_ids)]
        order = np.argsort(bought, kind="stable")
        count = np.bincount(bought, minlength=self._category_of.max() + 1)
        members = np.split(self.item_ids[order], np.cumsum(count)[:-1])
        alone = sum(len(m) > 0 and len(np.unique(m)) == 1 for m in members)
        if alone:
            log.info("%d categories have pairs of one item only; their hard negatives are of any", alone)
        return members

    @staticmethod
    def _has_others(members: np.ndarray, excluded: set[int]) -> bool:
        if any(int(member) not in excluded for member in members[:8]):
            return True
        return bool((~np.isin(members, list(excluded))).any())


def _read(file: Path | Url, items: ItemStore, signal: str | None, skip: bool) -> list[dict]:
    parquet = open_parquet(file, PAIRS, PAIRS_REQUIRED)
    columns = present_columns(parquet, PAIRS)
    if signal is not None and "signal" not in columns:
        problem = f"the column is missing, so pairs of signal {signal!r} cannot be told"
        raise DataError(f"{problem}; --interest-signal all takes all pairs", file, column="signal")
    return [
        _read_group(parquet, file, group, columns, items, signal, skip)
        for group in range(parquet.num_row_groups)
    ]


def _read_group(
    parquet: pq.ParquetFile,
    file: Path | Url,
    group: int,
    columns: Sequence[str],
    items: ItemStore,
    signal: str | None,
    skip: bool,
) -> dict:
    table = read_row_group(parquet, group, columns, file)
    rows = np.arange(len(table))
    if "signal" in columns:
        signals = table["signal"].to_pylist()
        for row, found in enumerate(signals):
            if found not in SIGNALS:
                problem = f"{found!r} is not one of {', '.join(SIGNALS)}; fix the value, or leave the row out"
                raise DataError(problem, file, group, row, "signal")
        if signal is not None:
            rows = np.flatnonzero(np.array([found == signal for found in signals], bool))
    table = table.take(pa.array(rows))

    ids: dict[str, np.ndarray] = {}
    missing: dict[str, np.ndarray] = {}
    for name in ("query_id", "item_id", "hard_negative_item_id"):
        values = table[name] if name in columns else pa.chunked_array([pa.nulls(len(rows), pa.int64())])
        missing[name] = values.is_null().to_numpy()
        ids[name] = values.fill_null(0).cast(pa.int64()).to_numpy()
    if "query_image" in columns:
        images = table["query_image"].cast(pa.large_binary()).combine_chunks()
    else:
        images = pa.nulls(len(rows), pa.large_binary())

    bad = np.zeros(len(rows), bool)

    def refuse(found: np.ndarray, name: str, problem: str) -> None:
        if found.any() and not skip:
            first = int(np.argmax(found))
            shown = f"{problem.format(ids[name][first])}; --on-bad-row skip leaves such pairs out"
            raise DataError(shown, file, group, int(rows[first]), name)
        bad[found] = True

    for name in ("query_id", "item_id"):
        refuse(missing[name], name, "is null")
    is_item = images.is_null().to_numpy(zero_copy_only=False)
    refuse(~np.isin(ids["item_id"], items.item_ids), "item_id", "item {} is not in the item table")
    refuse(is_item & ~np.isin(ids["query_id"], items.item_ids), "query_id",
           "item {} is not in the item table, and there is no query_image")  # fmt: skip
    given = ~missing["hard_negative_item_id"]
    refuse(given & ~np.isin(ids["hard_negative_item_id"], items.item_ids), "hard_negative_item_id",
           "item {} is not in the item table")  # fmt: skip
    refuse(given & (ids["hard_negative_item_id"] == ids["item_id"]), "hard_negative_item_id",
           "item {} is the positive itself")  # fmt: skip
    if "ts" in columns:
        ts = table["ts"].cast(TIME).cast(pa.int64()).fill_null(_NO_TIME).to_numpy()
    else:
        ts = np.full(len(rows), _NO_TIME)
    good = np.flatnonzero(~bad)
    return {
        **{name: values[good] for name, values in ids.items()},
        "has_hard_negative": given[good],
        "query_image": images.take(pa.array(good)),
        "ts": ts[good],
        "origin": [(file, group, int(row)) for row in rows[good]],
        "skipped": int(bad.sum()),
    }
