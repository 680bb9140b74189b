"""Writing a table: shards first, under another name; its own name is given when all of it is checked."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_torchrec.embeddings.files import (
    discard_directory,
    fsync,
    full_disk_reported,
    publish_directory,
    sha256,
    write_text,
)
from mim_torchrec.embeddings.table.manifest import (
    BY_NUMBER_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    ShardInfo,
    TableError,
    check_dtype,
    partial_path,
)
from mim_torchrec.embeddings.table.quantize import DTYPES, encode, is_quantized, stored_width
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.shards import check_ascending, check_finite, check_loss, verify_shard
from mim_torchrec.embeddings.tensor_files import write_tensors
from mim_torchrec.errors import OutputExists


class TableWriter:
    """Writes a table; it appears under its name only when ``finish`` has checked all of it.

    Several ranks write into one table: rank 0 makes its writer first (the others after a barrier), each rank
    writes its shards, and rank 0 calls ``finish`` with the shards of all.

    Args:
        path: the table's directory; must not exist yet.
        table_version: hash of the encoder's weights, preprocessing and dim, or of imported content.
        dim: length of a vector.
        dtype: "float32", "float16", "bfloat16", "int8" or "int4", the type stored.
        encoder: JSON description of the encoder, kept in the manifest.
        rank: this writer's rank; rank 0 clears what an earlier crash has left in ``<path>.partial``.
        spare_rows: rows for new items that a live table made from this one keeps free.
        seq: the last window of new items that the rows contain.
        by_number: whether ids are row numbers: those of n rows are 0 to n - 1, and row r of a live table is
            that of id r. Otherwise row 0 is the zero vector of unknown ids, and rows follow in order of ids.

    Raises:
        OutputExists: ``path`` exists.
        TableError: vectors of ``dim`` cannot be stored as ``dtype``.
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
        spare_rows: int = 0,
        seq: int = 0,
        by_number: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise OutputExists(f"{self.path} exists; choose another directory or remove it")
        check_dtype(dtype, dim, self.path)
        self.partial = partial_path(self.path)
        self.table_version, self.encoder = table_version, encoder
        self.dim, self.dtype, self.rank = dim, dtype, rank
        self.stored_width = stored_width(dtype, dim)
        self.spare_rows, self.seq, self.by_number = spare_rows, seq, by_number
        self.shards: list[ShardInfo] = []
        if rank == 0:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            with full_disk_reported(self.path):
                self.partial.mkdir(parents=True)

    def write_shard(self, ids: Tensor, vectors: Tensor) -> ShardInfo:
        """Write one shard, in ascending order of the ids.

        Args:
            ids: (num_rows,) int64, any order.
            vectors: (num_rows, dim) floating point, stored as the writer's dtype; or (num_rows, stored_width)
                as they are stored.

        Raises:
            DuplicateId: an id occurs twice.
            NonFiniteVector: a vector holds NaN or infinity, or overflows the stored type.
            LossyVector: a vector is too small for the stored type, see :func:`shards.check_loss`.
        """
        file = self.partial / f"shard-{self.rank:05d}-{len(self.shards):05d}.safetensors"
        vectors = vectors.detach().cpu()
        is_stored = is_quantized(self.dtype) and vectors.dtype == torch.uint8
        width = self.stored_width if is_stored else self.dim
        if (
            ids.dtype != torch.int64
            or vectors.shape != (ids.numel(), width)
            or not (is_stored or vectors.is_floating_point())
        ):
            raise TableError(
                f"{file}: expected ids int64 (n,) and vectors (n, {self.dim}) floating point or as stored, "
                f"found {ids.dtype} {tuple(ids.shape)} and {vectors.dtype} {tuple(vectors.shape)}"
            )
        ids, order = ids.detach().cpu().sort()
        check_ascending(ids, file)
        vectors = vectors[order]
        if not is_stored and vectors.dtype != DTYPES[self.dtype]:
            given, vectors = vectors, encode(vectors.float(), self.dtype)
            check_finite(vectors, self.dtype, ids, file)
            remedy = "store the table as float32, or scale the vectors"
            check_loss(given, vectors, self.dtype, ids, lambda row: f"{file}: row {row}", remedy)
        else:
            check_finite(vectors, self.dtype, ids, file)
        tensors = {"ids": ids, "vectors": vectors.contiguous()}
        write_tensors(file, tensors, {"table_version": self.table_version})
        self.shards.append(ShardInfo(file=file.name, rows=ids.numel(), sha256=sha256(file)))
        return self.shards[-1]

    def copy_shard(self, source: Path, info: ShardInfo) -> ShardInfo:
        """Copy a shard of the table at ``source``, which has this one's version, dim and dtype, as it is.

        Raises:
            ChecksumMismatch: the bytes are not those that were written.
        """
        file = self.partial / info.file
        with full_disk_reported(file, (source / info.file).stat().st_size):
            shutil.copyfile(source / info.file, file)
        verify_shard(self.partial, info)
        fsync(file)
        self.shards.append(info)
        return info

    def finish(self, all_shards: Sequence[ShardInfo] | None = None) -> Manifest:
        """Check the shards of all ranks together, write the manifest and give the table its name (rank 0).

        Args:
            all_shards: the shards of every rank; ``None`` where this writer wrote all.

        Raises:
            TableError: a shard is missing or not as listed, or rows are kept by number and ids are not 0 to
                n - 1.
            DuplicateId: two shards hold one id.
        """
        shards = tuple(self.shards if all_shards is None else all_shards)
        rows = sum(shard.rows for shard in shards)
        manifest = Manifest(
            format_version=BY_NUMBER_VERSION if self.by_number else FORMAT_VERSION,
            table_version=self.table_version,
            rows=rows,
            capacity=rows + self.spare_rows,
            dim=self.dim,
            dtype=self.dtype,
            seq=self.seq,
            encoder=self.encoder,
            shards=shards,
            first_row=0 if self.by_number else 1,
        )
        Table(self.partial, manifest)
        facts = asdict(manifest)
        if not self.by_number:
            del facts["first_row"]  # releases that read format version 2 do not know it
        write_text(self.partial / MANIFEST, json.dumps(facts, indent=2) + "\n")
        try:
            publish_directory(self.partial, self.path, replace=False)
        except FileExistsError:
            text = f"{self.path} appeared during the writing; the rows are in {self.partial}"
            raise OutputExists(text) from None
        return manifest

    def discard(self) -> None:
        """Remove what was written, where there is one writer and it cannot finish."""
        discard_directory(self.partial)
