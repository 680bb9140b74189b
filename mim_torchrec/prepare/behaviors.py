"""Behaviors by user in files that are mapped into memory, and the last N of them that a request knows.

A binary search finds how many behaviors were known at each request. Which those are, is a slice of the
behaviors of its user. Both are done here, for both engines: a running count over behaviors and requests costs
an engine a sort of both. Lists of structs cost it more still, and none spills them to disk.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_torchrec.data.ids import stable_ids
from mim_torchrec.embeddings.files import full_disk_reported
from mim_torchrec.prepare.assembly import Lists

VALUES = {"item": np.int64, "ts": np.int64, "category": np.int32, "kind": np.int8}
COLUMNS = VALUES | {"known_at": np.int64}


class Behaviors:
    """Behaviors of all users, those of a user one after the other.

    Args:
        batches: `user`, `item`, `ts`, `known_at`, `category`, `kind`, see `histories.in_order`.
        folder: for the files; must not exist.
    """

    def __init__(self, batches: Iterator[pa.Table], folder: Path) -> None:
        folder.mkdir()
        paths = {name: folder / name for name in COLUMNS}
        users: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        size, last = 0, None
        for batch in batches:
            user = stable_ids(batch["user"]).to_numpy()
            if not len(user):
                continue
            first = np.flatnonzero(np.r_[last is None or user[0] != last, user[1:] != user[:-1]])
            users.append(user[first])
            starts.append(size + first)
            for name, kind in COLUMNS.items():
                column = stable_ids(batch[name]) if name == "item" else batch[name].combine_chunks()
                values = column.to_numpy(zero_copy_only=False).astype(kind, copy=False)
                with full_disk_reported(paths[name], values.nbytes), paths[name].open("ab") as file:
                    file.write(values.data)
            size, last = size + len(user), user[-1]
        found = np.concatenate([np.zeros(0, np.int64), *users])
        order = np.argsort(found, kind="stable")
        begin = np.concatenate([np.zeros(0, np.int64), *starts])
        self._users, self._starts = found[order], begin[order]
        self._counts = np.diff(np.r_[begin, size])[order]
        self._columns = {
            name: np.asarray(np.memmap(paths[name], kind, "r")) if size else np.zeros(0, kind)
            for name, kind in COLUMNS.items()
        }
        self.counts = {"behaviors": size, "requests_without": 0, "requests_cut_to_the_last": 0}
        """Of the report: behaviors, and requests so far that know none, or more than they get."""

    def last(self, users: np.ndarray, ts: np.ndarray, length: int) -> Lists:
        """The last behaviors that were known strictly before requests.

        Args:
            users: (n,) int64 of the requests.
            ts: (n,) int64, when they were.
            length: how many behaviors of each, at most.

        Returns:
            Lists of `item`, `ts`, `category`, `kind`.
        """
        place = np.minimum(np.searchsorted(self._users, users), max(len(self._users) - 1, 0))
        some = np.flatnonzero(self._users[place] == users) if len(self._users) else np.zeros(0, np.int64)
        first = self._starts[place[some]]
        end = self._end(first, self._counts[place[some]], ts[some])
        known, begin = np.zeros((2, len(users)), np.int64)
        known[some] = end - first
        lengths = np.minimum(known, length)
        self.counts["requests_without"] += int((known == 0).sum())
        self.counts["requests_cut_to_the_last"] += int((known > length).sum())
        begin[some] = end - lengths[some]
        before = np.cumsum(lengths) - lengths
        index = np.repeat(begin - before, lengths) + np.arange(lengths.sum())
        return Lists(lengths, {name: pa.array(self._columns[name].take(index)) for name in VALUES})

    def _end(self, first: np.ndarray, counts: np.ndarray, ts: np.ndarray) -> np.ndarray:
        """(n,) the place after the last behavior that was known before `ts`, by binary search."""
        known_at = self._columns["known_at"]
        low, high = first.copy(), first + counts
        while len(wide := np.flatnonzero(low < high)):
            middle = (low[wide] + high[wide]) // 2
            early = known_at.take(middle) < ts[wide]
            low[wide[early]] = middle[early] + 1
            high[wide[~early]] = middle[~early]
        return low
