"""Change rows of a live table: new items, new vectors of known ones, and items that are deleted.

Every rank is given the same windows in the same order, writes the rows that it owns and remembers all ids: so
ranks agree without a collective, and neither storage nor rows ever move. New items get the rows that were
kept free, in the order of their ids. Apply windows between steps: a lookup that runs at the same time could
see half a vector.

Which windows apply is the rule in `windows/window.py`; a log that delivers them is `windows/log.py`.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_torchrec.embeddings.sharded.frozen import FrozenTable, TableState
from mim_torchrec.embeddings.sharded.load import digest_of_ranks, find_frozen
from mim_torchrec.embeddings.table.format import (
    DuplicateId,
    NonFiniteVector,
    RowIndex,
    Table,
    TableError,
    VersionMismatch,
    encode,
)
from mim_torchrec.embeddings.table.quantize import finite_rows
from mim_torchrec.embeddings.table.shards import CHUNK, check_loss
from mim_torchrec.embeddings.windows.window import Window, is_due


class SpareRowsExhausted(TableError):
    """There are more new items than rows were kept free."""


class ItemIndex:
    """Maps item ids to rows of a live table and counts those it does not know, whose row is 0.

    Args:
        ids: (num_items,) int64, strictly ascending: the items of rows 1 to num_items.
        capacity: items that the table has rows for.
        source: where the table is, for messages.

    ``seen`` and ``unknown`` count ids looked up.

    >>> index = ItemIndex(torch.tensor([10, 30]), capacity=3)
    >>> index.rows(torch.tensor([30, 10, 20])).tolist(), index.unknown
    ([2, 1, 0], 1)
    >>> index.add(torch.tensor([20])).tolist(), index.rows(torch.tensor([20])).tolist(), index.spare_rows
    ([3], [3], 0)
    """

    def __init__(self, ids: Tensor, capacity: int, source: str = "TABLE") -> None:
        self._index, self.capacity, self._source = RowIndex(ids), capacity, source
        self._new: dict[int, int] = {}  # items in the rows after those of `ids`
        self._gone: set[int] = set()
        self._changed = RowIndex(torch.empty(0, dtype=torch.int64))
        self._changed_rows = torch.zeros(1, dtype=torch.int64)
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
        return cls(table.row_index().ids, table.manifest.capacity, str(table.path))

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, with row 0 and the spare rows."""
        return 1 + self.capacity

    @property
    def spare_rows(self) -> int:
        """Rows that are still free; the row of an item deleted stays its own."""
        return self.capacity - self._index.ids.numel() - len(self._new)

    def __len__(self) -> int:
        return self._index.ids.numel() + len(self._new) - len(self._gone)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row of every id, int64 in the shape of ``ids``, and count."""
        rows = self._index.rows(ids)
        if self._changed.ids.numel():
            at = self._changed.rows(ids)
            rows = torch.where(at > 0, self._changed_rows[at], rows)
        self.seen += ids.numel()
        self.unknown += ids.numel() - int(torch.count_nonzero(rows))
        return rows

    def add(self, ids: Tensor) -> Tensor:
        """Return the rows of items (n,) int64, giving those that have none a free one each.

        Raises:
            SpareRowsExhausted: there are too few free rows; nothing is changed.
            DuplicateId: an id is there twice.
        """
        _check_distinct(ids)
        known = self.homes(ids)
        fresh = ids[known == 0].sort().values.tolist()
        if len(fresh) > self.spare_rows:
            room = self.capacity - self._index.ids.numel() + max(len(fresh), self.capacity // 10)
            raise SpareRowsExhausted(
                f"{len(fresh)} new items, {self.spare_rows} free rows of {self.capacity}: make room with "
                f"`mim table grow {self._source} --out DIR --spare-rows {room}`, which keeps every row, and "
                f"load the table that it writes"
            )
        for item in fresh:
            self._new[item] = 1 + self._index.ids.numel() + len(self._new)
        self._gone.difference_update(ids.tolist())
        self._refresh()
        return self.homes(ids)

    def remove(self, ids: Tensor) -> Tensor:
        """Forget items (n,) int64; returns the rows of those that were known."""
        _check_distinct(ids)
        rows = self.homes(ids)
        self._gone.update(ids[rows > 0].tolist())
        self._refresh()
        return rows[rows > 0]

    def homes(self, ids: Tensor) -> Tensor:
        """The rows of items, deleted or not; 0 for those that never had one."""
        rows = self._index.rows(ids)
        new = [self._new.get(item, 0) for item in ids[rows == 0].tolist()]
        rows[rows == 0] = torch.tensor(new, dtype=torch.int64)
        return rows

    def _refresh(self) -> None:
        changed = {**self._new, **dict.fromkeys(self._gone, 0)}
        ids = torch.tensor(sorted(changed), dtype=torch.int64)
        self._changed = RowIndex(ids)
        self._changed_rows = torch.tensor([0, *(changed[item] for item in ids.tolist())])


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What a window did: items of the window, rows written on this rank, free rows left."""

    items: int
    rows: int
    spare_rows: int


