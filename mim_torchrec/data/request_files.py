"""Rows of request files by number, decoded and checked: what the reader of requests reads from.

Small row groups are decoded whole. Large ones are decoded in blocks, one after another, so that memory does
not depend on how the files were written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.data.columns import decode
from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError, Problems
from mim_torchrec.data.features import Features
from mim_torchrec.data.request_buffer import RequestBuffer
from mim_torchrec.data.request_columns import RequestColumns
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
    read_row_groups,
)
from mim_torchrec.embeddings.remote.places import StoreError, Url

OPEN_FILES = 32
"""Files that stay open, those that were read last."""
BLOCK_ROWS = 8 * 1024
"""Rows that are decoded at a time of a row group of more than four times as many."""
READ_BYTES = 1 << 20
"""Bytes of a column that are read at a time where a row group is decoded in blocks."""
MOST_VALUES = 1 << 19
"""Values of a column up to which row groups are read at once; Arrow doubles its memory again and again for
more, and gets it from the system each time."""

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
        values: of the longest column, of all rows.
    """

    file: Path | Url
    row_group: int
    in_blocks: bool
    rows: int
    candidates: int
    values: int


class _Wanted(NamedTuple):
    """Good rows of a row group, `start` to `stop`."""

    unit: Unit
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether they are all its rows, which are decoded at once."""
        return not self.unit.in_blocks and self.stop - self.start == self.unit.rows


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

    def read(self, numbers: np.ndarray, buffer: RequestBuffer) -> tuple[RequestColumns, np.ndarray]:
        """Read rows by their numbers (n,) into a buffer.

        Returns:
            Rows, until the buffer is filled again, more than asked for if numbers are left out between
            others; and which of them (n,) are those asked for.
        """
        ascending = np.sort(numbers)
        of_row = np.searchsorted(self._first, ascending, side="right") - 1
        edges = np.flatnonzero(np.diff(of_row, prepend=-1))  # where the rows of a row group begin
        wanted = [
            _Wanted(self.units[k], int(ascending[start] - self._first[k]),
                    int(ascending[stop - 1] - self._first[k]) + 1)
            for k, start, stop in zip(of_row[edges], edges, [*edges[1:], len(ascending)], strict=True)
        ]  # fmt: skip
        buffer.clear(sum(one.stop - one.start for one in wanted))
        places: list[int] = []  # of the first row of each row group among those of the buffer
        for run in _runs(wanted):
            together = self._together(run) if len(run) > 1 else None
            if together is not None:
                places += (len(buffer) + np.cumsum([0, *(one.unit.rows for one in run[:-1])])).tolist()
                buffer.add(together)
                continue
            for one in run:
                is_begun = False
                for first, block in self._rows(*one):  # what counts them would keep a block in memory
                    places += [] if is_begun else [len(buffer) - first]
                    is_begun = True
                    buffer.add(block)
                    del block
        firsts = self._first[of_row[edges]]
        shifts = np.array(places) - firsts
        return buffer.requests(), numbers + shifts[np.searchsorted(firsts, numbers, side="right") - 1]

    def _together(self, run: Sequence["_Wanted"]) -> RequestColumns | None:
        """The good rows of row groups of one file; None where reading each alone says what is wrong."""
        file, groups = run[0].unit.file, [one.unit.row_group for one in run]
        parquet = self._kept_open(file)
        try:
            table = read_row_groups(parquet, groups, self.columns, file)
            found, _ = decode(table, self._max_behaviors, self._on_bad_row, file, groups[0], self._features)
        except DataError:
            return None
        return found

    def checked(self, unit: Unit, problems: Problems) -> Iterator[tuple[RequestColumns, int]]:
        """The good rows of a row group in blocks, and how many were bad, with what is wrong with them.

        Raises:
            DataError: the row group cannot be read at all.
        """
        return self._decoded(unit.file, unit.row_group, unit.in_blocks, problems)

    def _rows(self, unit: Unit, start: int, stop: int) -> Iterator[tuple[int, RequestColumns]]:
        """Good rows `start` to `stop` of a row group, in blocks, each with the number of its first one."""
        if self._cursor is None or self._cursor.unit != unit or self._cursor.first > start:
            blocks = self._decoded(unit.file, unit.row_group, unit.in_blocks)
            self._cursor = _Cursor(unit, blocks, next(blocks)[0], 0)
        cursor = self._cursor
        while True:
            end = cursor.first + len(cursor.block)
            if end > start:
                begin = max(cursor.first, start)
                yield begin, cursor.block.between(begin - cursor.first, min(end, stop) - cursor.first)
            if end >= stop:
                break
            blocks, self._cursor = cursor.blocks, None
            del cursor  # its block is not in memory beside the next one
            cursor = self._cursor = _Cursor(unit, blocks, next(blocks)[0], end)
        if end >= unit.rows:
            self._cursor = None  # nothing is left to read

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
                rows, candidates, values = _counts(parquet, group, file)
                yield Unit(file, group, rows > 4 * BLOCK_ROWS, rows, candidates, values)

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
            tables = iter([read_row_group(self._kept_open(file), row_group, self.columns, file)])
        first = 0
        on_bad_row = self._on_bad_row if problems is None else "skip"
        while (table := next(tables, None)) is not None:
            rows = len(table)
            found = decode(
                table, self._max_behaviors, on_bad_row, file, row_group, self._features, first, problems
            )
            del table  # what is handed on is not in memory twice, nor beside the next block
            yield found
            del found
            first += rows

    def _kept_open(self, file: Path | Url) -> TableFile:
        parquet = self._opened.pop(file, None) or self._open(file)
        self._opened[file] = parquet
        if len(self._opened) > OPEN_FILES:
            del self._opened[next(iter(self._opened))]
        return parquet

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
        # a store answers few large reads sooner; of a local file a row group need not be in memory as a whole
        at_once = not buffer_size or isinstance(file, Url)
        return checked.reopened(read_dictionary=text, buffer_size=buffer_size, pre_buffer=at_once)


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
        table = computed(pa.Table.from_batches([batch]), parquet, file, row_group)
        del batch
        yield table
        del table


def _counts(parquet: pq.ParquetFile, row_group: int, file: Path | Url) -> tuple[int, int, int]:
    """Rows and candidates of a row group, and values of its longest column, from the footer of the file.
    Raises DataError if it is damaged."""
    try:
        group = parquet.metadata.row_group(row_group)
        columns = [group.column(k) for k in range(group.num_columns)]
        labels = next(column for column in columns if column.path_in_schema.split(".")[0] == "labels")
    except (UnicodeDecodeError, StopIteration) as error:
        problem = f"the footer is damaged ({type(error).__name__}: {error}); copy or write the file again"
        raise DataError(problem, file=file, row_group=row_group) from None
    return group.num_rows, labels.num_values, max(column.num_values for column in columns)


def _runs(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Row groups that are read together: of one file, all rows of them, in one piece."""
    run: list[_Wanted] = []
    for one in wanted:
        values = sum(each.unit.values for each in run) + one.unit.values
        fits = run and one.unit.file == run[0].unit.file and values <= MOST_VALUES
        if run and not (fits and one.is_whole and run[0].is_whole):
            yield run
            run = []
        run.append(one)
    yield run
