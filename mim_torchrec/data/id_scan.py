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
PENDING = 1 << 20
"""Ids that wait to be merged, at least."""


class IdCounts:
    """Ids, each once and ascending, and how often each occurs.

    >>> counts = IdCounts()
    >>> counts.add(np.array([7, 3]), np.array([1, 5]))
    >>> counts.add(np.array([7]), np.array([2]))
    >>> counts.ids.tolist(), counts.counts.tolist()
    ([3, 7], [5, 3])
    """

    def __init__(self) -> None:
        self._ids, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Count ids (n,) int64, repeated or not, in any order, `counts` (n,) times each."""
        self._pending.append((ids, counts))
        self._num_pending += len(ids)
        if self._num_pending >= max(PENDING, len(self._ids)):
            self._merge()

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, strictly ascending."""
        self._merge()
        return self._ids

    @property
    def counts(self) -> np.ndarray:
        """(n,) int64, in the order of `ids`."""
        self._merge()
        return self._counts

    def _merge(self) -> None:
        if not self._pending:
            return
        ids = np.concatenate([self._ids, *(ids for ids, _ in self._pending)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._pending)])
        self._pending, self._num_pending = [], 0
        order = np.argsort(ids, kind="stable")
        ids, counts = ids[order], counts[order]
        is_first = np.ones(len(ids), bool)
        is_first[1:] = ids[1:] != ids[:-1]
        starts = np.flatnonzero(is_first)
        self._ids = ids[starts]
        self._counts = np.add.reduceat(counts, starts) if len(starts) else counts


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
            for column in wanted:
                ids, counts = _distinct(table[column], kinds.get(column, Ids()))
                found.setdefault(vocabularies[column], IdCounts()).add(ids, counts)
    return found


def fingerprint(files: Sequence[Path | Url], features: Features) -> str:
    """Of all that `count_ids` depends on: it changes where a file does, by its size or its time."""
    known = [(str(file.absolute() if isinstance(file, Path) else file), *stat_of(file)) for file in files]
    kinds = {
        name: f"{type(one.kind).__module__}.{type(one.kind).__qualname__} {vars(one.kind)}"
        for name, one in features.by_name.items()
    }
    return hashlib.sha256(json.dumps([known, kinds]).encode()).hexdigest()[:32]


def _distinct(column: pa.ChunkedArray, kind: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a column of them, or of lists of them, without nulls, and how often each occurs."""
    values = column.combine_chunks()
    found = pc.value_counts(values.flatten() if is_list(values.type) else values)
    values, counts = found.field("values"), found.field("counts")
    known = values.is_valid()
    return kind.read(values.filter(known)), counts.filter(known).to_numpy(zero_copy_only=False)
