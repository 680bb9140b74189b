"""Move the rows of a table from one division over ranks to another, a few rows at a time.

A division is a list of blocks: ranges of rows and columns, each on a rank. Any sharding of TorchRec is one:
row-wise, column-wise, table-wise and their combinations. All ranks know both divisions, so they agree on what
is sent in every step without a message.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

STEP = 1 << 14  # rows that a rank receives at once


@dataclass(frozen=True)
class Block:
    """Rows ``row`` to ``row_stop`` and columns ``column`` to ``column_stop`` of a table, on a rank."""

    rank: int
    row: int
    row_stop: int
    column: int
    column_stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_stop - self.row, self.column_stop - self.column

    def overlap(self, other: "Block") -> "Block | None":
        """Return what two blocks have in common, on this one's rank."""
        row, row_stop = max(self.row, other.row), min(self.row_stop, other.row_stop)
        column, column_stop = max(self.column, other.column), min(self.column_stop, other.column_stop)
        if row >= row_stop or column >= column_stop:
            return None
        return Block(self.rank, row, row_stop, column, column_stop)


def transfer(
    held: Sequence[Block],
    wanted: Sequence[Block],
    read: Callable[[Block], Tensor],
    write: Callable[[Block, Tensor], None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> None:
    """Give every rank the values of the blocks that it wants, from the ranks that hold them.

    Args:
        held: blocks of all ranks, the same list on each.
        wanted: likewise. A block that nobody holds is not written.
        read: returns the values of a part of a block that this rank holds, (num_rows, num_columns).
        write: takes those of a part of a block that it wants.
        dtype: of the values.
        device: of the values that are sent, as the backend of ``group`` needs it.
        group: the ranks; ``None`` is this process alone.
    """
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    queues = [_steps([block for block in wanted if block.rank == each]) for each in range(world_size)]
    for step in range(max(map(len, queues), default=0)):
        now = [queue[step : step + 1] for queue in queues]  # what each rank receives in this step
        sent = [[part for own in held if own.rank == rank for want in to if (part := own.overlap(want))]
                for to in now]  # fmt: skip
        received = [[part for own in held if own.rank == each for want in now[rank]
                     if (part := want.overlap(own))] for each in range(world_size)]  # fmt: skip
        if world_size == 1:
            for part in received[0]:
                write(part, read(part))
            continue
        outgoing = [read(part).to(device, dtype).reshape(-1) for parts in sent for part in parts]
        empty = torch.empty(0, dtype=dtype, device=device)
        sizes = [sum(rows * columns for rows, columns in (p.shape for p in parts)) for parts in received]
        incoming = torch.empty(sum(sizes), dtype=dtype, device=device)
        dist.all_to_all_single(
            incoming, torch.cat([empty, *outgoing]), sizes,
            [sum(rows * columns for rows, columns in (p.shape for p in parts)) for parts in sent],
            group=group,
        )  # fmt: skip
        at = 0
        for part in (part for parts in received for part in parts):
            rows, columns = part.shape
            write(part, incoming[at : at + rows * columns].view(rows, columns))
            at += rows * columns


def row_blocks(num_rows: int, dim: int, world_size: int, multiple: int = 1) -> list[Block]:
    """Divide whole rows over ranks in blocks of equal size, a multiple of ``multiple``; the last are smaller.

    >>> [(block.row, block.row_stop) for block in row_blocks(5, 4, 2)]
    [(0, 3), (3, 5)]
    """
    size = -(-num_rows // (world_size * multiple)) * multiple
    bounds = [min(rank * size, num_rows) for rank in range(world_size + 1)]
    return [Block(rank, bounds[rank], bounds[rank + 1], 0, dim) for rank in range(world_size)]


def _steps(blocks: Sequence[Block]) -> list[Block]:
    return [
        Block(block.rank, row, min(row + STEP, block.row_stop), block.column, block.column_stop)
        for block in blocks
        for row in range(block.row, block.row_stop, STEP)
    ]
