"""Pairs for C-SFT (§3.3): the image that a user searched with, and the item that was then bought or clicked.

Every pair comes with a hard negative: the one logged, or else the item of another pair of the same category.
It is drawn from what is bought, not from what is listed: otherwise the vectors learn to tell what sells from
what does not, which is easy, and is no interest.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset as TorchDataset

from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError, Location, Problems
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.query_images import QueryImages
from mim_torchrec.data.schema import (
    ORIGINAL,
    PAIRS,
    PAIRS_REQUIRED,
    SIGNALS,
    TableFile,
    open_parquet,
    present_columns,
    read_row_group,
)
from mim_torchrec.embeddings.remote.places import Url, place
from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

_NO_TIME = np.iinfo(np.int64).min


class PairDataset(TorchDataset):
    """Pairs by index: their ids are held in memory, images are read when they are asked for.

    An entry is a dict of `query_image` (bytes), `query_id`, `item_id` and `hard_negative_item_id` (ints). A
    pair whose `query_image` is null or not logged is a search with the image of the item `query_id`.

    Args:
        files: Parquet files of pairs, see `schema.PAIRS`.
        items: the items that the pairs name.
        signal: only pairs of this signal, "purchase" or "click"; None for all.
        seed: of the sampled hard negatives, with the epoch and the index of the pair.
        on_bad_row: what happens to a pair that names no item, or one that is not in the store: "fail" raises
            an error, "skip" leaves it out and counts it in `skipped`.
        cache: folder for an index of the query images, see `QueryImages`; None reads row groups again.
        conventions: of the data set, with which the files are compared; by default with each other only.

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
        cache: Path | None = None,
        conventions: Conventions | None = None,
        negatives_from: Literal["pairs", "items"] = "pairs",
    ) -> None:
        self._negatives_from = negatives_from
        if signal is not None and signal not in SIGNALS:
            raise OptionError(f"signal {signal!r} is not one of {', '.join(SIGNALS)}")
        self._items, self._seed, self._epoch = items, seed, 0
        shared = Conventions() if conventions is None else conventions
        groups = {
            place(file): open_parquet(file, PAIRS, PAIRS_REQUIRED, shared).num_row_groups for file in files
        }
        self._units = [(file, group) for file, count in groups.items() for group in range(count)]
        self._images = QueryImages(self._units, cache, shared)
        self.problems = Problems()
        """Of the pairs that are left out."""
        problems = self.problems if on_bad_row == "skip" else None
        read = list(_read(self._units, items, signal, problems, self._images, shared))
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
            log.warning("%d of %d pairs are left out: %s",
                        self.skipped, self.skipped + sum(len(part["item_id"]) for part in parts),
                        "; ".join(self.problems.lines()))  # fmt: skip
        self._usable: np.ndarray = items.item_ids
        self._unit, self._row = (np.concatenate([part[name] for part in parts]) for name in ("unit", "row"))
        self.query_ids: np.ndarray = np.concatenate([part["query_id"] for part in parts])
        self.item_ids: np.ndarray = np.concatenate([part["item_id"] for part in parts])
        self._logged: np.ndarray = np.concatenate([part["hard_negative_item_id"] for part in parts])
        self._has_logged: np.ndarray = np.concatenate([part["has_hard_negative"] for part in parts])
        self.query_is_item: np.ndarray = np.concatenate([part["is_item"] for part in parts])
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
        for name in ("query_ids", "item_ids", "_logged", "_has_logged", "query_is_item", "_times", "_unit",
                     "_row"):  # fmt: skip
            setattr(self, name, getattr(self, name)[keep])
        self._usable = usable_items
        self._members = self._members_by_category()

    def logged_negatives(self) -> np.ndarray:
        """(num_pairs,) int64, the hard negative of each pair that was logged, else the pair's own item."""
        return np.where(self._has_logged, self._logged, self.item_ids)

    def times(self) -> np.ndarray:
        """(num_pairs,) int64, microseconds since 1970. Raises DataError where a pair has no time."""
        missing = np.flatnonzero(self._times == _NO_TIME)
        if len(missing):
            where = self._place(int(missing[0]), "ts")
            problem = "is null or not there, so the last pairs cannot be held out"
            raise DataError(f"{problem}; --validation-fraction 0 trains on all", where.file, where.row_group,
                            where.row, where.column)  # fmt: skip
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
        return self._images.image(int(self._unit[index]), int(self._row[index]))

    def query_location(self, index: int) -> Location:
        """Where the query image comes from, for the message about one that cannot be decoded."""
        if self.query_is_item[index]:
            return self._items.location(int(self._items.rows_of(self.query_ids[index])), "image")
        return self._place(index, "query_image")

    def hard_negative(self, index: int) -> int:
        """Item id of the hard negative: the logged one, or a draw of (seed, epoch, index).

        The draw is the item of another pair, of the positive's category where there is one, without the
        positive and without the query where that is an item. Where all pairs have the same item, the draw is
        from all items. With `negatives_from` "items" it is one of all items of the category, else of all.
        """
        if self._has_logged[index]:
            return int(self._logged[index])
        rng = np.random.default_rng((self._seed, self._epoch, index))
        row = int(self._items.rows_of(self.item_ids[index]))
        excluded = {int(self.item_ids[index])}
        if self.query_is_item[index]:
            excluded.add(int(self.query_ids[index]))
        others = self.item_ids if self._negatives_from == "pairs" else self._usable
        for members in (self._members[self._category_of[row]], others, self._usable):
            if self._has_others(members, excluded):
                break
        while True:
            drawn = int(members[rng.integers(len(members))])
            if drawn not in excluded:
                return drawn

    def _members_by_category(self) -> list[np.ndarray]:
        self._category_of = self._items.category_codes()
        drawn = self.item_ids if self._negatives_from == "pairs" else self._usable
        categories = self._category_of[self._items.rows_of(drawn)]
        order = np.argsort(categories, kind="stable")
        count = np.bincount(categories, minlength=self._category_of.max() + 1)
        members = np.split(drawn[order], np.cumsum(count)[:-1])
        alone = sum(len(m) > 0 and len(np.unique(m)) == 1 for m in members)
        if alone:
            log.info("%d categories have one item to draw from; their hard negatives are of any", alone)
        return members

    def _place(self, index: int, column: str) -> Location:
        file, row_group = self._units[self._unit[index]]
        return Location(file, row_group, int(self._row[index]), column)

    @staticmethod
    def _has_others(members: np.ndarray, excluded: set[int]) -> bool:
        if any(int(member) not in excluded for member in members[:8]):
            return True
        return bool((~np.isin(members, list(excluded))).any())


