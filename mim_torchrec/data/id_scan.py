"""Distinct ids of request files and how often they occur, in the memory of the distinct ids.

Each rank scans its part of the row groups. What it has found so far is one union, into which new ids are
merged when they are as many: memory and time do not depend on how the files are cut into row groups.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.features import NO_FEATURES, Features, Ids
from mim_torchrec.data.schema import (
    REQUESTS,
    REQUESTS_REQUIRED,
    is_list,
    open_parquet,
    read_row_group,
)
from mim_torchrec.embeddings.remote.places import Url, stat_of

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "user_id": ("user_id",),
    "query_id": ("query_id",),
    "item_id": ("candidate_item_ids", "behavior_item_ids"),
    "category": ("candidate_categories", "behavior_categories"),
}
CANDIDATES = "candidate_item_ids"
OF_BEHAVIORS = ("behavior_item_ids", "behavior_categories")
PENDING = 1 << 20
"""Ids that wait to be merged, at least."""
FORMAT = 2
"""Of what is kept of a scan: 2 has impressions."""

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of the same length: ids, how often each occurs, in how many impressions."""


class IdCounts:
    """Ids, each once and ascending, how often each occurs, and in how many impressions.

    An impression is a candidate that was shown. Ids of a candidate occur in its impression; ids of a request
    occur in those of all its candidates; items and categories of behaviors occur in none. Side information of
    behaviors is of no candidate: there every behavior counts.

    >>> counts = IdCounts()
    >>> counts.add(np.array([7, 3]), np.array([1, 5]), np.array([0, 5]))
    >>> counts.add(np.array([7]), np.array([2]), np.array([2]))
    >>> counts.ids.tolist(), counts.counts.tolist(), counts.impressions.tolist()
    ([3, 7], [5, 3], [5, 2])
    """

    def __init__(self) -> None:
        self._columns: Columns = (np.zeros(0, np.int64),) * 3
        self._pending: list[Columns] = []
        self._num_pending = 0

    def add(self, ids: np.ndarray, counts: np.ndarray, impressions: np.ndarray | None = None) -> None:
        """Count ids (n,) int64, repeated or not, in any order.

        Args:
            ids: (n,) int64.
            counts: (n,) int64, how often each occurs.
            impressions: (n,) int64, in how many impressions; None counts none.
        """
        impressions = np.zeros(len(ids), np.int64) if impressions is None else impressions
        self._pending.append((ids, counts, impressions))
        self._num_pending += len(ids)
        if self._num_pending >= max(PENDING, len(self._columns[0])):
            self._merge()

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, strictly ascending."""
        return self._merge()[0]

    @property
    def counts(self) -> np.ndarray:
        """(n,) int64, in the order of `ids`."""
        return self._merge()[1]

    @property
    def impressions(self) -> np.ndarray:
        """(n,) int64, in the order of `ids`."""
        return self._merge()[2]

    def _merge(self) -> Columns:
        if self._pending:
            ids, *sums = map(np.concatenate, zip(self._columns, *self._pending, strict=True))
            self._pending, self._num_pending = [], 0
            order = np.argsort(ids, kind="stable")
            ids = ids[order]
            is_first = np.ones(len(ids), bool)
            is_first[1:] = ids[1:] != ids[:-1]
            starts = np.flatnonzero(is_first)
            counts, impressions = (
                np.add.reduceat(column[order], starts) if len(starts) else column for column in sums
            )
            self._columns = ids[starts], counts, impressions
        return self._columns


def scan_ids(
    files: Sequence[str | Path | Url],
    features: Features = NO_FEATURES,
    conventions: Conventions | None = None,
) -> dict[str, np.ndarray]:
    """Distinct ids of request files, for vocabularies; give it the training part only.

    Args:
        files: Parquet files of requests.
        features: further columns.
        conventions: of the data set, with which the files are compared.

    Returns:
        Name of a vocabulary → (n,) int64, ascending. Names whose columns the files do not have are left
        out.

    Raises:
        DataError: a file is malformed.
    """
    found = count_ids(files, features, conventions=conventions)
    return {name: counts.ids for name, counts in found.items()}


def count_ids(
    files: Sequence[str | Path | Url],
    features: Features = NO_FEATURES,
    rank: int = 0,
    world_size: int = 1,
    conventions: Conventions | None = None,
) -> dict[str, IdCounts]:
    """Ids of a rank's part of request files.

    Args:
        files: Parquet files of requests.
        features: further columns.
        rank: whose part; parts are row groups that follow one another, with about equally many rows.
        world_size: number of parts.
        conventions: of the data set, with which the files are compared.

    Returns:
        Name of a vocabulary → its ids. Names whose columns the files do not have, and all where the rank has
        no row group, are left out.

    Raises:
        DataError: a file is malformed.
    """
    kinds = {f.name: f.kind for f in features.by_name.values() if isinstance(f.kind, Ids)}
    vocabularies = {column: name for name, columns in COLUMNS.items() for column in columns}
    vocabularies |= {name: name for name in kinds}
    opened = (open_parquet(file, REQUESTS, REQUESTS_REQUIRED, conventions) for file in files)
    total = sum(parquet.metadata.num_rows for parquet in opened)
    found: dict[str, IdCounts] = {}
    first = 0
    for file in files:
        parquet = open_parquet(file, REQUESTS, REQUESTS_REQUIRED, conventions)
        wanted = [column for column in vocabularies if parquet.schema_arrow.get_field_index(column) >= 0]
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            middle, first = first + rows // 2, first + rows
            if middle * world_size // total != rank:
                continue
            table = read_row_group(parquet, group, wanted, file)
            shown = pc.list_value_length(table[CANDIDATES]).fill_null(0).to_numpy()
            for column in wanted:
                columns = distinct(column, table[column], kinds.get(column, Ids()), shown)
                found.setdefault(vocabularies[column], IdCounts()).add(*columns)
    return found


def fingerprint(files: Sequence[Path | Url], features: Features) -> str:
    """Of all that `count_ids` depends on: it changes where a file does, by its size or its time."""
    known = [(str(file.absolute() if isinstance(file, Path) else file), *stat_of(file)) for file in files]
    kinds = {
        name: f"{type(one.kind).__module__}.{type(one.kind).__qualname__} {vars(one.kind)}"
        for name, one in features.by_name.items()
    }
    return hashlib.sha256(json.dumps([FORMAT, known, kinds]).encode()).hexdigest()[:32]


def distinct(name: str, column: pa.ChunkedArray, kind: Ids, shown: np.ndarray) -> Columns:
    """Ids of a column of them, or of lists of them, without nulls, and their counts.

    Args:
        name: of the column.
        column: (num_requests,).
        kind: of the ids.
        shown: (num_requests,) candidates of each request.

    Returns:
        What :meth:`IdCounts.add` takes.
    """
    values = column.combine_chunks()
    of_request = not name.startswith(("candidate_", "behavior_"))
    if of_request and is_list(values.type):
        shown = shown.repeat(pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False))
    values = values.flatten() if is_list(values.type) else values
    if of_request:
        grouped = pa.table({"id": values, "shown": shown}).group_by("id", use_threads=False)
        sums = grouped.aggregate([([], "count_all"), ("shown", "sum")]).combine_chunks()
        found, counts, impressions = (sums[one].combine_chunks() for one in ("id", "count_all", "shown_sum"))
    else:
        pairs = pc.value_counts(values)
        found, counts = pairs.field("values"), pairs.field("counts")
        nothing = pa.array(np.zeros(len(counts), np.int64))
        impressions = nothing if name in OF_BEHAVIORS else counts
    known = found.is_valid()
    numbers = (one.filter(known).to_numpy(zero_copy_only=False) for one in (counts, impressions))
    return kind.read(found.filter(known)), *numbers
