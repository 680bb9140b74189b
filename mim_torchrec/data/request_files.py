"""Rows of request files by number, decoded and checked: what the reader of requests reads from.

Small row groups are decoded whole. Large ones are decoded in blocks, one after another, so that memory does
not depend on how the files were written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.data.columns import Jagged, RequestColumns, decode
from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError, Problems
from mim_torchrec.data.features import Features
from mim_torchrec.data.schema import (
    REQUESTS,
    REQUESTS_REQUIRED,
    WEIGHT,
    WEIGHTS,
    TableFile,
    computed,
    open_parquet,
    present_columns,
    read_row_group,
)
from mim_torchrec.embeddings.remote.places import StoreError, Url

OPEN_FILES = 32
"""Files that stay open, those that were read last."""
BLOCK_ROWS = 16 * 1024
"""Rows that are decoded at a time of a row group of more than twice as many."""
READ_BYTES = 1 << 20
"""Bytes of a column that are read at a time where a row group is decoded in blocks."""


GoodRows = dict[int, tuple[int, int, int]]
"""By the number of a row group: good rows, candidates of these, and bad rows."""


@dataclass(frozen=True)
class Unit:
    """A row group that has good rows.

    Attributes:
        file: that it is in.
        row_group: its number there.
        in_blocks: whether it is decoded in blocks.
        rows: good ones.
        candidates: of these rows.
    """

    file: Path | Url
    row_group: int
    in_blocks: bool
    rows: int
    candidates: int


@dataclass
class _Cursor:
    """Where the decoding of a row group is."""

    unit: Unit
    blocks: Iterator[tuple[RequestColumns, int]]
    block: RequestColumns
    first: int
    """Number of the block's first good row."""