def update_items(
    model: nn.Module,
    index: ItemIndex,
    ids: Tensor,
    vectors: Tensor,
    *,
    table_version: str,
    seq: int,
    name: str = "mm",
) -> UpdateReport:
    """Write the vectors of items into a live table: a row of its own for each, new or known.

    Args:
        model: the model, or its frozen collection, sharded or not.
        index: of the table; the same on every rank.
        ids: (num_items,) int64, each once; the same on every rank.
        vectors: (num_items, dim) floating point.
        table_version: of the encoder that made the vectors.
        seq: number of the window, larger than the last one's.
        name: of the table.

    Raises:
        VersionMismatch: the vectors are not of the table's encoder.
        SpareRowsExhausted: there are too few free rows. Nothing is changed.
        NonFiniteVector: a vector has NaN or infinity, or overflows the stored type. Nothing is changed.
        LossyVector: a vector is too small for the stored type. Nothing is changed.
        TableError: shapes do not fit, or the window is not newer than the last one.
    """
    _, frozen = find_frozen(model, name)
    _check_window(frozen, table_version, seq)
    if vectors.shape != (ids.numel(), frozen.config.embedding_dim) or not vectors.is_floating_point():
        raise TableError(
            f"frozen table {name}: {ids.numel()} ids need vectors floating point "
            f"({ids.numel()}, {frozen.config.embedding_dim}), found {vectors.dtype} {tuple(vectors.shape)}"
        )
    stored = encode(vectors.float(), frozen.dtype)
    finite = finite_rows(stored, frozen.dtype)
    if not finite.all():
        wrong = int(ids[~finite][0])
        raise NonFiniteVector(f"window {seq}, item id {wrong}: the vector holds NaN or infinity as "
                              f"{frozen.dtype}")  # fmt: skip
    check_loss(vectors, stored, frozen.dtype, ids, lambda row: f"window {seq}, row {row}",
               "use a table of float32, or scale the vectors")  # fmt: skip
    written = _write(frozen, index.add(ids), stored)
    frozen.state = TableState(table_version, seq)
    return UpdateReport(items=ids.numel(), rows=written, spare_rows=index.spare_rows)


def delete_items(
    model: nn.Module, index: ItemIndex, ids: Tensor, *, table_version: str, seq: int, name: str = "mm"
) -> UpdateReport:
    """Remove items from a live table: their rows become zero and their ids unknown.

    The row of an item stays its own, should it come back: a batch that was mapped before the window must not
    find another item there.

    Args:
        model: as in :func:`update_items`.
        index: likewise.
        ids: (num_items,) int64, each once; unknown ones are left alone.
        table_version: likewise.
        seq: likewise.
        name: likewise.

    Raises:
        VersionMismatch: the window is not of the table's encoder.
        TableError: it is not newer than the last one.
    """
    _, frozen = find_frozen(model, name)
    _check_window(frozen, table_version, seq)
    rows = index.remove(ids)
    zeros = encode(torch.zeros(rows.numel(), frozen.config.embedding_dim), frozen.dtype)
    zeros.zero_()
    written = _write(frozen, rows, zeros)
    frozen.state = TableState(table_version, seq)
    return UpdateReport(items=rows.numel(), rows=written, spare_rows=index.spare_rows)


