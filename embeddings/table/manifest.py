"""The manifest of a table, and the errors that everything about tables raises."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mim_torchrec.embeddings.table.quantize import DTYPES, row_bytes, stored_width
from mim_torchrec.errors import ExpectedError, Status

FORMAT_VERSION = 2
BY_NUMBER_VERSION = 3  # written only where rows are kept by number
READABLE = (1, 2, 3)  # 1: float32 and float16 only, no capacity
MANIFEST = "manifest.json"


class TableError(ExpectedError, ValueError):
    """Something is wrong with a table; the message names the file, and the row and id where there is one."""


class TableLost(TableError):
    """A server has no table, or has lost it or a log; it works again when that was loaded."""


class VersionMismatch(TableError):
    """The table was written by another encoder than the one its reader expects."""

    status = Status.VERSION


class ChecksumMismatch(TableError):
    """The bytes of a shard are not the bytes that were written."""


class IncompleteTable(TableError):
    """The table is absent, or its writer stopped before ``finish``."""


class DuplicateId(TableError):
    """An item has two vectors."""


class NonFiniteVector(TableError):
    """A vector holds NaN or infinity."""


class LossyVector(TableError):
    """A vector cannot be stored in a type: too much of it is lost, or all of it."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard file: its name inside the table, its number of rows and the SHA-256 of its bytes."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a table holds. ``table_version`` names the encoder, so vectors of two versions are never mixed.

    ``dim`` is the length of a vector in every storage type. ``capacity`` is the number of items that a live
    table loaded from this one has room for: ``rows``, and spare rows for new ones. ``first_row`` is the row
    of the first item: 1, below which row 0 is the zero vector of unknown ids; or 0 where rows are kept by
    number, and then the ids are 0 to ``rows`` - 1 and row r is that of id r.
    """

    format_version: int
    table_version: str
    rows: int
    capacity: int
    dim: int
    dtype: str
    seq: int
    encoder: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    first_row: int = 1

    @property
    def by_number(self) -> bool:
        """Whether ids are row numbers, so that row 0 is an item's."""
        return self.first_row == 0

    @property
    def num_embeddings(self) -> int:
        """Rows of a live table: of items, spare ones and, unless rows are kept by number, row 0."""
        return self.first_row + self.capacity

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def content(self) -> str:
        """Hash of what the table holds: its version, its storage type and the bytes of its shards."""
        words = [self.table_version, self.dtype, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()

    @property
    def stored_width(self) -> int:
        """Columns of a stored row."""
        return stored_width(self.dtype, self.dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return row_bytes(self.dtype, self.dim)

    @property
    def spare_rows(self) -> int:
        """Rows kept free for new items, after those of the table's items."""
        return self.capacity - self.rows

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check ``manifest.json``; one of format version 1 has no spare rows.

        Raises:
            TableError: it is not JSON, has unknown or missing keys, another format version or a wrong sum.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise TableError(f"{path}: not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise TableError(f"{path}: expected an object, found {type(raw).__name__}")
        if raw.get("format_version") not in READABLE:
            raise TableError(
                f"{path}: format_version {raw.get('format_version')!r}, this release reads "
                f"{', '.join(map(str, READABLE))}; export again"
            )
        if raw["format_version"] == 1 and "capacity" not in raw and "rows" in raw:
            raw["capacity"] = raw["rows"]
        if raw["format_version"] != BY_NUMBER_VERSION:
            raw.setdefault("first_row", 1)
        _check_keys(raw, cls, path)
        _check_types(raw, _TYPES, path, "")
        for number, shard in enumerate(raw["shards"]):
            _check_types(shard, {}, path, f"shards[{number}]")
            _check_keys(shard, ShardInfo, path)
            _check_types(shard, _SHARD_TYPES, path, f"shards[{number}].")
            if not is_inside(shard["file"]):
                raise TableError(f"{path}: the shard {shard['file']!r} is no name of a file in the table")
        manifest = cls(**{**raw, "shards": tuple(ShardInfo(**shard) for shard in raw["shards"])})
        check_dtype(manifest.dtype, manifest.dim, path)
        if (total := sum(shard.rows for shard in manifest.shards)) != manifest.rows:
            raise TableError(f"{path}: rows is {manifest.rows} but the shards have {total}")
        if manifest.first_row != (0 if manifest.format_version == BY_NUMBER_VERSION else 1):
            raise TableError(
                f"{path}: first_row is {manifest.first_row!r} in format_version {manifest.format_version}; "
                f"only version {BY_NUMBER_VERSION} has it, and there it is 0"
            )
        if manifest.capacity < manifest.rows:
            raise TableError(f"{path}: capacity is {manifest.capacity}, fewer than the {manifest.rows} rows")
        return manifest


def check_dtype(dtype: str, dim: int, path: Path) -> None:
    """Raise a :class:`TableError` unless vectors of ``dim`` can be stored as ``dtype``."""
    if dtype not in DTYPES:
        raise TableError(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        stored_width(dtype, dim)
    except ValueError as error:
        raise TableError(f"{path}: {error}") from None


def partial_path(path: Path) -> Path:
    """Return where the table of ``path`` is while it is being written."""
    return path.with_name(path.name + ".partial")


def is_inside(file: str) -> bool:
    """Whether the name of a shard is that of a file in the directory of its table.

    >>> is_inside("shard-00000.safetensors"), is_inside("../other/shard"), is_inside("/etc/passwd")
    (True, False, False)
    """
    return file not in ("", ".", "..") and not set("/\\\0") & set(file)


_TYPES: dict[str, type] = {
    "format_version": int, "table_version": str, "rows": int, "capacity": int, "dim": int, "dtype": str,
    "seq": int, "encoder": dict, "shards": list, "first_row": int,
}  # fmt: skip
_SHARD_TYPES: dict[str, type] = {"file": str, "rows": int, "sha256": str}


def _check_types(raw: Any, types: dict[str, type], path: Path, place: str) -> None:
    """See that an object has values of the right types, and that its counts are not negative."""
    if not isinstance(raw, dict):
        raise TableError(f"{path}: {place} is {type(raw).__name__}, expected an object")
    for name, kind in types.items():
        found = type(raw[name])
        if found is not kind:
            raise TableError(f"{path}: {place}{name} is {found.__name__}, expected {kind.__name__}")
        if kind is int and raw[name] < 0:
            raise TableError(f"{path}: {place}{name} is {raw[name]}, which is negative")


def _check_keys(raw: dict[str, Any], of: type, path: Path) -> None:
    names = {field.name for field in fields(of)}
    if set(raw) != names:
        unknown, lacking = sorted(set(raw) - names), sorted(names - set(raw))
        raise TableError(f"{path}: {of.__name__} has unknown keys {unknown} and lacks {lacking}")