class RequestFiles:
    """The good rows of files, numbered in their order.

    Args:
        files: Parquet files with the same columns, see `schema.REQUESTS`.
        max_behaviors: behaviors of a request that are kept, the last ones.
        on_bad_row: "fail" at a malformed row, or "skip" it; to skip, all rows are read once at the start.
        features: further columns.
        good_rows: what that reading has found already, see `count_good_rows`.
        conventions: of the data set, with which the files are compared; by default with each other only.
        originals: whether rows have ids as people know them, too.

    Attributes:
        columns: that the files have and rows hold.
        units: the row groups.
        skipped: malformed rows of all files; 0 where they fail.

    Raises:
        DataError: a file is malformed, or files differ in columns.
    """

    def __init__(
        self,
        files: Sequence[Path | Url],
        max_behaviors: int,
        on_bad_row: Literal["fail", "skip"],
        features: Features,
        good_rows: GoodRows | None = None,
        conventions: Conventions | None = None,
        originals: bool = False,
    ) -> None:
        self._conventions = Conventions() if conventions is None else conventions
        self._originals = originals
        self._max_behaviors, self._on_bad_row = max_behaviors, on_bad_row
        self._features = features
        self._opened: dict[Path | Url, TableFile] = {}
        self._cursor: _Cursor | None = None
        self.columns: tuple[str, ...] = ()
        self.skipped = 0
        self.units = list(self._scan(files))
        if on_bad_row == "skip":
            found = self._good_rows(range(len(self.units))) if good_rows is None else good_rows
            self.skipped = sum(bad for _, _, bad in found.values())
            self.units = [
                replace(unit, rows=found[k][0], candidates=found[k][1]) for k, unit in enumerate(self.units)
            ]
        self.units = [unit for unit in self.units if unit.rows]
        self._first = np.cumsum([0, *(unit.rows for unit in self.units)])[:-1]

    def read(self, numbers: np.ndarray) -> tuple[RequestColumns, np.ndarray]:
        """Read rows by their numbers (n,).

        Returns:
            Rows, more than asked for, and which of them (n,) are those asked for.
        """
        ascending = np.sort(numbers)
        of_row = np.searchsorted(self._first, ascending, side="right") - 1
        edges = np.flatnonzero(np.diff(of_row, prepend=-1))  # where the rows of a row group begin
        firsts, shifts = self._first[of_row[edges]], np.zeros(len(edges), np.int64)
        parts: list[RequestColumns] = []
        count = 0
        for place, (start, stop) in enumerate(zip(edges, [*edges[1:], len(ascending)], strict=True)):
            wanted = (ascending[start] - firsts[place], ascending[stop - 1] - firsts[place] + 1)
            found, offset = self._rows(self.units[of_row[start]], *map(int, wanted))
            shifts[place] = count - firsts[place] - offset
            parts += found
            count += sum(map(len, found))
        return _joined(parts), numbers + shifts[np.searchsorted(firsts, numbers, side="right") - 1]

    def checked(self, unit: Unit, problems: Problems) -> Iterator[tuple[RequestColumns, int]]:
        """The good rows of a row group in blocks, and how many were bad, with what is wrong with them.

        Raises:
            DataError: the row group cannot be read at all.
        """
        return self._decoded(unit.file, unit.row_group, unit.in_blocks, problems)

    def _rows(self, unit: Unit, start: int, stop: int) -> tuple[list[RequestColumns], int]:
        """Good rows of a row group, at least `start` to `stop`, and the number of the first one."""
        if self._cursor is None or self._cursor.unit != unit or self._cursor.first > start:
            blocks = self._decoded(unit.file, unit.row_group, unit.in_blocks)
            self._cursor = _Cursor(unit, blocks, next(blocks)[0], 0)
        cursor, offset = self._cursor, 0
        found: list[RequestColumns] = []
        while True:
            end = cursor.first + len(cursor.block)
            if end > start:
                offset = offset if found else cursor.first
                found.append(_view(cursor.block))
            if end >= stop:
                return found, offset
            cursor.block, cursor.first = next(cursor.blocks)[0], end

    def _scan(self, files: Sequence[Path | Url]) -> Iterator[Unit]:
        for file in files:
            parquet = open_parquet(file, REQUESTS, REQUESTS_REQUIRED, self._conventions)
            if parquet.is_empty:
                continue
            self._features.check(parquet, file)
            weights = tuple(n for n in (WEIGHT, WEIGHTS) if parquet.schema_arrow.get_field_index(n) >= 0)
            columns = present_columns(parquet, REQUESTS) + weights + self._features.columns
            if self.columns and columns != self.columns:
                problem = f"has columns {', '.join(columns)}, but {files[0]} has {', '.join(self.columns)}"
                raise DataError(f"{problem}; write all files with the same columns", file=file)
            if ("behavior_categories" in columns) != ("candidate_categories" in columns):
                raise DataError(
                    "categories of behaviors and of candidates go together; give both columns or none",
                    file=file,
                )
            self.columns = columns
            for group in range(parquet.num_row_groups):
                rows, candidates = _counts(parquet, group, file)
                yield Unit(file, group, rows > 2 * BLOCK_ROWS, rows, candidates)

    def _good_rows(self, numbers: range) -> GoodRows:
        found = {}
        for k in numbers:
            unit, counts = self.units[k], np.zeros(3, np.int64)
            for requests, bad in self._decoded(unit.file, unit.row_group, unit.in_blocks):
                counts += (len(requests), requests.candidate.lengths.sum(), bad)
            found[k] = (int(counts[0]), int(counts[1]), int(counts[2]))
        return found

    def _decoded(
        self, file: Path | Url, row_group: int, in_blocks: bool, problems: Problems | None = None
    ) -> Iterator[tuple[RequestColumns, int]]:
        """The good rows of a row group in blocks, or in one, and how many were bad."""
        if in_blocks:
            tables = _blocks(self._open(file, READ_BYTES), row_group, self.columns, file)
        else:
            parquet = self._opened.pop(file, None) or self._open(file)
            self._opened[file] = parquet
            if len(self._opened) > OPEN_FILES:
                del self._opened[next(iter(self._opened))]
            tables = iter([read_row_group(parquet, row_group, self.columns, file)])
        first = 0
        for table in tables:
            on_bad_row = self._on_bad_row if problems is None else "skip"
            yield decode(
                table, self._max_behaviors, on_bad_row, file, row_group, self._features, first, problems
            )
            first += len(table)

    def _open(self, file: Path | Url, buffer_size: int = 0) -> TableFile:
        """A file whose text is read as its dictionaries, which are all that is hashed."""
        checked = open_parquet(
            file, REQUESTS, REQUESTS_REQUIRED, self._conventions, originals=self._originals
        )
        leaves = [checked.schema.column(k) for k in range(len(checked.schema))]
        leaves = [leaf for leaf in leaves if leaf.path.split(".")[0] in self.columns]
        text = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        if not text and not buffer_size:
            return checked
        return checked.reopened(read_dictionary=text, buffer_size=buffer_size)


