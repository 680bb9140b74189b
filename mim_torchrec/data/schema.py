"""The tables that mim-torchrec reads, and how a file is checked against them.

A data set is a directory:

    dataset.json                                  name, source, counts; time_unit of times that are integers
    items/*.parquet                               ITEMS
    pairs/*.parquet                               PAIRS: searches by image and what was bought, training time
    requests/{train,validation,test}/*.parquet    REQUESTS: one row a request, with its history and candidates
    truth/{train,validation,test}/*.parquet       TRUTH (synthetic data only)

`layout.py` says how the files may be partitioned. They may lie in an object store, where they are read in
place. Ids may be integers, text or UUIDs, and become int64
(`ids.py`). Times may be timestamps of any unit, dates, or integers of the unit that dataset.json states.
Lists, text and numbers may be of any type of Arrow. A null history is an empty one. More columns than these
are left alone. Columns that are compared must hold the same kind of thing (`conventions.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.data import forms
from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.forms import TIME, holds_text, is_list
from mim_torchrec.data.ids import holds_ids, stable_ids
from mim_torchrec.data.layout import SPLITS, Dataset
from mim_torchrec.embeddings.remote.places import NoSuchPlace, StoreError, Url, place, stat_of

__all__ = [
    "ITEMS", "ITEMS_REQUIRED", "ORIGINAL", "PAIRS", "PAIRS_REQUIRED", "REQUESTS", "REQUESTS_REQUIRED",
    "SHOWN", "SIGNALS", "SPLITS", "TIME", "TRUTH", "WEIGHT", "WEIGHTS", "Dataset", "TableFile",
    "category_ids", "computed", "is_list", "open_parquet", "present_columns", "read_row_group",
]  # fmt: skip

ITEMS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("title", pa.string()),
        ("image", pa.binary()),  # JPEG, PNG or WebP
        ("category", pa.string()),
        ("listed_at", TIME),
    ]
)
ITEMS_REQUIRED = ("item_id",)

PAIRS = pa.schema(
    [
        ("query_image", pa.binary()),  # null: the query is the image of the item whose id is query_id
        ("query_id", pa.int64()),
        ("item_id", pa.int64()),
        ("hard_negative_item_id", pa.int64()),  # null: drawn from the category of item_id
        ("signal", pa.string()),
        ("ts", TIME),
    ]
)
PAIRS_REQUIRED = ("query_id", "item_id")
SIGNALS = ("purchase", "click")

REQUESTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("query_id", pa.int64()),
        ("ts", TIME),
        ("behavior_item_ids", pa.list_(pa.int64())),  # in order of time, strictly before ts
        ("behavior_categories", pa.list_(pa.string())),
        ("behavior_ts", pa.list_(TIME)),
        ("candidate_item_ids", pa.list_(pa.int64())),
        ("candidate_categories", pa.list_(pa.string())),
        ("labels", pa.list_(pa.int8())),  # 0 or 1
    ]
)
REQUESTS_REQUIRED = ("request_id", "user_id", "behavior_item_ids", "candidate_item_ids", "labels")

TRUTH = pa.schema([("request_id", pa.int64()), ("click_probability", pa.list_(pa.float32()))])


WEIGHT, WEIGHTS = "weight", "candidate_weights"
"""Optional columns of requests, one of the two: how often a request counts in the loss, or each candidate.
They restore the calibration of a log whose negatives were sampled."""
IDS = {name for schema in (ITEMS, PAIRS, REQUESTS) for name in schema.names if name.endswith(("_id", "_ids"))}
ORIGINAL = ":original"
"""What the names of columns with ids as people know them end with, beside the columns of int64."""
SHOWN = ("request_id", "user_id", "query_id", "item_id", "candidate_item_ids")
"""Columns of ids that people see as they know them, in predictions and messages."""
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


class TableFile(pq.ParquetFile):
    """A Parquet file whose columns were checked. Checksums of its pages are verified where it has them.

    Args:
        file: its path or URL.
        expected: names and types of columns, see `open_parquet`.
        conventions: of its data set.
        originals: whether row groups have ids as people know them, too.
        options: of `ParquetFile`.
    """

    def __init__(
        self,
        file: str | Path | Url,
        expected: pa.Schema,
        conventions: Conventions,
        originals: bool = False,
        **options: Any,
    ) -> None:
        found = place(file)
        source = found.open() if isinstance(found, Url) else found
        super().__init__(source, page_checksum_verification=True, **options)
        self._file = file
        self.expected, self.conventions, self.originals = expected, conventions, originals

    @property
    def is_empty(self) -> bool:
        """Whether it has no rows, as one part of many may have; its columns are not checked then."""
        return not self.metadata.num_rows

    def reopened(self, **options: Any) -> "TableFile":
        """The same file, opened in another way."""
        return TableFile(
            self._file, self.expected, self.conventions, self.originals, metadata=self.metadata, **options
        )

    @property
    def num_row_groups(self) -> int:
        """Row groups, none where there are no rows."""
        return 0 if self.is_empty else super().num_row_groups


def open_parquet(
    file: str | Path | Url,
    expected: pa.Schema,
    required: Sequence[str],
    conventions: Conventions | None = None,
    originals: bool = False,
) -> TableFile:
    """Open a file and check its columns and their types, not its rows.

    Args:
        file: the Parquet file, or its URL.
        expected: names and types; a column of `expected` that is present must have a compatible type.
        required: names that must be present.
        conventions: of its data set; None knows of no other file and of no integer times.
        originals: whether row groups have ids as people know them, too, see `read_row_group`.

    Returns:
        The file. One without rows has no row groups, and its columns are not checked.

    Raises:
        DataError: no Parquet file, without a required column, with a wrong type, or with a column that holds
            something else than those it is compared with.
    """
    found_at = place(file)
    if isinstance(found_at, Path) and not found_at.is_file():
        raise DataError("no such file; check the path", file=file)
    conventions = Conventions() if conventions is None else conventions
    try:
        parquet = TableFile(file, expected, conventions, originals)
    except NoSuchPlace as error:
        raise DataError("no such file; check the URL", file=file) from error
    except StoreError:
        raise
    except _UNREADABLE as error:
        empty = "the file is empty" if not stat_of(found_at)[0] else "not a readable Parquet file"
        raise DataError(f"{empty} ({error}); copy or write it again", file=file) from None
    if parquet.is_empty:
        return parquet
    found = parquet.schema_arrow
    for field in expected:
        count = found.names.count(field.name)
        if count > 1:
            problem = f"{count} columns have this name; drop or rename all but one"
            raise DataError(problem, file=file, column=field.name)
        if not count:
            if field.name in required:
                problem = f"the column is missing; add it to the file, which has {', '.join(found.names)}"
                raise DataError(problem, file=file, column=field.name)
        elif not _compatible(kind := found.field(field.name).type, field, conventions.time_unit):
            remedy = "convert the column"
            if pa.types.is_timestamp(forms.value_type(field.type)):
                remedy += ', or state the unit of such times in dataset.json, as {"time_unit": "s"}'
            raise DataError(f"expected {field.type}, found {kind}; {remedy}", file=file, column=field.name)
    conventions.compare(found, file)
    return parquet


def read_row_group(
    parquet: TableFile, row_group: int, columns: Sequence[str], file: str | Path | Url
) -> pa.Table:
    """Read columns of one row group: ids as int64, times in microseconds, the rest plain (`forms.py`).

    Returns:
        The columns. Of a file with `originals`, each of the columns `SHOWN` that people know as something
        else than the int64 is followed by one of that, its name with `ORIGINAL` at the end.

    Raises:
        DataError: the bytes are damaged, text is not UTF-8, or a value cannot be converted.
    """
    return read_row_groups(parquet, [row_group], columns, file)


def read_row_groups(
    parquet: TableFile, row_groups: Sequence[int], columns: Sequence[str], file: str | Path | Url
) -> pa.Table:
    """Read columns of row groups as `read_row_group` does; columns without text come in one piece.

    Raises:
        DataError: see there; it names the first of the row groups.
    """
    schema = parquet.schema_arrow
    text = [name for name in columns if len(row_groups) > 1 and holds_text(schema.field(name).type)]
    numbers = [name for name in columns if name not in text]
    try:
        table = parquet.read_row_groups(row_groups, numbers, use_threads=False)
        if text:  # Arrow does not join the dictionaries of lists when it reads them
            parts = [parquet.read_row_group(group, text, use_threads=False) for group in row_groups]
            joined = pa.concat_tables(parts)
            table = pa.table({name: (joined if name in text else table)[name] for name in columns})
    except StoreError:
        raise
    except _UNREADABLE as error:
        raise DataError(
            f"cannot be read ({error}); copy or write it again", file=file, row_group=row_groups[0]
        ) from None
    return computed(table, parquet, file, row_groups[0])


def computed(table: pa.Table, parquet: TableFile, file: str | Path | Url, row_group: int) -> pa.Table:
    """Columns as read from a file, in the forms that `read_row_group` gives, which calls this.

    Raises:
        DataError: text is not UTF-8, or a value cannot be converted.
    """
    made: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        column = table[name]
        if holds_text(column.type):
            try:
                column.validate(full=True)
            except pa.ArrowException as error:
                problem = f"cannot be read ({error}); write the text as UTF-8"
                raise DataError(problem, file, row_group, column=name) from None
        try:
            made |= _computed(name, column, parquet)
        except (ValueError, pa.ArrowException) as error:  # an IdCollision is a ValueError
            raise DataError(str(error), file, row_group, column=name) from None
    return pa.table(made)


def present_columns(parquet: pq.ParquetFile, expected: pa.Schema) -> tuple[str, ...]:
    """Names of `expected` that the file has, in the order of `expected`."""
    return tuple(name for name in expected.names if parquet.schema_arrow.get_field_index(name) >= 0)


def category_ids(values: pa.Array) -> np.ndarray:
    """Ids of categories: integers as they are, strings by a hash that is the same everywhere.

    Args:
        values: (n,) strings or integers without nulls.

    Returns:
        (n,) int64, of a string the first 63 bits of its hash, see `stable_ids`.

    >>> category_ids(pa.array([7, 2])).tolist()
    [7, 2]
    """
    numbers = stable_ids(values).to_numpy(zero_copy_only=False)
    return (numbers.view(np.uint64) >> np.uint64(1)).view(np.int64) if holds_text(values.type) else numbers


def _computed(name: str, column: pa.ChunkedArray, parquet: TableFile) -> dict[str, pa.ChunkedArray]:
    """A column as the readers compute with it, and where it is asked for, as people know it."""
    at = parquet.expected.get_field_index(name)
    expected = parquet.expected.field(at).type if at >= 0 else pa.null()
    lists = is_list(expected) or (at < 0 and name.startswith(("candidate_", "behavior_", "labels_")))
    column = _each_chunk(partial(forms.plain, lists=lists), column)
    if at < 0:
        return {name: column}
    if pa.types.is_timestamp(forms.value_type(expected)):
        return {name: _each_chunk(partial(forms.times, unit=parquet.conventions.time_unit), column)}
    if name not in IDS:
        return {name: column}
    made = {name: _each_chunk(forms.ids, column)}
    if parquet.originals and name in SHOWN and forms.have_originals(column.type):
        made[name + ORIGINAL] = _each_chunk(forms.originals, column)
    return made


def _each_chunk(convert: Callable[[pa.Array], pa.Array], column: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = column.chunks or [pa.nulls(0, column.type)]
    return pa.chunked_array([convert(chunk) for chunk in chunks])


def _compatible(found: pa.DataType, field: pa.Field, time_unit: str | None) -> bool:
    expected = field.type
    if pa.types.is_null(found):
        return True
    if pa.types.is_list(expected):
        of_values = field.with_type(expected.value_type)
        return is_list(found) and _compatible(found.value_type, of_values, time_unit)
    if pa.types.is_dictionary(found):
        found = found.value_type
    if field.name.endswith(("category", "categories")):
        return holds_text(found) or pa.types.is_integer(found)
    if pa.types.is_int8(expected):  # labels
        whole = pa.types.is_integer(found) or pa.types.is_boolean(found)
        return whole or pa.types.is_floating(found) or pa.types.is_decimal(found)
    if pa.types.is_integer(expected):
        if field.name in IDS:
            return holds_ids(found)
        return pa.types.is_integer(found) and not pa.types.is_uint64(found)
    if pa.types.is_timestamp(expected):
        of_unit = pa.types.is_integer(found) and time_unit is not None
        return pa.types.is_timestamp(found) or pa.types.is_date(found) or of_unit
    if pa.types.is_binary(expected):
        view = pa.types.is_binary_view(found)
        return pa.types.is_binary(found) or pa.types.is_large_binary(found) or view
    return holds_text(found)
