"""The embedded parameter store: a memory-mapped table with an overlay of windows.

It needs no server and loads nothing: rows come from the page cache, which all processes of a machine share.
Private memory holds the overlay only. Any number of threads may look rows up while one thread applies
windows.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.embeddings.table.quantize import decode
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.row_index import RowIndex
from mim_torchrec.embeddings.windows.window import Window, is_due

GONE = -1
SMALLEST = 1024  # rows of the first buffer


@dataclass(frozen=True)
class _Overlay:
    """The changes of all windows up to one; the next window makes a new overlay.

    Args:
        seq: of the window.
        ids: (num_changed,) int64, ascending.
        places: (num_changed,) row of `rows`, or GONE where the item was deleted.
        rows: (capacity, stored_width); the places that this overlay names are never written again.
        used: rows that some overlay has named.
    """

    seq: int
    ids: Tensor
    places: Tensor
    rows: Tensor
    used: int

    def changed(self, window: Window, stored: Tensor) -> "_Overlay":
        """The overlay after a window."""
        rows, used, old = self.rows, self.used, self.places
        if used + len(stored) > len(rows):  # make room, without the rows that are not named any more
            named = old >= 0
            kept = rows[old[named]]
            rows = rows.new_empty(max(SMALLEST, 2 * (len(kept) + len(stored))), rows.shape[1])
            rows[: len(kept)] = kept
            old = torch.full_like(old, GONE)
            old[named] = torch.arange(len(kept))
            used = len(kept)
        rows[used : used + len(stored)] = stored
        ids = torch.cat([window.ids, window.removed])
        places = torch.cat([used + torch.arange(len(stored)), torch.full_like(window.removed, GONE)])
        untouched = ~torch.isin(self.ids, ids)
        ids, places = torch.cat([self.ids[untouched], ids]), torch.cat([old[untouched], places])
        order = ids.argsort()
        return _Overlay(window.seq, ids[order], places[order], rows, used + len(stored))


class EmbeddedStore:
    """A `ParameterStore` in this process.

    Args:
        table: the base.
    """

    def __init__(self, table: Table) -> None:
        manifest = table.manifest
        self._table = table
        self.table_version, self.dim = manifest.table_version, manifest.dim
        nothing = torch.empty(0, dtype=torch.int64)
        rows = torch.empty(0, manifest.stored_width, dtype=manifest.torch_dtype)
        self._overlay = _Overlay(manifest.seq, nothing, nothing, rows, 0)

    @classmethod
    def open(cls, path: str | Path, table_version: str | None = None) -> "EmbeddedStore":
        """Open a table as a store; the checksums of its shards are `mim table verify`'s business.

        Raises:
            TableError: see `Table.open`.
        """
        return cls(Table.open(path, table_version, verify=False))

    @property
    def seq(self) -> int:
        return self._overlay.seq

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `ParameterStore`."""
        overlay = self._overlay
        stored, found = self._table.find(ids)
        if overlay.ids.numel():
            at = RowIndex(overlay.ids).rows(ids)
            changed = at > 0
            places = overlay.places[at[changed] - 1]
            there = places != GONE
            rows = stored.new_zeros(len(places), stored.shape[1])
            rows[there] = overlay.rows[places[there]]
            stored[changed], found[changed] = rows, there
        return decode(stored, self._table.manifest.dtype), found

    def apply(self, window: Window) -> bool:
        """See `ParameterStore`; one thread may call it."""
        if not is_due(window.table_version, window.seq, self.table_version, self._overlay.seq):
            return False
        if window.dim != self.dim:
            raise TableError(
                f"{self._table.path} has vectors of {self.dim}, window {window.seq} of {window.dim}"
            )
        stored = window.stored_as(self._table.manifest.dtype)
        self._overlay = self._overlay.changed(window, stored)  # one assignment: readers see all or nothing
        return True
