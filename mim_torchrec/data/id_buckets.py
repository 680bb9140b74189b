"""Places of ids among many sorted ones, without a search: a table says where the ids of a range begin.

Ids that are numbered, or spread evenly as hashes are, need one or two steps each, in any order. The table
takes 4 to 8 bytes per sorted id of many, and up to 64 of a million or fewer, whose ranges are narrower.
"""

import numpy as np

FEW, NARROWER = 1 << 20, 3
"""Ids up to which ranges are narrower, by this power of two."""
MOST = 32
"""Ids of one range beyond which looking through it takes longer than a search."""

AT_ONCE = 1 << 14
"""Ids that are looked up at once, so that what is computed of them stays in the cache."""


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
        sizes = np.bincount(self._ranges(ids), minlength=count)
        self._most = int(sizes.max())
        self.pays = self._most <= MOST
        kind = np.int32 if len(ids) < 2**31 else np.int64
        self._starts = (np.cumsum(sizes) - sizes).astype(kind) if self.pays else np.zeros(0, kind)

    def places(self, wanted: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(m,) places of ids (m,) int64 in any order, -1 for those that are not there; in `out`, if given."""
        places = np.empty(len(wanted), np.int64) if out is None else out
        for start in range(0, len(wanted), AT_ONCE):
            own = wanted[start : start + AT_ONCE]
            found = self._starts.take(self._ranges(own), mode="clip").astype(np.int64)
            missed = np.flatnonzero(self._ids.take(found) != own)
            if len(missed):
                found[missed] = self._further(own.take(missed), found.take(missed))
            places[start : start + AT_ONCE] = found
        return places

    def _further(self, wanted: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Places of ids that are not the first ones of their ranges, which begin `at`."""
        last = len(self._ids) - 1
        at = np.minimum(at + 1, last)
        found = self._ids.take(at)
        places = np.where(found == wanted, at, -1)
        rest, steps = np.flatnonzero(found < wanted), 2
        while len(rest) and steps < self._most:
            own = wanted.take(rest)
            further = np.minimum(at.take(rest) + 1, last)
            found = self._ids.take(further)
            at[rest], places[rest] = further, np.where(found == own, further, -1)
            rest, steps = rest[found < own], steps + 1
        return places

    def _ranges(self, ids: np.ndarray) -> np.ndarray:
        """(m,) range of each id; of one beyond the sorted ones it is too large, or negative."""
        ranges = ids.view(np.uint64) - self._low  # distances, of smaller ids they are huge
        places: np.ndarray = np.right_shift(ranges, self._shift, out=ranges).view(np.int64)
        return places