def _read(
    units: Sequence[tuple[Path | Url, int]],
    items: ItemStore,
    signal: str | None,
    problems: Problems | None,
    images: QueryImages,
    conventions: Conventions,
) -> Iterator[dict]:
    """The pairs of each row group, without their images."""
    opened: tuple[Path | Url, TableFile] | None = None
    for unit, (file, group) in enumerate(units):
        if opened is None or opened[0] != file:
            opened = file, open_parquet(file, PAIRS, PAIRS_REQUIRED, conventions, originals=True)
        columns = tuple(name for name in present_columns(opened[1], PAIRS) if name != "query_image")
        if signal is not None and "signal" not in columns:
            problem = f"the column is missing, so pairs of signal {signal!r} cannot be told"
            raise DataError(f"{problem}; --interest-signal all takes all pairs", file, column="signal")
        table = read_row_group(opened[1], group, columns, file)
        yield _pairs(table, unit, file, group, items, signal, problems, images)


def _pairs(
    table: pa.Table,
    unit: int,
    file: Path | Url,
    group: int,
    items: ItemStore,
    signal: str | None,
    problems: Problems | None,
    images: QueryImages,
) -> dict:
    columns = table.column_names
    rows = np.arange(len(table))
    if "signal" in columns:
        known = pc.index_in(table["signal"].cast(pa.string()), pa.array(SIGNALS)).combine_chunks()
        if known.null_count:
            row = int(np.flatnonzero(known.is_null().to_numpy(zero_copy_only=False))[0])
            found = table["signal"][row].as_py()
            problem = f"{found!r} is not one of {', '.join(SIGNALS)}; fix the value, or leave the row out"
            raise DataError(problem, file, group, row, "signal")
        if signal is not None:
            rows = np.flatnonzero(known.to_numpy() == SIGNALS.index(signal))
    table = table.take(pa.array(rows))

    ids: dict[str, np.ndarray] = {}
    missing: dict[str, np.ndarray] = {}
    for name in ("query_id", "item_id", "hard_negative_item_id"):
        values = table[name] if name in columns else pa.chunked_array([pa.nulls(len(rows), pa.int64())])
        missing[name] = values.is_null().to_numpy()
        ids[name] = values.fill_null(0).cast(pa.int64()).to_numpy()
    bad = np.zeros(len(rows), bool)

    def refuse(found: np.ndarray, name: str, problem: str) -> None:
        if not found.any():
            return
        first = int(np.argmax(found))
        known = name + ORIGINAL in table.column_names
        item = table[name + ORIGINAL][first].as_py() if known else ids[name][first]
        where = Location(file, group, int(rows[first]), name)
        if problems is None:
            shown = f"{problem.format(item)}; --on-bad-row skip leaves such pairs out"
            raise DataError(shown, where.file, where.row_group, where.row, name)
        problems.add(problem.format("of the pair"), int(found.sum()), where)
        bad[found] = True

    for name in ("query_id", "item_id"):
        refuse(missing[name], name, "is null")
    is_item = images.are_null(unit)[rows]
    refuse(~items.has(ids["item_id"]), "item_id", "item {} is not in the item table")
    refuse(is_item & ~items.has(ids["query_id"]), "query_id",
           "item {} is not in the item table, and there is no query_image")  # fmt: skip
    given = ~missing["hard_negative_item_id"]
    refuse(given & ~items.has(ids["hard_negative_item_id"]), "hard_negative_item_id",
           "item {} is not in the item table")  # fmt: skip
    refuse(given & (ids["hard_negative_item_id"] == ids["item_id"]), "hard_negative_item_id",
           "item {} is the positive itself")  # fmt: skip
    if "ts" in columns:
        ts = table["ts"].cast(pa.int64()).fill_null(_NO_TIME).to_numpy()
    else:
        ts = np.full(len(rows), _NO_TIME)
    good = np.flatnonzero(~bad)
    return {
        **{name: values[good] for name, values in ids.items()},
        "has_hard_negative": given[good],
        "is_item": is_item[good],
        "ts": ts[good],
        "unit": np.full(len(good), unit, np.int32),
        "row": rows[good].astype(np.int32),
        "skipped": int(bad.sum()),
    }
