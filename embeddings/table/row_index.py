"""Ids to rows, by searching sorted ids where they lie: 8 bytes an id, in the page cache for all ranks.

The ids of a batch repeat and come in no order, and a search of many sorted ids waits for memory at almost
every step. So distinct ids are looked up once and in ascending order: successive searches then go through the
same cache lines. It needs neither a table of hashes nor any memory of its own. Ids without a gap are not
searched.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_torchrec.embeddings.table.manifest import TableError

Ints = NDArray[np.int64]


class RowIndex:
    """Maps item ids to rows of the sharded table: 1 + the id's position in ascending order, unknown to 0.

    Row 0 is the zero vector, whose cosine with anything is 0.

    Args:
        parts: (num_ids,) int64 each, strictly ascending within and over the parts. They are searched where
            they are and not copied, so those of a mapped table stay in the page cache.

    >>> RowIndex(torch.tensor([10, 30])).rows(torch.tensor([[30, 20], [10, 30]])).tolist()
    [[2, 0], [1, 2]]
    """

    def __init__(self, *parts: Tensor) -> None:
        self.parts = tuple(part for part in parts if part.numel())
        self._lasts = np.array([int(part[-1]) for part in self.parts], np.int64)
        starts = np.cumsum([0, *(part.numel() for part in self.parts)])
        self._starts, self._length = starts[:-1], int(starts[-1])
        self._ids: Tensor | None = None
        self._first: int | None = None  # of ids without a gap, whose rows are told by subtraction
        if self.parts and int(self._lasts[-1]) - int(self.parts[0][0]) == self._length - 1:
            self._first = int(self.parts[0][0])

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> Tensor:
        """(num_ids,) int64, ascending; a copy, made once, where there are several parts."""
        if self._ids is None:
            empty = torch.empty(0, dtype=torch.int64)
            self._ids = self.parts[0] if len(self.parts) == 1 else torch.cat([empty, *self.parts])
        return self._ids

    @property
    def num_embeddings(self) -> int:
        return len(self) + 1

    def at(self, positions: Ints) -> Ints:
        """Return the ids at positions (num_positions,), ascending."""
        parts = np.split(positions, np.searchsorted(positions, self._starts[1:]))
        found = [
            part.numpy()[at - first]
            for part, first, at in zip(self.parts, self._starts, parts, strict=False)  # none where empty
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row of every id, int64 in the shape of ``ids``; 0 for an id not in the table.

        Raises:
            TypeError: the ids are no integers.
        """
        if self._first is None:
            return map_distinct(ids, self.rows_of_ascending)
        _check_integers(ids)
        rows = (ids.long() - self._first).add_(1)
        return rows.masked_fill_((rows < 1) | (rows > self._length), 0)

    def rows_of_ascending(self, ids: Ints) -> Ints:
        """Return what :meth:`rows` does, of ids (num_ids,) in ascending order."""
        rows = np.zeros_like(ids)
        stops = np.searchsorted(ids, self._lasts, side="right")
        begin = 0
        for tensor, first, stop in zip(self.parts, self._starts, stops, strict=True):
            if begin < stop:
                part = tensor.numpy()  # each time: torch moves a tensor that is shared with a process
                wanted = ids[begin:stop]
                at = np.searchsorted(part, wanted)  # within the part: its last id is no less than these
                rows[begin:stop] = np.where(part[at] == wanted, first + at + 1, 0)
            begin = stop
        return rows


class RowNumbers(RowIndex):
    """The map of a table whose rows are kept by number: row r is that of id r, and there is no other id.

    Args:
        parts: (num_ids,) int64 each, together 0 to num_rows - 1.
        source: where the table is, for messages.
    """

    def __init__(self, *parts: Tensor, source: str = "TABLE") -> None:
        super().__init__(*parts)
        self._source = source

    @property
    def num_embeddings(self) -> int:
        return len(self)

    def rows(self, ids: Tensor) -> Tensor:
        """Return ``ids``, which are rows.

        Raises:
            TableError: one is not: row 0 is an item's, so that none is left for unknown ids.
        """
        wrong = ids[(ids < 0) | (ids >= len(self))]
        if wrong.numel():
            raise TableError(
                f"{self._source}: its rows are kept by number, 0 to {len(self) - 1}, and "
                f"{int(wrong[0])} is none of them; there is no row for unknown ids"
            )
        return ids.clone()


def map_distinct(ids: Tensor, rows_of: Callable[[Ints], Ints]) -> Tensor:
    """Return the row of every id, having looked up each distinct id once, in ascending order.

    Args:
        ids: of any shape, integers.
        rows_of: rows of ids (num_distinct,) int64, strictly ascending.

    Returns:
        int64, in the shape of ``ids`` and on their device.

    Raises:
        TypeError: the ids are no integers.
    """
    _check_integers(ids)
    values = ids.detach().reshape(-1).long().cpu().numpy()
    if not values.size:
        return torch.zeros_like(ids, dtype=torch.int64)
    order = np.argsort(values)
    ascending = values[order]
    is_first = np.empty(ascending.size, bool)
    is_first[0] = True
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    found = rows_of(ascending[is_first])
    rows = np.empty_like(ascending)
    rows[order] = found[np.cumsum(is_first) - 1]
    return torch.from_numpy(rows).view(ids.shape).to(ids.device)


def _check_integers(ids: Tensor) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids are integers, found {ids.dtype}")
