"""Reading a table: by id, by range of rows, or in place; it stays in the page cache, not in private memory.

Where the shards hold consecutive ranges of ids (as ``mim export``, ``mim table import`` and ``convert`` write
them), opening a table reads its ids and allocates nothing of the table's size. Shards whose ranges of ids
overlap are read through a sorted copy of all ids; ``mim table convert`` puts them in order.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.table.manifest import (
    MANIFEST,
    DuplicateId,
    IncompleteTable,
    Manifest,
    ShardInfo,
    TableError,
    VersionMismatch,
    partial_path,
)
from mim_torchrec.embeddings.table.quantize import decode
from mim_torchrec.embeddings.table.row_index import RowIndex, RowNumbers
from mim_torchrec.embeddings.table.shards import CHUNK, check_finite, map_shard, verify_shard


class Table:
    """A finished table, memory-mapped; open it with :meth:`open`.

    Vectors are given as they are stored, (num_rows, stored_width) in ``manifest.torch_dtype`` (see
    ``quantize.py``); :meth:`read_float` gives float32.

    >>> table = Table.open("runs/table", expected_version="9f2c")    # doctest: +SKIP
    >>> table.read_float(torch.tensor([17, 4])).shape                # doctest: +SKIP
    torch.Size([2, 128])

    Attributes:
        in_order: whether the shards hold consecutive ranges of ids.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = Path(path), manifest
        mapped = [(info, *map_shard(self.path, manifest, info)) for info in manifest.shards]
        mapped = [shard for shard in mapped if shard[0].rows]
        self._shards: list[tuple[ShardInfo, Tensor, Tensor]] = sorted(
            mapped, key=lambda shard: int(shard[1][0])
        )
        self._searched = [RowIndex(ids) for _, ids, _ in self._shards]
        self._index: RowIndex | None = None
        self.in_order = all(
            int(before[1][-1]) < int(after[1][0])
            for before, after in zip(self._shards, self._shards[1:], strict=False)
        )
        if not self.in_order:
            self._check_unique(self.row_index().ids)
        if manifest.by_number and manifest.rows:
            parts = self.row_index().parts
            first, last = int(parts[0][0]), int(parts[-1][-1])
            if (first, last) != (0, manifest.rows - 1):
                raise TableError(
                    f"{self.path}: rows are kept by number, so the ids of {manifest.rows} rows are 0 to "
                    f"{manifest.rows - 1}; found {first} to {last}"
                )

    @classmethod
    def open(
        cls, path: str | Path | Url, expected_version: str | None = None, verify: bool = True
    ) -> "Table":
        """Open a table.

        Args:
            path: the table's directory, or its URL, from which it is fetched.
            expected_version: the ``table_version`` that the reader is for; ``None`` accepts any.
            verify: compare the SHA-256 of every shard, which reads all of it. Ranks that load one together
                share this work through :func:`mim_torchrec.embeddings.sharded.load.open_table`.

        Raises:
            IncompleteTable: there is no finished table at ``path``.
            VersionMismatch: it is of another version.
            ChecksumMismatch: a shard was changed or truncated.
        """
        path = fetched(path)
        manifest = read_manifest(path, expected_version)
        if verify:
            for info in manifest.shards:
                verify_shard(path, info)
        return cls(path, manifest)

    def row_index(self) -> RowIndex:
        """Return the map from ids to rows; it is made once, of the mapped ids where those are in order."""
        if self._index is None:
            parts = [ids for _, ids, _ in self._shards]
            parts = parts if self.in_order else [torch.cat(parts).sort().values]
            by_number = self.manifest.by_number
            self._index = RowNumbers(*parts, source=str(self.path)) if by_number else RowIndex(*parts)
        return self._index

    def rows_for(
        self,
        start: int,
        stop: int,
        out: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Read rows ``start`` to ``stop`` of the sharded table and nothing else, some rows at a time.

        Row 0 is the zero vector, rows 1 to n are those of the items in ascending order of their ids, and the
        spare rows after them are zero. Where rows are kept by number, row 0 is that of id 0.

        Args:
            start: the first row.
            stop: one past the last; at most ``manifest.num_embeddings``.
            out: (stop - start, stored_width) of the table's ``torch_dtype``, on any device, which is filled;
                ``None`` makes a new one.
            progress: called with the number of rows read since its last call.

        Returns:
            ``out``, as stored.

        Raises:
            TableError: the rows are not within the table, or ``out`` is of another shape or type.
            NonFiniteVector: a row read holds NaN or infinity.
        """
        self._check_range(start, stop)
        shape = (stop - start, self.manifest.stored_width)
        if out is None:
            out = torch.empty(shape, dtype=self.manifest.torch_dtype)
        if out.shape != shape or out.dtype != self.manifest.torch_dtype:
            raise TableError(
                f"{self.path}: rows {start}:{stop} are {self.manifest.torch_dtype} {shape}, "
                f"out is {out.dtype} {tuple(out.shape)}"
            )
        filled = start
        for first, ids, stored in self._slices(start, stop):
            out[filled - start : first - start] = 0
            filled = first + ids.numel()
            out[first - start : filled - start].copy_(stored)
            if progress is not None:
                progress(ids.numel())
        out[filled - start :] = 0
        return out

    def spans(self, start: int, stop: int) -> list[tuple[int, Tensor]]:
        """Return where rows ``start`` to ``stop`` lie on the disk, mapped into memory and not read.

        Returns:
            (first_row, rows) in ascending order, ``rows`` (num_rows, stored_width) as stored and not checked
            for NaN (``mim table verify`` does). Row 0 and the spare rows are in none of them: they are zero.
            What is written into ``rows`` stays in this process and costs private memory by the page.

        Raises:
            TableError: the rows are not within the table, or the ranges of ids of its shards overlap.
        """
        self._check_range(start, stop)
        if not self.in_order:
            raise TableError(
                f"{self.path}: the shards' ranges of ids overlap, so rows are not consecutive on the disk; "
                f"put them in order: mim table convert {self.path} --dtype {self.manifest.dtype} --out DIR"
            )
        return [(first, vectors) for first, _, vectors, _, _ in self._parts(start, stop)]

    def read(self, ids: Tensor) -> Tensor:
        """Return the vectors (num_ids, stored_width) of ids (num_ids,), as stored; zeros if unknown."""
        return self.find(ids)[0]

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`read` does, and whether the table has each id, bool (num_ids,)."""
        found = torch.zeros(ids.numel(), dtype=torch.bool)
        out: Tensor | None = None
        for (info, shard_ids, vectors), index in zip(self._shards, self._searched, strict=True):
            near = torch.arange(ids.numel())
            if len(self._shards) > 1:
                near = ((ids >= shard_ids[0]) & (ids <= shard_ids[-1])).nonzero()[:, 0]
            row = index.rows(ids[near]) - 1
            is_here = row >= 0
            if not is_here.all():
                near, row = near[is_here], row[is_here]
            part = vectors.index_select(0, row)
            check_finite(part, self.manifest.dtype, ids[near], self.path / info.file, row)
            if near.numel() == ids.numel():  # no other shard has any
                return part, found.fill_(True)
            if out is None:
                out = part.new_zeros(ids.numel(), part.shape[1])
            out.index_copy_(0, near, part)
            found[near] = True
        if out is None:
            out = torch.zeros(ids.numel(), self.manifest.stored_width, dtype=self.manifest.torch_dtype)
        return out, found

    def read_float(self, ids: Tensor) -> Tensor:
        """Return the vectors (num_ids, dim) of ids (num_ids,) as float32; zeros if unknown."""
        return decode(self.read(ids), self.manifest.dtype)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.manifest.num_embeddings:
            raise TableError(f"{self.path}: rows {start}:{stop} not within 0:{self.manifest.num_embeddings}")

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor, ShardInfo, int]]:
        """The rows of each shard in order: first row, ids, vectors, shard, first row in its file."""
        at = self.manifest.first_row
        for info, ids, vectors in self._shards:
            first, last = max(start - at, 0), min(stop - at, info.rows)
            if first < last:
                yield at + first, ids[first:last], vectors[first:last], info, first
            at += info.rows

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Consecutive rows of items, at most ``CHUNK`` at once and checked: first row, ids, vectors."""
        if not self.in_order:
            base = self.manifest.first_row
            ids = self.row_index().ids[max(start - base, 0) : max(stop - base, 0)]
            for at, part in enumerate(ids.split(CHUNK)):
                yield max(start, base) + at * CHUNK, part, self.read(part)
            return
        for first, ids, vectors, info, at in self._parts(start, stop):
            for offset in range(0, ids.numel(), CHUNK):
                own, stored = ids[offset : offset + CHUNK], vectors[offset : offset + CHUNK]
                check_finite(stored, self.manifest.dtype, own, self.path / info.file, at + offset)
                yield first + offset, own, stored

    def _check_unique(self, ids: Tensor) -> None:
        twice = ids[1:] == ids[:-1]
        if twice.any():
            item = int(ids[1:][twice][0])
            found = [
                f"{self.path / info.file} row {int(torch.searchsorted(ids, item))}"
                for info, ids, _ in self._shards
                if (ids == item).any()
            ]
            raise DuplicateId(f"item id {item} has more than one vector: {', '.join(sorted(found))}")


def read_manifest(path: str | Path | Url, expected_version: str | None = None) -> Manifest:
    """What a finished table says of itself; none of its shards is opened.

    Raises:
        IncompleteTable: there is no finished table at ``path``.
        VersionMismatch: it is of another version than ``expected_version``.
    """
    path = fetched(path)
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
    return manifest
