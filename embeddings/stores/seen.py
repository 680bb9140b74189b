"""Watermarks that a reader of a store has seen: a store that has less now has lost rows.

Servers that replicate to a standby do so after they have answered. A standby that takes the place of its
primary may lack the last windows, and its rows are then older than those that were read before.
"""

import threading
from collections.abc import Mapping


class Seen:
    """The highest watermark of each shard, since the newest base table was seen.

    A newer base replaces what was seen: whoever loads it decides what rows there are.

    Attributes:
        changes: how often a watermark or the base was another than before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._base: int | None = None
        self._marks: dict[int, int] = {}
        self.changes = 0

    def note(self, base: int, marks: Mapping[int, int]) -> None:
        """Remember what was read."""
        with self._lock:
            if self._base is None or base > self._base:
                self._base, self._marks = base, {}
                self.changes += 1
            if base == self._base:
                higher = {shard: mark for shard, mark in marks.items() if mark > self._marks.get(shard, base)}
                self._marks |= higher
                self.changes += len(higher)

    def loss(self, base: int, marks: Mapping[int, int]) -> str | None:
        """What a store has lost that has these marks now; None where it has lost nothing.

        >>> seen = Seen()
        >>> seen.note(0, {0: 7, 1: 7})
        >>> seen.loss(0, {1: 7}), seen.loss(0, {0: 5, 1: 7}), seen.loss(8, {0: 8, 1: 8})
        (None, 'windows: shard 0 is at 5 and was at 7', None)
        """
        with self._lock:
            if self._base is not None and base < self._base:
                return f"a base table: that of seq {base} is there, and that of {self._base} was"
            if base != self._base:
                return None
            for shard, mark in sorted(marks.items()):
                if mark < (before := self._marks.get(shard, base)):
                    return f"windows: shard {shard} is at {mark} and was at {before}"
        return None
