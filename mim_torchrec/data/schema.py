"""The tables that mim-torchrec reads, and how a file is checked against them.

A data set is a directory:

    dataset.json                                  name, source, counts
    items/*.parquet                               ITEMS
    pairs/*.parquet                               PAIRS: searches by image and what was bought, training time
    requests/{train,validation,test}/*.parquet    REQUESTS: one row a request, with its history and candidates
    truth/{train,validation,test}/*.parquet       TRUTH (synthetic data only)

The directory may lie in an object store, where the files are read in place. Integers may be of any width up
to int64, timestamps of any unit; more columns than these are left alone.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.remote.fetching import refuse_half_written
from mim_torchrec.embeddings.remote.places import NoSuchPlace, Url, place
from mim_torchrec.embeddings.remote.published import find_index
from mim_torchrec.errors import OptionError

SPLITS = ("train", "validation", "test")
TIME = pa.timestamp("us")

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


class Dataset:
    """Where the files of a data set are.

    Args:
        root: its directory, or the URL of one.

    Raises:
        DataError: there is no such directory.
        FetchError: it is being written.
    """

    def __init__(self, root: str | Path | Url) -> None:
        self.root = place(root)
        self._index = None
        if isinstance(self.root, Path):
            if not self.root.is_dir():
                raise DataError("no such directory; check the path", file=self.root)
            return
        self._index = find_index(self.root)
        if self._index is None:
            refuse_half_written(self.root)

    def items(self) -> list[Path | Url]:
        """Files of the item table, sorted. Raises DataError if there are none."""
        return self._files("items")

    def pairs(self) -> list[Path | Url]:
        """Files of the C-SFT pairs, sorted. Raises DataError if there are none."""
        return self._files("pairs")

    def requests(self, split: str) -> list[Path | Url]:
        """Files of the requests of "train", "validation" or "test", sorted. Raises DataError if none."""
        if split not in SPLITS:
            raise OptionError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return self._files(f"requests/{split}")

    def _files(self, folder: str) -> list[Path | Url]:
        files: list[Path | Url]
        if isinstance(self.root, Path):
            files = [*sorted((self.root / folder).glob("*.parquet"))]
        elif self._index is not None:
            inside = self._index.under(folder)
            names = sorted(name for name in inside.files if "/" not in name and name.endswith(".parquet"))
            files = [inside.url_of(name) for name in names]
        else:
            names = sorted(name for name in (self.root / folder).list() if name.endswith(".parquet"))
            files = [self.root / folder / name for name in names]
        if not files:
            raise DataError(
                "no *.parquet file there; check the path of the data set", file=self.root / folder
            )
        return files


def open_parquet(file: str | Path | Url, expected: pa.Schema, required: Sequence[str]) -> pq.ParquetFile:
    """Open a file and check its columns and their types, not its rows.

    Args:
        file: the Parquet file, or its URL.
        expected: names and types; a column of `expected` that is present must have a compatible type.
        required: names that must be present.

    Raises:
        DataError: no Parquet file, without rows, without a required column, or with a wrong type.
    """
    source, size = _open(file)
    try:
        parquet = pq.ParquetFile(source)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        empty = "the file is empty" if size == 0 else "not a readable Parquet file"
        raise DataError(f"{empty} ({error}); copy or write it again", file=file) from None
    found = parquet.schema_arrow
    for field in expected:
        if found.get_field_index(field.name) < 0:
            if field.name in required:
                problem = f"the column is missing; add it to the file, which has {', '.join(found.names)}"
                raise DataError(problem, file=file, column=field.name)
        elif not _compatible(found.field(field.name).type, field):
            problem = f"expected {field.type}, found {found.field(field.name).type}; convert the column"
            raise DataError(problem, file=file, column=field.name)
    if parquet.metadata.num_rows == 0:
        raise DataError("the file has no rows; remove it or write it again", file=file)
    return parquet


def _open(file: str | Path | Url) -> tuple[Path | IO[bytes], int]:
    """What Arrow reads a file from, and its size. Raises DataError if there is none."""
    found = place(file)
    try:
        if isinstance(found, Url):
            return found.open(), found.stat().size
        if found.is_file():
            return found, found.stat().st_size
    except NoSuchPlace as error:
        raise DataError("no such file; check the URL", file=file) from error
    raise DataError("no such file; check the path", file=file)


def read_row_group(
    parquet: pq.ParquetFile, row_group: int, columns: Sequence[str], file: str | Path | Url
) -> pa.Table:
    """Read columns of one row group. Raises DataError if the bytes are damaged or text is not UTF-8."""
    try:
        table = parquet.read_row_group(row_group, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({error}); copy or write it again", file=file, row_group=row_group
        ) from None
    for name in table.column_names:
        if _holds_text(table.schema.field(name).type):
            try:
                table[name].validate(full=True)
            except pa.ArrowException as error:
                problem = f"cannot be read ({error}); write the text as UTF-8"
                raise DataError(problem, file, row_group, column=name) from None
    return table


def present_columns(parquet: pq.ParquetFile, expected: pa.Schema) -> tuple[str, ...]:
    """Names of `expected` that the file has, in the order of `expected`."""
    return tuple(name for name in expected.names if parquet.schema_arrow.get_field_index(name) >= 0)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def category_ids(values: pa.Array) -> np.ndarray:
    """Ids of categories: integers as they are, strings by a hash that is the same everywhere.

    Args:
        values: (n,) strings or integers without nulls.

    Returns:
        (n,) int64, of a string the first 63 bits of its BLAKE2b hash.

    >>> category_ids(pa.array([7, 2])).tolist()
    [7, 2]
    """
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    hashes = [_hash(text) for text in encoded.dictionary.to_pylist()]
    return np.asarray(hashes, np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _compatible(found: pa.DataType, field: pa.Field) -> bool:
    expected = field.type
    if pa.types.is_list(expected):
        if not is_list(found):
            return False
        return _compatible(found.value_type, field.with_type(expected.value_type))
    if pa.types.is_dictionary(found):
        found = found.value_type
    if field.name.endswith(("category", "categories")):
        return _is_text(found) or _is_int64(found)
    if pa.types.is_int8(expected):  # labels
        return _is_int64(found) or pa.types.is_boolean(found) or pa.types.is_floating(found)
    if pa.types.is_integer(expected):
        return _is_int64(found)
    if pa.types.is_timestamp(expected):
        return pa.types.is_timestamp(found)
    if pa.types.is_binary(expected):
        return pa.types.is_binary(found) or pa.types.is_large_binary(found)
    return _is_text(found)


def _holds_text(found: pa.DataType) -> bool:
    if is_list(found) or pa.types.is_dictionary(found):
        return _holds_text(found.value_type)
    return _is_text(found)


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_int64(found: pa.DataType) -> bool:
    return pa.types.is_integer(found) and not pa.types.is_uint64(found)