def table_state(model: nn.Module, name: str = "mm") -> TableState:
    """Which vectors a live table holds: its `table_version`, and `seq` of the last window applied."""
    return find_frozen(model, name)[1].state


def apply_window(
    model: nn.Module, index: ItemIndex, window: Window, *, name: str = "mm"
) -> UpdateReport | None:
    """Apply a window of a log to a live table, if it is due: its vectors and what it takes down, at once.

    Args:
        model: as in :func:`update_items`.
        index: likewise.
        window: the same on every rank.
        name: of the table.

    Returns:
        What it did, with the items deleted among the items; None where it had been applied already.

    Raises:
        VersionMismatch: the window is not of the table's encoder.
        WindowGap: windows before this one were not applied.
        SpareRowsExhausted: there are too few free rows. Nothing is changed.
        TableError: the vectors do not fit the table. Nothing is changed.
    """
    _, frozen = find_frozen(model, name)
    state = frozen.state
    if state.table_version is None:
        raise TableError(f"frozen table {name} is not loaded; load_table comes before windows")
    if not is_due(window.table_version, window.seq, state.table_version, state.seq):
        return None
    if window.dim != frozen.config.embedding_dim:
        raise TableError(
            f"frozen table {name} has vectors of {frozen.config.embedding_dim}, window {window.seq} of "
            f"{window.dim}"
        )
    stored = window.stored_as(frozen.dtype)
    written = _write(frozen, index.add(window.ids), stored)
    gone = index.remove(window.removed)
    written += _write(frozen, gone, stored.new_zeros(gone.numel(), stored.shape[1]))
    frozen.state = TableState(state.table_version, window.seq)
    return UpdateReport(items=window.ids.numel() + gone.numel(), rows=written, spare_rows=index.spare_rows)


def expected_digest(
    model: nn.Module, table: Table, index: ItemIndex, changed: dict[int, Tensor | None], *, name: str = "mm"
) -> str:
    """What `load.table_digest` of a live table is, if it holds a base and some changes and nothing else.

    Args:
        model: as in :func:`update_items`.
        table: the base, opened again, because updates of a live table that is mapped are in its mapping.
        index: as in :func:`update_items`, after the changes.
        changed: by item, the vector as stored, None for one that was deleted.
        name: of the table.
    """
    module, frozen = find_frozen(model, name)
    ids = torch.tensor(sorted(changed), dtype=torch.int64)
    places = index.homes(ids)
    zero = torch.zeros(table.manifest.stored_width, dtype=table.manifest.torch_dtype)
    row_of = {int(row): changed[item] for row, item in zip(places, ids.tolist(), strict=True) if row > 0}
    rows = torch.tensor(sorted(row_of), dtype=torch.int64)
    first, last = frozen.first_row, frozen.first_row + frozen.store.num_rows
    digest = hashlib.sha256()
    for start in range(first, last, CHUNK):
        stop = min(start + CHUNK, last)
        part = table.rows_for(start, stop)
        for row in rows[(rows >= start) & (rows < stop)].tolist():
            vector = row_of[row]
            part[row - start] = zero if vector is None else vector
        digest.update(part.view(torch.uint8).numpy().data)
    return digest_of_ranks(digest.hexdigest(), module, name)


def _write(frozen: FrozenTable, rows: Tensor, stored: Tensor) -> int:
    rows = rows - frozen.first_row
    own = (rows >= 0) & (rows < frozen.store.num_rows)
    frozen.store.write(rows[own], stored[own])
    return int(own.sum())


def _check_window(frozen: FrozenTable, table_version: str, seq: int) -> None:
    state, name = frozen.state, frozen.config.name
    if state.table_version is None:
        raise TableError(f"frozen table {name} is not loaded; load_table comes before updates")
    if table_version != state.table_version:
        raise VersionMismatch(
            f"frozen table {name} has table_version {state.table_version}, window {seq} has {table_version}"
        )
    if seq <= state.seq:
        raise TableError(
            f"frozen table {name} has applied windows up to {state.seq}; window {seq} is not newer"
        )


def _check_distinct(ids: Tensor) -> None:
    found, counts = ids.unique(return_counts=True)
    if (counts > 1).any():
        raise DuplicateId(f"item id {int(found[counts > 1][0])} is there twice in one window")
