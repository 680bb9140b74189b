"""How the rows of a collection travel: row numbers to the ranks that own them, and the stored bytes back.

All tables that a group of ranks divides travel together. A step has three collectives whatever their number:
how many rows of each table are asked for, the row numbers, and the bytes of the rows. Tables of other types
and dims share one buffer of bytes. Counts come from the device, so a step uploads nothing and waits for the
device once.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.table.quantize import DTYPES, decode, is_quantized

AFTER_ALL = torch.iinfo(torch.int64).max


@dataclass
class RowCounts:
    """Rows that cross in a step, (world_size, num_tables) each; known after the first wait of a lookup.

    Attributes:
        asked: for each rank, how many rows of each table this rank asks it for.
        owed: for each rank, how many rows of each table it asks this rank for.
    """

    asked: list[list[int]] = field(default_factory=list)
    owed: list[list[int]] = field(default_factory=list)

    def owed_of_table(self, table: int) -> int:
        """Rows of one table that this rank reads, for all ranks."""
        return sum(counts[table] for counts in self.owed)


class RowsDist(nn.Module):
    """Sends distinct rows of several tables, each in ascending order, to the ranks that own them.

    Args:
        group: the ranks that divide the rows.
        blocks: by table, rows of each rank but the last.
        device: of the rows asked for.
    """

    def __init__(self, group: dist.ProcessGroup, blocks: dict[str, int], device: torch.device) -> None:
        super().__init__()
        self.group, self.tables = group, list(blocks)
        firsts = torch.arange(group.size() + 1)
        self._bounds = []
        for block in blocks.values():
            bounds = block * firsts
            bounds[-1] = AFTER_ALL
            self._bounds.append(bounds.to(device))

    def forward(self, rows: list[Tensor], counts: RowCounts) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Start to send rows.

        Args:
            rows: of each table, (num_rows,) int64, ascending.
            counts: is filled when the result is waited for.

        Returns:
            What is waited for twice and gives the rows that this rank owns: a feature for each table, sorted
            by the ranks that ask.
        """
        asked = torch.stack(
            [torch.searchsorted(own, bounds).diff() for own, bounds in zip(rows, self._bounds, strict=True)],
            dim=1,
        )
        return _CountsAwaitable(self.group, self.tables, rows, asked, counts)


class _CountsAwaitable(Awaitable[Awaitable[KeyedJaggedTensor]]):
    """Waits for the counts of all ranks, then sends the row numbers."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        tables: list[str],
        rows: list[Tensor],
        asked: Tensor,
        counts: RowCounts,
    ) -> None:
        super().__init__()
        self._group, self._tables, self._rows, self._counts = group, tables, rows, counts
        self._asked, self._owed = asked.contiguous(), torch.empty_like(asked)
        self._work = dist.all_to_all_single(self._owed, self._asked, group=group, async_op=True)

    def _wait_impl(self) -> Awaitable[KeyedJaggedTensor]:
        _wait(self._work)
        counts = self._counts
        counts.asked, counts.owed = torch.stack([self._asked, self._owed]).tolist()
        sent = _by_rank(self._rows, counts.asked)
        return _RowsAwaitable(self._group, self._tables, sent, self._owed, counts)


class _RowsAwaitable(Awaitable[KeyedJaggedTensor]):
    """Waits for the row numbers that this rank is asked for, and sorts them by table."""

    def __init__(
        self, group: dist.ProcessGroup, tables: list[str], sent: Tensor, owed: Tensor, counts: RowCounts
    ) -> None:
        super().__init__()
        self._tables, self._sent, self._owed, self._counts = tables, sent, owed, counts
        into, out_of = [sum(own) for own in counts.owed], [sum(own) for own in counts.asked]
        self._received = sent.new_empty(sum(into))
        self._work = dist.all_to_all_single(self._received, sent, into, out_of, group=group, async_op=True)

    def _wait_impl(self) -> KeyedJaggedTensor:
        _wait(self._work)
        rows = _by_table(self._received, self._counts.owed)
        sizes = [self._counts.owed_of_table(k) for k in range(len(self._tables))]
        values = rows[0] if len(rows) == 1 else torch.cat(rows)
        del self._sent, self._received
        return KeyedJaggedTensor(
            self._tables, values, lengths=self._owed.sum(dim=0), stride=1, length_per_key=sizes
        )


class VectorsBack(Awaitable[list[Tensor]]):
    """The vectors (num_rows, dim) of the distinct rows that were asked for, from the ranks that own them.

    Args:
        stored: of each table, (num_rows_owed, stored_width): rows as stored, in the order of the ranks that
            asked.
        dtypes: of each table, how rows are stored.
        counts: of the step.
        group: the ranks.
    """

    def __init__(
        self, stored: list[Tensor], dtypes: list[str], counts: RowCounts, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self._dtypes = dtypes
        # gloo lacks some types, no backend lacks bytes
        own = [rows.contiguous().view(torch.uint8) for rows in stored]
        self._widths = [rows.shape[1] for rows in own]
        if len(own) == 1:  # whole rows are split, and nothing is copied
            self._asked, owed = counts.asked, counts.owed
            self._sent = own[0]
            self._received = self._sent.new_empty(sum(count for (count,) in counts.asked), self._widths[0])
        else:
            self._asked, owed = self._in_bytes(counts.asked), self._in_bytes(counts.owed)
            self._sent = _by_rank([rows.flatten() for rows in own], owed)
            self._received = self._sent.new_empty(sum(map(sum, self._asked)))
        into, out_of = [sum(rank) for rank in self._asked], [sum(rank) for rank in owed]
        self._work = dist.all_to_all_single(
            self._received, self._sent, into, out_of, group=group, async_op=True
        )

    def _in_bytes(self, counts: list[list[int]]) -> list[list[int]]:
        return [[count * width for count, width in zip(rank, self._widths, strict=True)] for rank in counts]

    def _wait_impl(self) -> list[Tensor]:
        _wait(self._work)
        received = _by_table(self._received, self._asked)
        del self._received, self._sent  # who waits may hold this object for longer than the bytes are needed
        found = []
        for own, width, dtype in zip(received, self._widths, self._dtypes, strict=True):
            stored = own.view(-1, width).view(DTYPES[dtype])
            found.append(decode(stored, dtype) if is_quantized(dtype) else stored)
        return found


def _by_rank(tables: list[Tensor], counts: list[list[int]]) -> Tensor:
    """Join tables, each sorted by rank, into one tensor sorted by rank and then by table."""
    if len(tables) == 1:
        return tables[0]
    parts = [table.split([rank[k] for rank in counts]) for k, table in enumerate(tables)]
    return torch.cat([part[rank] for rank in range(len(counts)) for part in parts])


def _by_table(joined: Tensor, counts: list[list[int]]) -> list[Tensor]:
    """Divide what is sorted by rank and then by table into tables, each sorted by rank."""
    num_tables = len(counts[0])
    if num_tables == 1:
        return [joined]
    parts = joined.split([count for rank in counts for count in rank])
    return [torch.cat(parts[k::num_tables]) for k in range(num_tables)]


def _wait(work: dist.Work | None) -> None:
    if work is not None:  # None where this rank is not in the group
        work.wait()
