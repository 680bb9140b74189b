"""Places of ids among many sorted ones, without a search: a table says where the ids of a range begin.

Ids that are numbered, or spread evenly as hashes are, need one or two steps each, in any order. The table
takes 4 to 8 bytes per sorted id.
"""

import numpy as np

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
        self._shift = np.uint64(max(span.bit_length() - len(ids).bit_length(), 0))
        count = (span >> int(self._shift)) + 1
        self._last = np.uint64(count - 1)
        sizes = np.bincount(self._ranges(ids), minlength=count)
        self._most = int(sizes.max())
        self.pays = self._most <= MOST
        kind = np.int32 if len(ids) < 2**31 else np.int64
        self._starts = (np.cumsum(sizes) - sizes).astype(kind) if self.pays else np.zeros(0, kind)

    def places(self, wanted: np.ndarray) -> np.ndarray:
        """(m,) places of ids (m,) int64 in any order, -1 for those that are not there."""
        at = self._starts.take(self._ranges(wanted))
        found = self._ids.take(at)
        places = np.where(found == wanted, at, -1).astype(np.int64)
        beyond = np.flatnonzero(found < wanted)
        for _ in range(self._most - 1):
            if not len(beyond):
                break
            at_next, ids = at[beyond] + 1, wanted[beyond]
            found = self._ids.take(at_next, mode="clip")
            hit = found == ids
            places[beyond[hit]] = at_next[hit]
            at[beyond] = at_next
            beyond = beyond[found < ids]
        return places

    def _ranges(self, ids: np.ndarray) -> np.ndarray:
        """(m,) range of each id; those beyond the sorted ones have the last."""
        distances = ids.view(np.uint64) - self._low  # of smaller ids they are huge
        return np.minimum(distances >> self._shift, self._last).view(np.int64)
