"""Behaviors by user in files that are mapped into memory, and the last N of them that a request knows.

The engine counts how many behaviors were known at each request; which those are, is a slice of the behaviors
of its user. Slices are gathered here, for both engines. Lists of structs cost an engine several times as
much, and none spills them to disk.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_torchrec.data.ids import stable_ids
from mim_torchrec.embeddings.files import full_disk_reported
from mim_torchrec.prepare.assembly import Lists

COLUMNS = {"item": np.int64, "ts": np.int64, "category": np.int32, "kind": np.int8}


class Behaviors:
    """Behaviors of all users, those of a user one after the other.

    Args:
        batches: `user`, `item`, `ts`, `category`, `kind`, see `histories.in_order`.
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

    def last(self, users: np.ndarray, known: np.ndarray, length: int) -> Lists:
        """The last behaviors that requests know.

        Args:
            users: (n,) int64 of the requests.
            known: (n,) int64, how many of their first behaviors are known.
            length: how many of these, at most.

        Returns:
            Lists of `item`, `ts`, `category`, `kind`.

        Raises:
            RuntimeError: more are known than a user has.
        """
        lengths = np.minimum(known, length)
        some = np.flatnonzero(lengths)
        place = np.searchsorted(self._users, users[some])
        there = place < len(self._users)
        there[there] = self._users[place[there]] == users[some][there]
        if not there.all() or (known[some] > self._counts[place]).any():
            raise RuntimeError("a request knows more behaviors than its user has")
        begin = np.zeros(len(users), np.int64)
        begin[some] = self._starts[place] + known[some] - lengths[some]
        before = np.cumsum(lengths) - lengths
        index = np.repeat(begin - before, lengths) + np.arange(lengths.sum())
        return Lists(lengths, {name: pa.array(values.take(index)) for name, values in self._columns.items()})
