"""Vectors of another team in Parquet: a column of ids, and one of lists, as in the public TAOBAO-MM data, or
many columns of one number each.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mim_torchrec.embeddings.stable_ids import IdCollision, holds_ids, is_text_id, stable_ids
from mim_torchrec.embeddings.table.external import as_delivered, batch_rows, delivered_dtype, type_name
from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.embeddings.table.shards import CHUNK

VALUE_TYPES = {
    pa.int8(): torch.int8,
    pa.float16(): torch.float16,
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
    pa.uint8(): torch.uint8,
    pa.int16(): torch.int16,
    pa.uint16(): torch.uint16,
    pa.int32(): torch.int32,
}
VALUES = ", ".join(map(type_name, VALUE_TYPES.values()))
USUAL = (pa.int8(), pa.float16(), pa.float32(), pa.float64())  # lists of other integers may be something else


class ParquetSource:
    """A Parquet file with a column of ids and one of lists of numbers, all of one length, or wide columns.

    Args:
        path: the file.
        id_column: column of the ids: integers, text or UUIDs; ``None`` takes the only one of integers, or
            where there is none, the only one of text or UUIDs.
        vector_column: column of the vectors, or a name with one ``*`` for wide columns: ``v*`` takes v0, v1
            and so on in the order of their numbers. ``None`` takes the only column of lists of floats or
            int8, or where there is none, the only one of lists of other integers.

    Raises:
        TableError: it is no Parquet file, or has no such columns.
    """

    format = "parquet"

    def __init__(self, path: Path, id_column: str | None, vector_column: str | None) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowInvalid, OSError) as error:
            raise TableError(f"{path}: not a readable Parquet file ({error})") from None
        has_integers = any(pa.types.is_integer(field.type) for field in schema)
        fits = pa.types.is_integer if id_column is None and has_integers else holds_ids
        ids = _column(path, schema, id_column, fits, "ids", "integers, text or UUIDs", "--id-column")
        self._wide: list[str] = []
        if vector_column is not None and "*" in vector_column:
            self._wide = _wide_columns(path, schema, vector_column)
            self.columns = (ids, vector_column)
            kind = schema.field(self._wide[0]).type
        else:
            has_usual = any(_is_usual_vector(field.type) for field in schema)
            fits = _is_usual_vector if vector_column is None and has_usual else _is_vector
            types = f"lists of {VALUES}"
            self.columns = (
                ids, _column(path, schema, vector_column, fits, "vectors", types, "--vector-column")
            )  # fmt: skip
            kind = schema.field(self.columns[1]).type.value_type
        self.has_text_ids = is_text_id(schema.field(ids).type)
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self.rows = metadata.num_rows
        self.dtype = delivered_dtype(VALUE_TYPES[kind])
        self.dim = len(self._wide) or (self._first_length() if self.rows else 0)

    def ids(self) -> Iterator[Tensor]:
        start = 0
        for batch in self._batches(CHUNK, self.columns[:1]):
            yield self._ids(batch, start)
            start += batch.num_rows

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        columns = [self.columns[0], *(self._wide or self.columns[1:])]
        for batch in self._batches(batch_rows(self.dim), columns):
            ids = self._ids(batch, start)
            yield ids, as_delivered(self, ids, self._vectors(batch, ids, start), start)
            start += batch.num_rows

    def place(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.path}: row group {group} row {row - int(self._starts[group])}"

    def _batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        try:  # opened again: a directory may have more files than a process may hold open
            with pq.ParquetFile(
                self.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            ) as file:
                yield from file.iter_batches(rows, columns=list(columns), use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise TableError(f"{self.path}: columns {list(columns)} cannot be read ({error})") from None

    def _first_length(self) -> int:
        vectors = next(self._batches(1, self.columns[1:])).column(0)
        if vectors.null_count:
            raise self._error(0, None, "there is no vector (null)")
        if not (dim := len(vectors[0])):
            raise self._error(0, None, "the vector has no values")
        return dim

    def _ids(self, batch: pa.RecordBatch, start: int) -> Tensor:
        ids = batch.column(self.columns[0])
        if ids.null_count:
            row = start + _first(ids.is_null())
            raise TableError(
                f"{self.place(row)}, column {self.columns[0]!r}: there is no id (null); leave it out"
            )
        try:
            return torch.from_numpy(np.array(stable_ids(ids)))
        except IdCollision as error:
            raise TableError(f"{self.path}, column {self.columns[0]!r}: {error}") from None

    def _vectors(self, batch: pa.RecordBatch, ids: Tensor, start: int) -> Tensor:
        if self._wide:
            return self._side_by_side(batch, ids, start)
        vectors = batch.column(self.columns[1])
        if vectors.null_count:
            row = _first(vectors.is_null())
            raise self._error(start + row, int(ids[row]), "there is no vector (null)")
        lengths = np.array(vectors.value_lengths())
        if (wrong := np.flatnonzero(lengths != self.dim)).size:
            row = int(wrong[0])
            problem = f"the vector has {lengths[row]} values, the first of the file has {self.dim}"
            raise self._error(start + row, int(ids[row]), problem)
        values = vectors.flatten()
        if values.null_count:
            row = _first(values.is_null()) // self.dim
            raise self._error(start + row, int(ids[row]), "a value of the vector is null")
        return torch.from_numpy(np.array(values)).reshape(-1, self.dim)

    def _side_by_side(self, batch: pa.RecordBatch, ids: Tensor, start: int) -> Tensor:
        for name in self._wide:
            if batch.column(name).null_count:
                row = _first(batch.column(name).is_null())
                raise self._error(start + row, int(ids[row]), f"the value of {name!r} is null")
        return torch.from_numpy(np.stack([np.array(batch.column(name)) for name in self._wide], axis=1))

    def _error(self, row: int, item: int | None, problem: str) -> TableError:
        item_id = "" if item is None else f", item id {item}"
        return TableError(
            f"{self.place(row)}{item_id}, column {self.columns[1]!r}: {problem}; leave the row out or fix it"
        )


def _is_vector(column: pa.DataType) -> bool:
    is_list = (
        pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column)
    )
    return is_list and column.value_type in VALUE_TYPES


def _is_usual_vector(column: pa.DataType) -> bool:
    return _is_vector(column) and column.value_type in USUAL


def _wide_columns(path: Path, schema: pa.Schema, pattern: str) -> list[str]:
    """Columns whose names are the pattern with a number for its ``*``, in the order of the numbers."""
    before, _, after = pattern.partition("*")
    numbered = re.compile(re.escape(before) + r"([0-9]+)" + re.escape(after))
    found = {int(match[1]): match[0] for name in schema.names if (match := numbered.fullmatch(name))}
    numbers = sorted(found)
    first = numbers[0] if numbers else 0
    if first > 1 or numbers != list(range(first, first + len(numbers))) or not numbers:
        shown = ", ".join(found[number] for number in numbers[:5]) or "none"
        raise TableError(
            f"{path}: the columns {pattern!r} are not numbered from 0 or 1 without gaps ({shown}); there are "
            f"{', '.join(schema.names)}"
        )
    names = [found[number] for number in numbers]
    kinds = {schema.field(name).type for name in names}
    if len(kinds) > 1 or kinds - VALUE_TYPES.keys():
        raise TableError(
            f"{path}: the columns {pattern!r} are {', '.join(sorted(map(str, kinds)))}, expected one type of "
            f"{VALUES}; convert them"
        )
    return names


def _column(
    path: Path,
    schema: pa.Schema,
    name: str | None,
    fits: Callable[[pa.DataType], bool],
    what: str,
    types: str,
    option: str,
) -> str:
    """The name of the column asked for, or of the only one that fits."""
    candidates = [field.name for field in schema if fits(field.type)]
    there = f"{', '.join(f'{field.name!r} ({field.type})' for field in schema)}"
    if name is None and len(candidates) != 1:
        raise TableError(
            f"{path}: {len(candidates)} columns {candidates} may be the {what} ({types}); name one with "
            f"{option}; there are {there}"
        )
    chosen = candidates[0] if name is None else name
    if schema.names.count(chosen) != 1:
        raise TableError(f"{path}: no column {chosen!r} of {what}; there are {there}; name one with {option}")
    if chosen not in candidates:
        raise TableError(
            f"{path}: column {chosen!r} is {schema.field(chosen).type}, but {what} must be {types}; "
            f"there are {there}; name one with {option}"
        )
    return chosen


def _first(flags: pa.BooleanArray) -> int:
    return int(np.flatnonzero(np.array(flags))[0])
