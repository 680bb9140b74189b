"""Write a table in another storage type, or its shards in the order of ids: the same vectors and version.

``table_version`` says where vectors come from, not how they are stored, so a converted table replaces the one
it was made from; how far its vectors are from those is measured and kept in the manifest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mim_torchrec.embeddings.table.manifest import Manifest
from mim_torchrec.embeddings.table.quantize import DTYPES, cosine_errors, decode, encode, row_bytes
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.shards import CHUNK, check_finite, check_loss
from mim_torchrec.embeddings.table.writer import TableWriter

SHARD_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion wrote, and 1 - cos between the vectors before and after (mean and largest)."""

    manifest: Manifest
    mean_cosine_error: float
    max_cosine_error: float


def shard_rows(dtype: str, dim: int) -> int:
    """Return how many rows make a shard of 256 MiB."""
    return max(1, SHARD_BYTES // row_bytes(dtype, dim))


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str,
    rows_per_shard: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Conversion:
    """Write a copy of a table in the storage type ``dtype``, its shards in ascending order of ids.

    A copy in the table's own type is exact. At any time one shard is in memory.

    Args:
        src: a finished table; its checksums are verified.
        dst: directory of the new table; must not exist.
        dtype: "float32", "float16", "bfloat16", "int8" or "int4".
        rows_per_shard: rows of a shard of ``dst``; ``None`` makes shards of 256 MiB.
        progress: called with the number of rows written since its last call.

    Raises:
        OutputExists: ``dst`` exists.
        TableError: vectors of this dim cannot be stored as ``dtype``.
        NonFiniteVector: a vector overflows ``dtype``; nothing is left at ``dst``.
        LossyVector: a vector is too small for ``dtype``; likewise.
    """
    source = Table.open(src)
    old = source.manifest
    writer = TableWriter(
        dst, table_version=old.table_version, dim=old.dim, dtype=dtype, encoder=old.encoder,
        spare_rows=old.spare_rows, seq=old.seq, by_number=old.by_number,
    )  # fmt: skip
    total, largest = 0.0, 0.0
    step = rows_per_shard or shard_rows(dtype, old.dim)
    try:
        end = old.first_row + old.rows
        for start in range(old.first_row, end, step):
            stop = min(start + step, end)
            stored = torch.empty(stop - start, writer.stored_width, dtype=DTYPES[dtype])
            for first in range(start, stop, CHUNK):
                last = min(first + CHUNK, stop)
                before = source.rows_for(first, last)
                if dtype == old.dtype:
                    stored[first - start : last - start] = before
                else:
                    vectors = decode(before, old.dtype)
                    after = encode(vectors, dtype)
                    ids = source.row_index().ids[first - old.first_row : last - old.first_row]
                    check_finite(after, dtype, ids, source.path, first)
                    check_loss(
                        vectors, after, dtype, ids, partial(_place, source, first), "convert to float32"
                    )
                    stored[first - start : last - start] = after
                    errors = cosine_errors(vectors, decode(after, dtype))
                    total, largest = total + float(errors.sum()), max(largest, float(errors.max()))
                if progress is not None:
                    progress(last - first)
            writer.write_shard(source.row_index().ids[start - old.first_row : stop - old.first_row], stored)
        mean = total / max(old.rows, 1)
        if dtype != old.dtype:
            step_made = {"from": old.dtype, "to": dtype, "mean_cosine_error": mean}
            writer.encoder = {**old.encoder, "converted": [*old.encoder.get("converted", []), step_made]}
        return Conversion(manifest=writer.finish(), mean_cosine_error=mean, max_cosine_error=largest)
    except BaseException:
        writer.discard()
        raise


def _place(source: Table, first: int, row: int) -> str:
    return f"{source.path}: row {first + row}"
