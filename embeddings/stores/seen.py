"""Watermarks that a reader of a store has seen: a store that has less now has lost rows.

Servers that replicate to a standby do so after they have answered. A standby that takes the place of its
primary may lack the last windows, and its rows are then older than those that were read before.
"""

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

REMEMBERED = 64  # changes whose items are known


@dataclass(frozen=True)
class Marks:
    """The highest watermark of each shard since the newest base table was seen.

    A newer base replaces what was seen: whoever loads it decides what rows there are.

    Attributes:
        base: seq of the base table; None before anything was seen.
        of_shards: by number of a shard; those that are not there are at `base`.
    """

    base: int | None = None
    of_shards: Mapping[int, int] = field(default_factory=dict)

    def loss(self, base: int, marks: Mapping[int, int]) -> str | None:
        """What a store has lost that was read after these were seen; None where it has lost nothing.

        >>> before = Marks(0, {0: 7, 1: 7})
        >>> before.loss(0, {1: 7}), before.loss(0, {0: 5, 1: 7}), before.loss(8, {0: 8, 1: 8})
        (None, 'windows: shard 0 is at 5 and was at 7', None)
        """
        if self.base is not None and base < self.base:
            return f"a base table: that of seq {base} is there, and that of {self.base} was"
        if base != self.base:
            return None
        for shard, mark in sorted(marks.items()):
            if mark < (before := self.of_shards.get(shard, base)):
                return f"windows: shard {shard} is at {mark} and was at {before}"
        return None


class Seen:
    """What all readers of a store have seen.

    Whoever reads takes `marks` before: what others see meanwhile may be newer than what is read, and nothing
    is lost then.

    Attributes:
        marks: the highest watermarks so far.
        changes: how often others were seen to have moved a watermark or the base.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[Tensor | None] = deque(maxlen=REMEMBERED)  # of the last changes
        self.marks = Marks()
        self.changes = 0

    def note(self, base: int, marks: Mapping[int, int], changed: Tensor | None = None) -> None:
        """Remember what was read.

        Args:
            base: seq of the base table.
            marks: watermarks by shard.
            changed: (num_changed,) int64, at least the items of all windows between the watermarks that were
                seen before and these; None where that is not known.
        """
        self._note(base, marks, changed, own=None)

    def note_applied(self, base: int, shards: Mapping[int, int]) -> None:
        """Remember windows that this process has applied: the watermark of each shard is now one higher.

        Args:
            base: seq of the base table.
            shards: watermarks by shard.
        """
        self._note(base, shards, None, own=1)

    def changed_since(self, changes: int) -> Tensor | None:
        """Items that others have changed since there were so many `changes`; None for any.

        Returns:
            (num_changed,) int64, some of them several times.
        """
        with self._lock:
            count = self.changes - changes
            last = list(self._items)[len(self._items) - count :] if count <= len(self._items) else [None]
        found = [items for items in last if items is not None]
        if len(found) < len(last):
            return None
        return torch.cat([torch.empty(0, dtype=torch.int64), *found])

    def _note(self, base: int, marks: Mapping[int, int], changed: Tensor | None, own: int | None) -> None:
        with self._lock:
            known = self.marks
            if known.base is None or base > known.base:
                known = Marks(base)
                self._changed(None)
            if base != known.base:
                return
            steps = [mark - known.of_shards.get(shard, base) for shard, mark in marks.items()]
            if any(step > 0 and step != own for step in steps):
                self._changed(changed)
            higher = {n: mark for n, mark in marks.items() if mark > known.of_shards.get(n, base)}
            self.marks = Marks(base, {**known.of_shards, **higher})

    def _changed(self, items: Tensor | None) -> None:
        self.changes += 1
        self._items.append(items)
