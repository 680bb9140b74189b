"""Places of ids among many sorted ones, without a search: a table says where the ids of a range begin.

Ids that are numbered, or spread evenly as hashes are, need one or two steps each, in any order. The table
takes 4 to 8 bytes per sorted id of many, and up to 64 of a million or fewer, whose ranges are narrower.
"""

import numpy as np

FEW, NARROWER = 1 << 20, 3
"""Ids up to which ranges are narrower, by this power of two."""
MOST = 32
"""Ids of one range beyond which looking through it takes longer than a search."""


class IdBuckets:
    """Finds ids among sorted ones.

    Args:
        ids: (n,) int64, strictly ascending, at least one.

    Attributes:
        pays: whether no range holds many ids; else `places` would be slow.

    >>> IdBuckets(np.array([-5, 10, 30])).places(np.array([30, 7, -5, 99])).tolist()
    [2, -1, 0, -1]
    """

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self._low = ids, ids[:1].view(np.uint64)
        span = int(ids[-1]) - int(ids[0])
        bits = len(ids).bit_length() + (NARROWER if len(ids) <= FEW else 0)
        self._shift = np.uint64(max(span.bit_length() - bits, 0))
        count = (span >> int(self._shift)) + 1
        self._last = np.uint64(count - 1)
        sizes = np.bincount(self._ranges(ids), minlength=count)
        self._most = int(sizes.max())
        self.pays = self._most <= MOST
        kind = np.int32 if len(ids) < 2**31 else np.int64
        self._starts = (np.cumsum(sizes) - sizes).astype(kind) if self.pays else np.zeros(0, kind)

    def places(self, wanted: np.ndarray) -> np.ndarray:
        """(m,) places of ids (m,) int64 in any order, -1 for those that are not there."""
        at: np.ndarray = self._starts.take(self._ranges(wanted))
        found = self._ids.take(at)
        places = at.astype(np.int64)
        rest = np.flatnonzero(found != wanted)
        places[rest] = -1
        found, at, ids = found[rest], at[rest], wanted[rest]
        for _ in range(self._most - 1):
            larger = np.flatnonzero(found < ids)
            if not len(larger):
                break
            rest, at, ids = rest[larger], at[larger] + 1, ids[larger]
            found = self._ids.take(at, mode="clip")
            hit = found == ids
            places[rest[hit]] = at[hit]
        return places

    def _ranges(self, ids: np.ndarray) -> np.ndarray:
        """(m,) range of each id; those beyond the sorted ones have the last."""
        ranges = ids.view(np.uint64) - self._low  # distances, of smaller ids they are huge
        np.right_shift(ranges, self._shift, out=ranges)
        places: np.ndarray = np.minimum(ranges, self._last, out=ranges).view(np.int64)
        return places
