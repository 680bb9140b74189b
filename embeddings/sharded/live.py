"""Change rows of a live table: new items, new vectors of known ones, and items that are deleted.

Every rank is given the same windows in the same order, writes the rows that it owns and remembers all ids: so
ranks agree without a collective, and neither storage nor rows ever move. New items get the rows that were
kept free, in the order of their ids. Apply windows between steps: a lookup that runs at the same time could
see half a vector.

An index and the rows of its table are changed together and remember the last window. An index that lacks
windows of the rows would give their items' rows to others, so it is refused (`check_index`). A checkpoint
with `store_rows` holds the items too, and `restore_index` gives them to an index.

Which windows apply is the rule in `windows/window.py`; a log that delivers them is `windows/log.py`.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_torchrec.embeddings.sharded.frozen import FrozenModule, FrozenTable, TableState
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.load import digest_of_ranks, find_frozen, group_of
from mim_torchrec.embeddings.table.format import (
    NonFiniteVector,
    Table,
    TableError,
    VersionMismatch,
    encode,
)
from mim_torchrec.embeddings.table.quantize import finite_rows
from mim_torchrec.embeddings.table.shards import CHUNK, check_loss
from mim_torchrec.embeddings.windows.window import Window, is_due


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
        ids: (num_items,) int64, each once; the same on every rank. They may be on a GPU, and so may vectors;
            both are checked and encoded in memory.
        vectors: (num_items, dim) floating point.
        table_version: of the encoder that made the vectors.
        seq: number of the window, larger than the last one's.
        name: of the table.

    Raises:
        VersionMismatch: the vectors are not of the table's encoder.
        SpareRowsExhausted: there are too few free rows. Nothing is changed.
        NonFiniteVector: a vector has NaN or infinity, or overflows the stored type. Nothing is changed.
        LossyVector: a vector is too small for the stored type. Nothing is changed.
        TableError: shapes do not fit, the window is not newer than the last one, or the index is not that of
            the rows, see :func:`check_index`.
    """
    _, frozen = find_frozen(model, name)
    _check_window(frozen, table_version, seq)
    if vectors.shape != (ids.numel(), frozen.config.embedding_dim) or not vectors.is_floating_point():
        raise TableError(
            f"frozen table {name}: {ids.numel()} ids need vectors floating point "
            f"({ids.numel()}, {frozen.config.embedding_dim}), found {vectors.dtype} {tuple(vectors.shape)}"
        )
    ids, vectors = ids.cpu(), vectors.detach().cpu()
    stored = encode(vectors.float(), frozen.dtype)
    finite = finite_rows(stored, frozen.dtype)
    if not finite.all():
        wrong = int(ids[~finite][0])
        raise NonFiniteVector(f"window {seq}, item id {wrong}: the vector holds NaN or infinity as "
                              f"{frozen.dtype}")  # fmt: skip
    check_loss(vectors, stored, frozen.dtype, ids, lambda row: f"window {seq}, row {row}",
               "use a table of float32, or scale the vectors")  # fmt: skip
    rows, _ = _place(frozen, index, ids, ids[:0], seq)
    written = _write(frozen, rows, stored)
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
        ids: (num_items,) int64, each once, in memory or on a GPU; unknown ones are left alone.
        table_version: likewise.
        seq: likewise.
        name: likewise.

    Raises:
        VersionMismatch: the window is not of the table's encoder.
        TableError: it is not newer than the last one, or the index is not that of the rows.
    """
    _, frozen = find_frozen(model, name)
    _check_window(frozen, table_version, seq)
    ids = ids.cpu()
    _, rows = _place(frozen, index, ids[:0], ids, seq)
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
        TableError: the vectors do not fit the table, or the index is not that of the rows. Nothing is
            changed.
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
    rows, gone = _place(frozen, index, window.ids, window.removed, window.seq)
    written = _write(frozen, rows, stored)
    written += _write(frozen, gone, stored.new_zeros(gone.numel(), stored.shape[1]))
    frozen.state = TableState(state.table_version, window.seq)
    return UpdateReport(items=window.ids.numel() + gone.numel(), rows=written, spare_rows=index.spare_rows)


def check_index(model: nn.Module, index: ItemIndex, *, name: str = "mm") -> None:
    """See that an index knows the items of all rows of a live table; cheap enough for every step.

    Args:
        model: as in :func:`update_items`.
        index: that ids are mapped by.
        name: of the table.

    Raises:
        VersionMismatch: the index is of another encoder's table.
        TableError: it is of a table of another size; or rows have seen windows that it has not, or it has
            seen windows that they have not.
    """
    frozen = find_frozen(model, name)[1]
    _check_same_table(frozen, index)
    if index.seq > frozen.state.seq:
        raise TableError(
            f"frozen table {name}: the index has the items of windows up to {index.seq}, the rows are those "
            f"of windows up to {frozen.state.seq}; apply the windows between to the table"
        )


def restore_index(model: nn.Module, index: ItemIndex, *, name: str = "mm") -> None:
    """Give an index the new and deleted items of a checkpoint with ``store_rows`` that a model has loaded.

    Args:
        model: as in :func:`update_items`; its state was loaded.
        index: of the table on the disk that the model was trained on, as :meth:`ItemIndex.of` makes it.
        name: of the table.

    Raises:
        TableError: the checkpoint holds no index, or that of another table.
    """
    frozen = find_frozen(model, name)[1]
    saved = frozen.items.saved
    if saved is None:
        raise TableError(
            f"frozen table {name}: the model has loaded no index of items. Checkpoints hold it where "
            "store_rows=True and windows were applied; otherwise apply the windows of the log again"
        )
    _check_size(frozen, index)
    index.restore(saved)
    frozen.items.index, frozen.items.saved = index, None


def check_ranks(model: nn.Module) -> None:
    """See that all ranks hold the same windows and items of every live table. Every rank calls it.

    A rank that skips a window goes on without an error. Call this before a checkpoint is written.

    Raises:
        TableError: a rank has other windows or items than rank 0; on every rank.
    """
    for module in (found for found in model.modules() if isinstance(found, FrozenModule)):
        for frozen in module.frozen_tables().values():
            frozen.check_ranks(group_of(module))


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


def _place(
    frozen: FrozenTable, index: ItemIndex, ids: Tensor, removed: Tensor, seq: int
) -> tuple[Tensor, Tensor]:
    """The rows of a window's items, and of those that it deletes; the index has them afterwards.

    An index may be ahead: of a second table, or of rows that were loaded again. Then it is as it has to be,
    and the window changes rows alone.
    """
    _check_same_table(frozen, index)
    if index.seq >= seq:
        rows, gone = index.homes(ids), index.homes(removed)
        if not rows.all():
            raise TableError(
                f"frozen table {frozen.config.name}: the index has windows up to {index.seq} but not item id "
                f"{int(ids[rows == 0][0])} of window {seq}; make it from the table again"
            )
        gone = gone[gone > 0]
    elif index.seq > frozen.state.seq:
        raise TableError(
            f"frozen table {frozen.config.name}: its rows have windows up to {frozen.state.seq}, its index "
            f"up to {index.seq}; window {seq} comes after those between"
        )
    else:
        rows, gone = index.add(ids), index.remove(removed, seq)
    frozen.items.index, frozen.items.saved = index, None
    return rows, gone


def _check_same_table(frozen: FrozenTable, index: ItemIndex) -> None:
    name = frozen.config.name
    _check_size(frozen, index)
    if index.table_version not in (None, frozen.state.table_version):
        raise VersionMismatch(
            f"frozen table {name} has table_version {frozen.state.table_version}, the index "
            f"{index.table_version}"
        )
    frozen.items.check(name)
    if index.seq < frozen.state.seq:
        raise TableError(
            f"frozen table {name}: its rows have windows up to {frozen.state.seq}, its index up to "
            f"{index.seq}. Their new items are unknown to the index, which would give their rows to others: "
            "use the index that the windows were applied with"
        )


def _check_size(frozen: FrozenTable, index: ItemIndex) -> None:
    if index.num_embeddings != frozen.config.num_embeddings:
        raise TableError(
            f"frozen table {frozen.config.name} has {frozen.config.num_embeddings} rows, the index is of a "
            f"table of {index.num_embeddings}"
        )


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
