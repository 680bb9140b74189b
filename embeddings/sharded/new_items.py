"""The changes of an item index: new items in the order of their rows, and which items are deleted.

A table of hashes with open addressing in memory that child processes share. Looking up and adding take the
same time at any age: nothing is sorted, merged or moved. One process writes. Others may read at any time: an
item is written before the count that makes it known, and neither changes afterwards.

All loops run over probes, not over items: each step looks at the next slot of all items that are not decided.
"""

import numpy as np
from numpy.typing import NDArray

from mim_torchrec.embeddings.sharded.shared_memory import SharedMemory
from mim_torchrec.embeddings.table.row_index import Ints

SLOTS_PER_ITEM = 2
HEADER = 8  # numbers: count, deleted items, seq
LARGEST = 2**32 - 2


class NewItems:
    """Up to ``capacity`` items, each with its position; and a mark for each of ``num_rows`` rows.

    It takes 16 bytes an item and 1 bit a row, by the page, as they are written.

    Args:
        capacity: items.
        num_rows: rows that can be marked.
        seq: of the table as it is on the disk.

    Raises:
        ValueError: more than 2**32 - 2 items.
    """

    def __init__(self, capacity: int, num_rows: int, seq: int, memory: SharedMemory | None = None) -> None:
        if capacity > LARGEST:
            raise ValueError(f"{capacity} spare rows; an index has room for {LARGEST} new items")
        self.capacity, self.num_rows = capacity, num_rows
        num_slots, num_bytes = SLOTS_PER_ITEM * capacity + 1, num_rows // 8 + 1
        starts = np.cumsum([8 * HEADER, 8 * capacity, 4 * num_slots, num_bytes])
        self.memory = memory if memory is not None else SharedMemory(int(starts[3]))
        self._header = self.memory.array(np.int64, 0, HEADER)
        self._ids = self.memory.array(np.int64, int(starts[0]), capacity)
        self._slots = self.memory.array(np.uint32, int(starts[1]), num_slots)
        self._marks = self.memory.array(np.uint8, int(starts[2]), num_bytes)
        if memory is None:
            self.seq = seq

    def __len__(self) -> int:
        return int(self._header[0])

    @property
    def num_marked(self) -> int:
        """Rows that are marked."""
        return int(self._header[1])

    @property
    def seq(self) -> int:
        """Of the last window."""
        return int(self._header[2])

    @seq.setter
    def seq(self, seq: int) -> None:
        self._header[2] = seq

    @property
    def ids(self) -> Ints:
        """(num_items,) in the order of their positions; a view."""
        return self._ids[: len(self)]

    def positions(self, ids: Ints) -> Ints:
        """Return the position of each id (num_ids,); -1 where there is none."""
        found = np.full(ids.size, -1, np.int64)
        count = len(self)
        if not count:
            return found
        left, slots = np.arange(ids.size), self._first_slots(ids)
        while left.size:
            position = self._slots[slots] - np.uint32(1)  # an empty slot is the largest number
            is_item = position < count
            position = np.where(is_item, position, 0)
            is_found = is_item & (self._ids[position] == ids[left])
            found[left[is_found]] = position[is_found]
            go_on = is_item & ~is_found
            left, slots = left[go_on], self._next(slots[go_on])
        return found

    def append(self, ids: Ints) -> None:
        """Add distinct ids (num_ids,) that are not there yet, in their order; there is room for them."""
        start = len(self)
        self._ids[start : start + ids.size] = ids
        entries, slots = np.arange(start + 1, start + 1 + ids.size).astype(np.uint32), self._first_slots(ids)
        while entries.size:
            is_free = self._slots[slots] == 0
            self._slots[slots[is_free]] = entries[is_free]
            lost = self._slots[slots] != entries  # taken before, or by another of these
            entries, slots = entries[lost], self._next(slots[lost])
        self._header[0] = start + ids.size

    def is_marked(self, rows: Ints) -> NDArray[np.bool_]:
        """Return whether each row (num_rows,) is marked."""
        return (self._marks[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1

    def mark(self, rows: Ints, marked: bool) -> None:
        """Set the mark of distinct rows (num_rows,)."""
        rows = rows[self.is_marked(rows) != marked]
        bits = np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8))
        if marked:
            np.bitwise_or.at(self._marks, rows >> 3, bits)
        else:
            np.bitwise_and.at(self._marks, rows >> 3, ~bits)
        self._header[1] += rows.size if marked else -rows.size

    def marked(self) -> Ints:
        """Return the rows that are marked, ascending."""
        if not self.num_marked:
            return np.empty(0, np.int64)
        some = np.flatnonzero(self._marks)
        bits = np.unpackbits(self._marks[some], bitorder="little").reshape(-1, 8)
        at, bit = np.nonzero(bits)
        return 8 * some[at] + bit

    def _first_slots(self, ids: Ints) -> Ints:
        """The finalizer of MurmurHash3, whose upper half chooses the slot."""
        mixed = ids.view(np.uint64).copy()
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed ^= mixed >> np.uint64(33)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(33)
        return ((mixed >> np.uint64(32)) * np.uint64(self._slots.size) >> np.uint64(32)).astype(np.int64)

    def _next(self, slots: Ints) -> Ints:
        slots = slots + 1
        slots[slots == self._slots.size] = 0
        return slots
