"""The multi-modal table on disk (§3.5, MFM): one vector per item, written once and then only read.

A table is a directory of ``manifest.json`` and ``shard-*.safetensors``; a shard holds ``ids`` (num_rows,)
int64, strictly ascending, and ``vectors`` (num_rows, dim). It is written under ``<path>.partial`` and renamed
when complete, so a directory with a manifest is always whole. Ascending ids make the rows of any range of ids
one contiguous slice of every shard: a rank that owns a range reads nothing else.

Not here: updates of a table in place (windows of new items), and int8 rows.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class TableError(ValueError):
    """Something is wrong with a table; the message names the file, and the row and id where there is one."""


class VersionMismatch(TableError):
    """The table was written by another encoder than the one its reader expects."""


class ChecksumMismatch(TableError):
    """The bytes of a shard are not the bytes that were written."""


class IncompleteTable(TableError):
    """The table is absent, or its writer stopped before ``finish``."""


class DuplicateId(TableError):
    """An item has two vectors."""


class NonFiniteVector(TableError):
    """A vector holds NaN or infinity."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard file: its name inside the table, its number of rows and the SHA-256 of its bytes."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a table holds. ``table_version`` names the encoder, so vectors of two versions are never mixed."""

    format_version: int
    table_version: str
    rows: int
    dim: int
    dtype: str
    seq: int
    encoder: dict[str, Any]
    shards: tuple[ShardInfo, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check ``manifest.json``.

        Raises:
            TableError: it is not JSON, has unknown or missing keys, another format version or a wrong sum.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TableError(f"{path}: not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise TableError(f"{path}: expected an object, found {type(raw).__name__}")
        if raw.get("format_version") != FORMAT_VERSION:
            raise TableError(
                f"{path}: format_version {raw.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
                f"export again"
            )
        _check_keys(raw, cls, path)
        for shard in raw["shards"]:
            _check_keys(shard, ShardInfo, path)
        manifest = cls(**{**raw, "shards": tuple(ShardInfo(**shard) for shard in raw["shards"])})
        if manifest.dtype not in DTYPES:
            raise TableError(f"{path}: dtype {manifest.dtype!r} is not one of {', '.join(DTYPES)}")
        if (total := sum(shard.rows for shard in manifest.shards)) != manifest.rows:
            raise TableError(f"{path}: rows is {manifest.rows} but the shards have {total}")
        return manifest


class RowIndex:
    """Maps item ids to rows of the sharded table: 1 + the id's position in ascending order, unknown to 0.

    Row 0 is the zero vector, whose cosine with anything is 0.

    Args:
        ids: (num_rows,) int64, strictly ascending.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    @property
    def num_embeddings(self) -> int:
        return self.ids.numel() + 1

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row of every id, int64 in the shape of ``ids``; 0 for an id not in the table."""
        if not self.ids.numel():
            return torch.zeros_like(ids)
        position = torch.searchsorted(self.ids, ids).clamp_(max=self.ids.numel() - 1)
        return torch.where(self.ids[position] == ids, position + 1, 0)

    def to(self, device: torch.device) -> "RowIndex":
        return RowIndex(self.ids.to(device))


class TableWriter:
    """Writes a table; it appears under its name only when ``finish`` has checked all of it.

    Several ranks write into one table: rank 0 makes its writer first (the others after a barrier), each rank
    writes its shards, and rank 0 calls ``finish`` with the shards of all.

    Args:
        path: the table's directory; must not exist yet.
        table_version: hash of the encoder's weights, preprocessing and dim.
        dim: length of a vector.
        dtype: "float16" or "float32", the type stored.
        encoder: JSON description of the encoder, kept in the manifest.
        rank: this writer's rank; rank 0 clears what an earlier crash has left in ``<path>.partial``.

    Raises:
        TableError: ``path`` exists, or ``dtype`` is unknown.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        table_version: str,
        dim: int,
        dtype: str = "float16",
        encoder: dict[str, Any],
        rank: int = 0,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise TableError(f"{self.path} exists; choose another directory or remove it")
        if dtype not in DTYPES:
            raise TableError(f"{self.path}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.partial = partial_path(self.path)
        self.table_version, self.encoder = table_version, encoder
        self.dim, self.dtype, self.rank = dim, dtype, rank
        self.shards: list[ShardInfo] = []
        if rank == 0:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)

    def write_shard(self, ids: Tensor, vectors: Tensor) -> ShardInfo:
        """Write one shard, in ascending order of the ids.

        Args:
            ids: (num_rows,) int64, any order.
            vectors: (num_rows, dim) floating point; stored as the writer's dtype.

        Raises:
            DuplicateId: an id occurs twice.
            NonFiniteVector: a vector holds NaN or infinity, or overflows the stored type.
        """
        name = f"shard-{self.rank:05d}-{len(self.shards):05d}.safetensors"
        file = self.partial / name
        if ids.dtype != torch.int64 or vectors.shape != (ids.numel(), self.dim):
            raise TableError(
                f"{file}: expected ids int64 (n,) and vectors (n, {self.dim}), "
                f"found {ids.dtype} {tuple(ids.shape)} and {tuple(vectors.shape)}"
            )
        ids, order = ids.detach().cpu().sort()
        stored = vectors.detach().cpu().to(DTYPES[self.dtype])[order].contiguous()
        _check_ascending(ids, file)
        _check_finite(stored, ids, file)
        save_file({"ids": ids, "vectors": stored}, file, metadata={"table_version": self.table_version})
        _fsync(file)
        self.shards.append(ShardInfo(file=name, rows=ids.numel(), sha256=_sha256(file)))
        return self.shards[-1]

    def finish(self, all_shards: Sequence[ShardInfo] | None = None) -> Manifest:
        """Check the shards of all ranks together, write the manifest and give the table its name (rank 0).

        Args:
            all_shards: the shards of every rank; ``None`` where this writer wrote all.

        Raises:
            TableError: a shard is missing or not as listed.
            DuplicateId: two shards hold one id.
        """
        shards = tuple(self.shards if all_shards is None else all_shards)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            table_version=self.table_version,
            rows=sum(shard.rows for shard in shards),
            dim=self.dim,
            dtype=self.dtype,
            seq=0,
            encoder=self.encoder,
            shards=shards,
        )
        Table(self.partial, manifest)
        (self.partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        _fsync(self.partial / MANIFEST)
        _fsync(self.partial)
        if self.path.exists():  # os.rename would replace an empty directory
            raise TableError(f"{self.path} appeared during the writing; the rows are in {self.partial}")
        os.rename(self.partial, self.path)
        _fsync(self.path.parent)
        return manifest


class Table:
    """A finished table, memory-mapped; open it with :meth:`open`.

    >>> table = Table.open("runs/table", expected_version="9f2c")    # doctest: +SKIP
    >>> table.read(torch.tensor([17, 4])).shape                      # doctest: +SKIP
    torch.Size([2, 128])
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = Path(path), manifest
        shards = [self._map(info) for info in manifest.shards]
        self._ids = [ids for ids, _ in shards]
        self._vectors = [vectors for _, vectors in shards]
        every = torch.cat(self._ids) if self._ids else torch.empty(0, dtype=torch.int64)
        self._index = RowIndex(every.sort().values)
        twice = self._index.ids[1:] == self._index.ids[:-1]
        if twice.any():
            item = int(self._index.ids[1:][twice][0])
            found = [
                f"{self.path / info.file} row {int(torch.searchsorted(ids, item))}"
                for info, ids in zip(manifest.shards, self._ids, strict=True)
                if (ids == item).any()
            ]
            raise DuplicateId(f"item id {item} has more than one vector: {', '.join(found)}")

    @classmethod
    def open(cls, path: str | Path, expected_version: str | None = None, verify: bool = True) -> "Table":
        """Open a table.

        Args:
            path: the table's directory.
            expected_version: the ``table_version`` that the reader is for; ``None`` accepts any.
            verify: compare the SHA-256 of every shard, which reads all of it. Ranks that load one together
                share this work through :func:`mim_torchrec.embeddings.sharded.load.open_table`.

        Raises:
            IncompleteTable: there is no finished table at ``path``.
            VersionMismatch: it is of another version.
            ChecksumMismatch: a shard was changed or truncated.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if partial_path(path).exists():
                raise IncompleteTable(
                    f"{path}: half-written, its writer stopped before the end (see {partial_path(path)}); "
                    f"export again"
                )
            raise IncompleteTable(f"{path / MANIFEST}: not found, so this is no finished table")
        manifest = Manifest.load(path / MANIFEST)
        if expected_version is not None and manifest.table_version != expected_version:
            raise VersionMismatch(
                f"{path / MANIFEST}: table_version is {manifest.table_version}, expected {expected_version}; "
                f"export the table with the encoder that this reader is for"
            )
        if verify:
            for info in manifest.shards:
                verify_shard(path, info)
        return cls(path, manifest)

    def row_index(self) -> RowIndex:
        return self._index

    def rows_for(self, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` of the sharded table (row 0 is the zero vector) and nothing else.

        Returns:
            (stop - start, dim) in the table's dtype.

        Raises:
            NonFiniteVector: a row read holds NaN or infinity.
        """
        if not 0 <= start <= stop <= self._index.num_embeddings:
            raise TableError(f"{self.path}: rows {start}:{stop} not within 0:{self._index.num_embeddings}")
        out = torch.zeros(stop - start, self.manifest.dim, dtype=self.manifest.torch_dtype)
        own = self._index.ids[max(start - 1, 0) : max(stop - 1, 0)]
        if not own.numel():
            return out
        for info, ids, vectors in zip(self.manifest.shards, self._ids, self._vectors, strict=True):
            first = int(torch.searchsorted(ids, own[0]))
            last = int(torch.searchsorted(ids, own[-1], right=True))
            part = vectors[first:last].clone()
            _check_finite(part, ids[first:last], self.path / info.file, first)
            out[self._index.rows(ids[first:last]) - start] = part
        return out

    def read(self, ids: Tensor) -> Tensor:
        """Return the vectors (num_ids, dim) of ids (num_ids,), in the table's dtype; zeros if unknown."""
        out = torch.zeros(ids.numel(), self.manifest.dim, dtype=self.manifest.torch_dtype)
        for info, shard_ids, vectors in zip(self.manifest.shards, self._ids, self._vectors, strict=True):
            row = RowIndex(shard_ids).rows(ids) - 1
            here = row >= 0
            part = vectors[row[here]]
            _check_finite(part, ids[here], self.path / info.file, row[here])
            out[here] = part
        return out

    def _map(self, info: ShardInfo) -> tuple[Tensor, Tensor]:
        file = self.path / info.file
        if not file.is_file():
            raise IncompleteTable(f"{file}: listed in the manifest but not found")
        try:
            with safe_open(file, framework="pt") as shard:
                if set(shard.keys()) != {"ids", "vectors"}:
                    raise TableError(f"{file}: holds {sorted(shard.keys())}, expected ids and vectors")
                ids, vectors = shard.get_tensor("ids"), shard.get_tensor("vectors")
                written_as = (shard.metadata() or {}).get("table_version")
        except SafetensorError as error:
            raise TableError(f"{file}: not a readable safetensors file ({error})") from None
        if written_as != self.manifest.table_version:
            raise VersionMismatch(
                f"{file}: table_version is {written_as}, its manifest says {self.manifest.table_version}"
            )
        expected = (info.rows, self.manifest.dim)
        if ids.dtype != torch.int64 or ids.shape != expected[:1]:
            raise TableError(f"{file}: ids are {ids.dtype} {tuple(ids.shape)}, expected int64 {expected[:1]}")
        if vectors.dtype != self.manifest.torch_dtype or vectors.shape != expected:
            raise TableError(
                f"{file}: vectors are {vectors.dtype} {tuple(vectors.shape)}, "
                f"expected {self.manifest.dtype} {expected}"
            )
        _check_ascending(ids, file)
        return ids, vectors


def partial_path(path: Path) -> Path:
    """Return where the table of ``path`` is while it is being written."""
    return path.with_name(path.name + ".partial")


def verify_shard(path: Path, info: ShardInfo) -> None:
    """Compare a shard's bytes with its SHA-256.

    Raises:
        IncompleteTable: the file is absent.
        ChecksumMismatch: the bytes differ.
    """
    file = path / info.file
    if not file.is_file():
        raise IncompleteTable(f"{file}: listed in the manifest but not found")
    if (found := _sha256(file)) != info.sha256:
        raise ChecksumMismatch(
            f"{file}: SHA-256 is {found}, its manifest says {info.sha256}; copy or export it again"
        )


def _check_keys(raw: dict[str, Any], of: type, path: Path) -> None:
    names = {field.name for field in fields(of)}
    if set(raw) != names:
        unknown, lacking = sorted(set(raw) - names), sorted(names - set(raw))
        raise TableError(f"{path}: {of.__name__} has unknown keys {unknown} and lacks {lacking}")


def _check_ascending(ids: Tensor, file: Path) -> None:
    wrong = (ids[1:] <= ids[:-1]).nonzero()
    if wrong.numel():
        row = int(wrong[0]) + 1
        if ids[row] == ids[row - 1]:
            raise DuplicateId(f"{file}: rows {row - 1} and {row} both have item id {int(ids[row])}")
        raise TableError(
            f"{file}: row {row} has item id {int(ids[row])} after {int(ids[row - 1])}; ids must ascend"
        )


def _check_finite(vectors: Tensor, ids: Tensor, file: Path, rows: int | Tensor = 0) -> None:
    """``rows`` is the first row of consecutive ``vectors``, or the row of each."""
    wrong = (~torch.isfinite(vectors).all(1)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        row = int(rows[at]) if isinstance(rows, Tensor) else rows + at
        raise NonFiniteVector(
            f"{file}: row {row}, item id {int(ids[at])}: the vector holds NaN or infinity as {vectors.dtype}"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
