"""The map from item ids to rows of a live table, which new items join and deleted items leave.

The items of the table on the disk are searched where they are mapped, 8 bytes an id for all processes of a
machine. New and deleted items are in memory that processes started by this one share (``new_items.py``): the
workers of a ``DataLoader`` see an update when it is done, also those that run already. Rows never move and
are never given to another item, so a batch that was mapped before an update is as right as one mapped after.
"""

import hashlib
import os
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.embeddings.sharded.new_items import NewItems
from mim_torchrec.embeddings.sharded.saved_index import SavedIndex
from mim_torchrec.embeddings.sharded.shared_memory import SharedMemory
from mim_torchrec.embeddings.table.format import DuplicateId, RowIndex, Table, TableError, VersionMismatch
from mim_torchrec.embeddings.table.row_index import Ints, map_distinct

SAMPLES = 4096


class SpareRowsExhausted(TableError):
    """There are more new items than rows were kept free."""


class ItemIndex:
    """Maps item ids to rows of a live table and counts those it does not know, whose row is 0.

    It can be part of the data set of a ``DataLoader``: workers share it with the process that has made it,
    which alone changes it. ``seen`` and ``unknown`` count ids looked up by this process: a worker counts its
    own.

    Args:
        ids: (num_items,) int64, strictly ascending: the items of rows 1 to num_items.
        capacity: items that the table has rows for.
        source: where the table is, for messages.
        seq: of the last window that the table on the disk holds.

    Raises:
        ValueError: the capacity is below the number of ids.

    >>> index = ItemIndex(torch.tensor([10, 30]), capacity=3)
    >>> index.rows(torch.tensor([30, 10, 20])).tolist(), index.unknown
    ([2, 1, 0], 1)
    >>> index.add(torch.tensor([20])).tolist(), index.rows(torch.tensor([20])).tolist(), index.spare_rows
    ([3], [3], 0)
    """

    def __init__(self, ids: Tensor | RowIndex, capacity: int, source: str = "TABLE", seq: int = 0) -> None:
        base = ids if isinstance(ids, RowIndex) else RowIndex(ids)
        if capacity < len(base):
            raise ValueError(f"{source}: {len(base)} items need a capacity of as many, found {capacity}")
        new = NewItems(capacity - len(base), 1 + capacity, seq)
        self._begin(base, new, capacity, source, None, os.getpid())

    def _begin(
        self, base: RowIndex, new: NewItems, capacity: int, source: str, table: Table | None, owner: int
    ) -> None:
        self._base, self._new, self._table, self._owner = base, new, table, owner
        self.capacity, self._source = capacity, source
        self._base_memory: SharedMemory | None = None
        self.seen = 0
        self.unknown = 0

    @classmethod
    def of(cls, table: Table) -> "ItemIndex":
        """Return the index of a table on disk, with its spare rows.

        Raises:
            TableError: its rows are kept by number, so that it has no row for unknown ids.
        """
        if table.manifest.by_number:
            raise TableError(
                f"{table.path}: its rows are kept by number; look up row numbers as they are, without an "
                f"index"
            )
        index = cls(table.row_index(), table.manifest.capacity, str(table.path), table.manifest.seq)
        index._table = table
        return index

    @property
    def table_version(self) -> str | None:
        """Of the table that the index was made of, None where it was made of ids."""
        return None if self._table is None else self._table.manifest.table_version

    @property
    def seq(self) -> int:
        """Of the last window whose items the index has."""
        return self._new.seq

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, with row 0 and the spare rows."""
        return 1 + self.capacity

    @property
    def spare_rows(self) -> int:
        """Rows that are still free; the row of an item deleted stays its own."""
        return self._new.capacity - len(self._new)

    def __len__(self) -> int:
        return len(self._base) + len(self._new) - self._new.num_marked

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row of every id, int64 in the shape of ``ids``, and count."""
        return self.count(self.look_up(ids))

    def look_up(self, ids: Tensor) -> Tensor:
        """The same rows, without counting."""
        return map_distinct(ids, self._rows)

    def count(self, rows: Tensor) -> Tensor:
        """Count rows as those of ids that were looked up; returns them."""
        self.seen += rows.numel()
        self.unknown += rows.numel() - int(torch.count_nonzero(rows))
        return rows

    def homes(self, ids: Tensor) -> Tensor:
        """The rows of items, deleted or not; 0 for those that never had one."""
        return map_distinct(ids, self._homes)

    def add(self, ids: Tensor, seq: int | None = None) -> Tensor:
        """Return the rows of items (n,) int64, giving those that have none a free one each.

        Args:
            ids: the items, each once.
            seq: of the window that brings them.

        Raises:
            SpareRowsExhausted: there are too few free rows; nothing is changed.
            DuplicateId: an id is there twice.
            TableError: another process has made the index.
        """
        self._check_owner()
        _check_distinct(ids)
        rows = self.homes(ids)
        is_new = rows == 0
        fresh = ids[is_new].sort().values
        if fresh.numel() > self.spare_rows:
            room = self._new.capacity + max(fresh.numel(), self.capacity // 10)
            raise SpareRowsExhausted(
                f"{fresh.numel()} new items, {self.spare_rows} free rows of {self.capacity}: make room with "
                f"`mim table grow {self._source} --out DIR --spare-rows {room}`, which keeps every row, and "
                f"load the table that it writes"
            )
        first = 1 + len(self._base) + len(self._new)
        self._new.append(fresh.numpy())
        self._new.mark(rows[~is_new].numpy(), False)
        rows[is_new] = first + torch.searchsorted(fresh, ids[is_new])
        self._advance(seq)
        return rows

    def remove(self, ids: Tensor, seq: int | None = None) -> Tensor:
        """Forget items (n,) int64, each once; returns the rows of those that had one. See :meth:`add`."""
        self._check_owner()
        _check_distinct(ids)
        rows = self.homes(ids)
        rows = rows[rows > 0]
        self._new.mark(rows.numpy(), True)
        self._advance(seq)
        return rows

    def saved(self) -> SavedIndex:
        """Return what a checkpoint needs to hold of the index."""
        new = self._new
        return SavedIndex(base=self._digest(), seq=new.seq, items=new.ids.copy(), deleted=new.marked())

    def restore(self, saved: SavedIndex) -> None:
        """Take the items of a checkpoint, which begin with those that the index has.

        Raises:
            TableError: it is of another table, or the index has other items, or another process made it.
        """
        self._check_owner()
        count = len(self._new)
        if saved.base != self._digest():
            raise TableError(
                f"{self._source} has other items than the table of the checkpoint, whose rows are in another "
                "order; open the table that it was trained on"
            )
        if count > saved.items.size or not np.array_equal(saved.items[:count], self._new.ids):
            raise TableError(
                f"the index of {self._source} has other new items than the checkpoint; make it from the "
                "table again, and restore it before it is changed"
            )
        if saved.items.size > self._new.capacity:
            raise SpareRowsExhausted(
                f"the checkpoint has {saved.items.size} new items, {self._source} {self._new.capacity} rows "
                f"for them"
            )
        self._new.append(saved.items[count:])
        self._new.mark(np.setdiff1d(self._new.marked(), saved.deleted), False)
        self._new.mark(saved.deleted, True)
        self._new.seq = saved.seq

    def _rows(self, ids: Ints) -> Ints:
        rows = self._homes(ids)
        if self._new.num_marked:
            rows[self._new.is_marked(rows)] = 0
        return rows

    def _homes(self, ids: Ints) -> Ints:
        rows = self._base.rows_of_ascending(ids)
        if len(self._new):
            unknown = np.flatnonzero(rows == 0)
            position = self._new.positions(ids[unknown])
            rows[unknown] = np.where(position < 0, 0, 1 + len(self._base) + position)
        return rows

    def _advance(self, seq: int | None) -> None:
        if seq is not None:
            self._new.seq = seq

    def _digest(self) -> str:
        """Of the number of items on the disk and some of them: an item more or less shifts those after it."""
        count = len(self._base)
        digest = hashlib.sha256(str(count).encode())
        at = (
            np.unique(np.linspace(0, count - 1, SAMPLES).astype(np.int64)) if count else np.empty(0, np.int64)
        )
        digest.update(self._base.at(at).astype("<i8").tobytes())
        return digest.hexdigest()

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise TableError(
                f"the index of {self._source} is changed by the process that made it ({self._owner}), and "
                f"this one ({os.getpid()}) only reads it: apply windows there"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ItemIndex":
        """An index of its own, as the copy of a model is."""
        copy = ItemIndex(self._base, self.capacity, self._source, self.seq)
        copy._table = self._table
        copy.restore(self.saved())
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        """Give it to a process that is being started. A table is mapped again there.

        Raises:
            TableError: it is pickled for anything else, where changes would not be seen.
        """
        if get_spawning_popen() is None:
            raise TableError(
                f"the index of {self._source} can be given to a process only when that is started, so that "
                "it sees changes; checkpoints hold it in the state of the model"
            )
        table, where = self._table, None
        if table is not None and table.in_order:
            where = (str(table.path.resolve()), table.manifest.content)
        elif self._base_memory is None:
            self._base_memory = SharedMemory(8 * max(len(self._base), 1))
            shared = _ids_in(self._base_memory, len(self._base))
            shared.copy_(self._base.ids)
            self._base = RowIndex(shared)
        facts = (self._new.capacity, self.capacity, self._source, self._owner)
        return _attach, (self._new.memory, where, self._base_memory, len(self._base), *facts)


def _ids_in(memory: SharedMemory, count: int) -> Tensor:
    return torch.from_numpy(memory.array(np.int64, 0, count))


def _attach(
    memory: SharedMemory,
    where: tuple[str, str] | None,
    base_memory: SharedMemory | None,
    count: int,
    spare_rows: int,
    capacity: int,
    source: str,
    owner: int,
) -> ItemIndex:
    """The index of the process that started this one."""
    table = None
    if where is not None:
        path, content = where
        table = Table.open(path, verify=False)
        if table.manifest.content != content:
            raise VersionMismatch(f"{path} is another table than when its index was made; open it again")
        base = table.row_index()
    else:
        assert base_memory is not None
        base = RowIndex(_ids_in(base_memory, count))
    index = ItemIndex.__new__(ItemIndex)
    index._begin(base, NewItems(spare_rows, 1 + capacity, 0, memory), capacity, source, table, owner)
    return index


def _check_distinct(ids: Tensor) -> None:
    found, counts = ids.unique(return_counts=True)
    if (counts > 1).any():
        raise DuplicateId(f"item id {int(found[counts > 1][0])} is there twice in one window")