def count_good_rows(
    files: Sequence[Path | Url],
    features: Features,
    rank: int = 0,
    world_size: int = 1,
    conventions: Conventions | None = None,
) -> GoodRows:
    """Read and check some of the row groups of files, so that ranks can divide them.

    Args:
        files: see `RequestFiles`.
        features: further columns.
        rank: reads the row groups `rank`, `rank` + `world_size`, …
        world_size: number of ranks.
        conventions: of the data set.
    """
    found = RequestFiles(files, 1, "fail", features, conventions=conventions)
    found._on_bad_row = "skip"
    return found._good_rows(range(rank, len(found.units), world_size))


def _blocks(
    parquet: TableFile, row_group: int, columns: Sequence[str], file: Path | Url
) -> Iterator[pa.Table]:
    """Columns of a row group, `BLOCK_ROWS` rows at a time. Raises DataError if its bytes are damaged."""
    batches = parquet.iter_batches(BLOCK_ROWS, [row_group], list(columns), use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except StoreError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot be read ({error}); copy or write it again", file=file, row_group=row_group
            ) from None
        if batch is None:
            return
        yield computed(pa.Table.from_batches([batch]), parquet, file, row_group)


def _counts(parquet: pq.ParquetFile, row_group: int, file: Path | Url) -> tuple[int, int]:
    """Rows and candidates of a row group, from the footer of the file. Raises DataError if it is damaged."""
    try:
        group = parquet.metadata.row_group(row_group)
        column = next(
            group.column(k) for k in range(group.num_columns)
            if group.column(k).path_in_schema.split(".")[0] == "labels"
        )  # fmt: skip
    except (UnicodeDecodeError, StopIteration) as error:
        problem = f"the footer is damaged ({type(error).__name__}: {error}); copy or write the file again"
        raise DataError(problem, file=file, row_group=row_group) from None
    return group.num_rows, column.num_values


def _view(rows: RequestColumns) -> RequestColumns:
    """The same arrays, which can be taken from it and stay in the other."""

    def view(jagged: Jagged) -> Jagged:
        return Jagged(jagged.lengths, dict(jagged.values))

    ids = {name: view(jagged) for name, jagged in rows.ids.items()}
    return RequestColumns(dict(rows.scalars), view(rows.behavior), view(rows.candidate), ids)


def _joined(parts: list[RequestColumns]) -> RequestColumns:
    """One of parts that have the same columns, which are taken from them, so that none is there twice."""
    if len(parts) == 1:
        return parts[0]

    def one(columns: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([column.pop(name) for column in columns]) for name in list(columns[0])}

    def lists(jagged: list[Jagged]) -> Jagged:
        return Jagged(np.concatenate([j.lengths for j in jagged]), one([j.values for j in jagged]))

    return RequestColumns(
        one([part.scalars for part in parts]),
        lists([part.behavior for part in parts]),
        lists([part.candidate for part in parts]),
        {name: lists([part.ids[name] for part in parts]) for name in parts[0].ids},
    )
