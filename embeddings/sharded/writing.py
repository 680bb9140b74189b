"""Write the rows of a trained table as a table on disk, every rank some of them, rows kept by number."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mim_torchrec.embeddings.collective import gather, on_all_ranks
from mim_torchrec.embeddings.sharded.trained import Rows
from mim_torchrec.embeddings.sharded.transfer import Block, row_blocks, transfer
from mim_torchrec.embeddings.table.convert import shard_rows
from mim_torchrec.embeddings.table.manifest import Manifest, TableError
from mim_torchrec.embeddings.table.shards import CHUNK
from mim_torchrec.embeddings.table.writer import TableWriter

PIECE = 4096  # rows of a piece that is hashed; every rank has whole pieces
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def write_rows(
    rows: Rows,
    path: str | Path,
    *,
    name: str,
    dtype: str | None,
    table_version: str | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Manifest:
    """Write a table, on all ranks together; the directory must be the same one for all.

    A rank holds one shard of 256 MiB of the table at a time.

    Args:
        rows: of the trained table.
        path: directory of the new table; must not exist.
        name: of the trained table, for the manifest.
        dtype: type stored; ``None`` is that of the rows.
        table_version: ``None`` makes one of the values, the same for every number of ranks.
        device: of what ranks send each other.
        group: the ranks.

    Raises:
        OutputExists: ``path`` exists. On every rank, as all errors.
        NonFiniteVector: a row holds NaN or infinity.
        LossyVector: a row is too small for ``dtype``.
    """
    if rows.dtype not in NAMES:
        raise TableError(f"{name}: rows of {rows.dtype} cannot be written")
    stored = dtype or NAMES[rows.dtype]
    rank = dist.get_rank(group) if group is not None else 0
    source = {"table": name, "rows": NAMES[rows.dtype],
              "created_by": f"mim-torchrec {importlib.metadata.version('mim-torchrec')}"}  # fmt: skip

    def make() -> TableWriter:
        return TableWriter(
            path, table_version="", dim=rows.dim, dtype=stored, encoder={"trained": source}, rank=rank,
            by_number=True,
        )  # fmt: skip

    first = on_all_ranks(lambda: make() if rank == 0 else None, group)  # it makes the directory
    own = on_all_ranks(lambda: first or make(), group)
    try:
        own.table_version = table_version or _version(rows, device, group)
        for start, part in _parts(rows, shard_rows(stored, rows.dim), device, group):
            ids = torch.arange(start, start + part.shape[0])
            on_all_ranks(
                lambda ids=ids, part=part: own.write_shard(ids, part) if ids.numel() else None, group
            )
        shards = [shard for each in gather(own.shards, group) for shard in each]
        manifest = on_all_ranks(lambda: own.finish(shards) if rank == 0 else None, group)
    except BaseException:
        if rank == 0:
            own.discard()
        raise
    return next(each for each in gather(manifest, group) if each is not None)


def _version(rows: Rows, device: torch.device, group: dist.ProcessGroup | None) -> str:
    """``trained-`` and 16 digits of the SHA-256 of those of all pieces of ``PIECE`` rows as float32."""
    own = {}
    for start, part in _parts(rows, CHUNK, device, group):
        for k, piece in enumerate(part.split(PIECE) if part.numel() else ()):
            values = piece.float().contiguous().numpy().astype("<f4", copy=False)
            own[start + k * PIECE] = hashlib.sha256(values.data).hexdigest()
    every = {start: digest for each in gather(own, group) for start, digest in each.items()}
    text = "".join(every[start] for start in sorted(every))
    return f"trained-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _parts(
    rows: Rows, size: int, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Tensor]]:
    """This rank's part of all rows, on the CPU, some at a time; every rank is given as many times."""
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    size = max(1, size // PIECE) * PIECE
    blocks = row_blocks(rows.num_rows, rows.dim, world_size, PIECE)
    for k in range(max(-(-block.shape[0] // size) for block in blocks)):
        wanted = [
            replace(
                b, row=min(b.row + k * size, b.row_stop), row_stop=min(b.row + (k + 1) * size, b.row_stop)
            )
            for b in blocks
        ]
        own = wanted[rank]
        out = torch.empty(own.shape, dtype=rows.dtype)

        def write(part: Block, values: Tensor, own: Block = own, out: Tensor = out) -> None:
            out[part.row - own.row : part.row_stop - own.row, part.column : part.column_stop] = values

        transfer(rows.blocks, wanted, rows.read, write, dtype=rows.dtype, device=device, group=group)
        yield own.row, out
