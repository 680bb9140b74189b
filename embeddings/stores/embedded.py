"""The embedded parameter store: a memory-mapped table with an overlay of windows.

It needs no server and loads nothing: rows come from the page cache, which all processes of a machine share.
Private memory holds the overlay only. Any number of threads may look rows up while one thread applies
windows.
"""

from dataclasses import dataclass
from functools import reduce
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
GROWTH = 8  # times as many changes as the next layer has, at least


@dataclass(frozen=True)
class _Layer:
    """The changes of some windows, one after the other.

    Args:
        ids: (num_changed,) int64, ascending.
        places: (num_changed,) row of the buffer, or GONE where the item was deleted.
    """

    ids: Tensor
    places: Tensor

    def __len__(self) -> int:
        return self.ids.numel()

    def changed_by(self, later: "_Layer") -> "_Layer":
        """Both together; what changed in both is as in the later one."""
        untouched = ~torch.isin(self.ids, later.ids)
        ids = torch.cat([self.ids[untouched], later.ids])
        places = torch.cat([self.places[untouched], later.places])
        order = ids.argsort()
        return _Layer(ids[order], places[order])


@dataclass(frozen=True)
class _Overlay:
    """The changes of all windows up to one; the next window makes a new overlay.

    Layers lie one over the other, the newest last. A window makes a layer of its own. Layers that are not
    `GROWTH` times as large as what lies over them become one with it. So there are few, and on average a
    change is copied a few times, however many there are.

    Args:
        seq: of the window.
        layers: the older of two says nothing of an item that the newer one has.
        rows: (capacity, stored_width); the places that this overlay names are never written again.
        used: rows that some overlay has named.
    """

    seq: int
    layers: tuple[_Layer, ...]
    rows: Tensor
    used: int

    def changed(self, window: Window, stored: Tensor) -> "_Overlay":
        """The overlay after a window."""
        rows, used, layers = self.rows, self.used, self.layers
        if used + len(stored) > len(rows):  # make room, without the rows that are not named any more
            layers = _merged(layers)
            old = layers[0].places if layers else torch.empty(0, dtype=torch.int64)
            named = old >= 0
            kept = rows[old[named]]
            rows = rows.new_empty(max(SMALLEST, 2 * (len(kept) + len(stored))), rows.shape[1])
            rows[: len(kept)] = kept
            places = torch.full_like(old, GONE)
            places[named] = torch.arange(len(kept))
            layers = tuple(_Layer(layer.ids, places) for layer in layers)
            used = len(kept)
        rows[used : used + len(stored)] = stored
        ids = torch.cat([window.ids, window.removed])
        places = torch.cat([used + torch.arange(len(stored)), torch.full_like(window.removed, GONE)])
        order = ids.argsort()
        top = _Layer(ids[order], places[order])
        while layers and len(layers[-1]) < GROWTH * len(top):
            top = layers[-1].changed_by(top)
            layers = layers[:-1]
        return _Overlay(window.seq, (*layers, top) if len(top) else layers, rows, used + len(stored))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each of ids (num_ids,) was changed, bool; and its place, of those that were."""
        changed = torch.zeros(ids.numel(), dtype=torch.bool)
        places = torch.empty(ids.numel(), dtype=torch.int64)
        for layer in self.layers:  # a newer one writes over an older one
            at = RowIndex(layer.ids).rows(ids)
            here = at > 0
            places[here] = layer.places[at[here] - 1]
            changed |= here
        return changed, places[changed]


def _merged(layers: tuple[_Layer, ...]) -> tuple[_Layer, ...]:
    """All layers as one, if there are any."""
    return (reduce(_Layer.changed_by, layers),) if layers else ()


class EmbeddedStore:
    """A `ParameterStore` in this process.

    Args:
        table: the base.
    """

    def __init__(self, table: Table) -> None:
        manifest = table.manifest
        self._table = table
        self.table_version, self.dim = manifest.table_version, manifest.dim
        rows = torch.empty(0, manifest.stored_width, dtype=manifest.torch_dtype)
        self._overlay = _Overlay(manifest.seq, (), rows, 0)

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
        if overlay.layers:
            changed, places = overlay.find(ids)
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
