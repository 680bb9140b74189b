"""Vectors of another team in Parquet: a column of ids and one of lists, as in the public TAOBAO-MM data."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mim_torchrec.embeddings.table.external import as_delivered, as_int64, batch_rows, delivered_dtype
from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.embeddings.table.shards import CHUNK

VALUE_TYPES = {
    pa.int8(): torch.int8,
    pa.float16(): torch.float16,
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
}


class ParquetSource:
    """A Parquet file with a column of integers and one of lists of numbers, all of one length.

    Args:
        path: the file.
        id_column: column of the ids; ``None`` takes the only one of integers.
        vector_column: column of the vectors; ``None`` takes the only one of lists of numbers.

    Raises:
        TableError: it is no Parquet file, or has no such columns.
    """

    format = "parquet"

    def __init__(self, path: Path, id_column: str | None, vector_column: str | None) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowInvalid, OSError) as error:
            raise TableError(f"{path}: not a readable Parquet file ({error})") from None
        self.columns = (
            _column(path, schema, id_column, _is_id, "ids", "integers", "--id-column"),
            _column(
                path, schema, vector_column, _is_vector, "vectors",
                "lists of int8, float16, float32 or float64", "--vector-column",
            ),
        )  # fmt: skip
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self.rows = metadata.num_rows
        self.dtype = delivered_dtype(VALUE_TYPES[schema.field(self.columns[1]).type.value_type])
        self.dim = self._first_length() if self.rows else 0

    def ids(self) -> Iterator[Tensor]:
        start = 0
        for batch in self._batches(CHUNK, self.columns[:1]):
            yield self._ids(batch, start)
            start += batch.num_rows

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for batch in self._batches(batch_rows(self.dim), self.columns):
            ids = self._ids(batch, start)
            yield ids, as_delivered(self, ids, self._vectors(batch, ids, start), start)
            start += batch.num_rows

    def place(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.path}: row group {group} row {row - int(self._starts[group])}"

    def _batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        try:  # opened again: a directory may have more files than a process may hold open
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
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
        return as_int64(self, torch.from_numpy(np.array(ids)), start)

    def _vectors(self, batch: pa.RecordBatch, ids: Tensor, start: int) -> Tensor:
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

    def _error(self, row: int, item: int | None, problem: str) -> TableError:
        item_id = "" if item is None else f", item id {item}"
        return TableError(
            f"{self.place(row)}{item_id}, column {self.columns[1]!r}: {problem}; leave the row out or fix it"
        )


def _is_id(column: pa.DataType) -> bool:
    return pa.types.is_integer(column)


def _is_vector(column: pa.DataType) -> bool:
    is_list = (
        pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column)
    )
    return is_list and column.value_type in VALUE_TYPES


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
