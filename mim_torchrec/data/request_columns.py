"""Requests as arrays: what `columns` decodes, and how rows of it are taken.

Nothing here loops over rows: a list column is its flat values and the lengths of its rows.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mim_torchrec.data.id_buckets import AT_ONCE


@dataclass(frozen=True)
class Coded:
    """Ids that repeat often, or rows: `codes` (n,) int32 are places in `ids` (m,), which repeat, too."""

    codes: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: slice | np.ndarray) -> "Coded":
        return Coded(self.codes[index], self.ids)

    @property
    def values(self) -> np.ndarray:
        """(n,) ids. NumPy makes int64 of the codes, of few at a time, so that these stay in the cache."""
        found = np.empty(len(self.codes), self.ids.dtype)
        for start in range(0, len(found), AT_ONCE):
            own = slice(start, start + AT_ONCE)
            found[own] = self.ids.take(self.codes[own])
        return found


@dataclass(frozen=True)
class Jagged:
    """Parallel lists: `lengths` (num_requests,), and by name, flat values or coded ids (sum(lengths),)."""

    lengths: np.ndarray
    values: dict[str, np.ndarray]
    coded: dict[str, Coded] = field(default_factory=dict)

    @cached_property
    def stops(self) -> np.ndarray:
        """(num_requests,) where each list ends."""
        return np.cumsum(self.lengths)

    def starts_of(self, rows: np.ndarray) -> np.ndarray:
        """(n,) where the lists of rows (n,) begin; of the row after the last, where all end."""
        found: np.ndarray = np.concatenate([[0], self.stops]).take(rows)
        return found

    def between(self, start: int, stop: int) -> "Jagged":
        """The lists of rows that follow one another, in the same memory."""
        own = slice(*self.starts_of(np.array([start, stop])).tolist())
        values = {name: values[own] for name, values in self.values.items()}
        coded = {name: codes[own] for name, codes in self.coded.items()}
        return Jagged(self.lengths[start:stop], values, coded)

    def take(self, rows: np.ndarray, last: int | None = None) -> "Jagged":
        """The lists of some rows, of each only the `last` values where given."""
        lengths, stops = self.lengths.take(rows), self.stops.take(rows)
        if last is not None:
            lengths = np.minimum(lengths, last)
        longest, total = int(lengths.max(initial=0)), int(lengths.sum())
        if total and 2 * total >= longest * len(rows) and stops.min() >= longest:
            # most often lists are about as long: windows that end where they end are copied faster
            starts, kept = stops - longest, None
            if total < longest * len(rows):
                kept = np.arange(longest) >= (longest - lengths)[:, None]

            def taken(values: np.ndarray) -> np.ndarray:
                found = _windows_from(starts, values, longest)
                return found.reshape(-1) if kept is None else found[kept]

        else:
            own_stops = np.cumsum(lengths)
            index = np.repeat(stops - own_stops, lengths)
            index += np.arange(len(index))

            def taken(values: np.ndarray) -> np.ndarray:
                return values.take(index)

        values = {name: taken(own) for name, own in self.values.items()}
        coded = {name: Coded(taken(own.codes), own.ids) for name, own in self.coded.items()}
        return Jagged(lengths, values, coded)

    def view(self) -> "Jagged":
        """The same arrays, which can be taken out of it and stay in the other."""
        return Jagged(self.lengths, dict(self.values), dict(self.coded))


@dataclass(frozen=True)
class RequestColumns:
    """Some requests: scalars by name (num_requests,), behaviors, candidates, and further lists of ids."""

    scalars: dict[str, np.ndarray]
    behavior: Jagged
    candidate: Jagged
    ids: dict[str, Jagged] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scalars["request_id"])

    def between(self, start: int, stop: int) -> "RequestColumns":
        """Rows that follow one another, in the same memory."""
        scalars = {name: values[start:stop] for name, values in self.scalars.items()}
        ids = {name: jagged.between(start, stop) for name, jagged in self.ids.items()}
        behavior, candidate = self.behavior.between(start, stop), self.candidate.between(start, stop)
        return RequestColumns(scalars, behavior, candidate, ids)

    def take(self, rows: np.ndarray, max_behaviors: int | None = None) -> "RequestColumns":
        """Some rows in the order given, each with its last `max_behaviors` behaviors."""
        scalars = {name: values.take(rows) for name, values in self.scalars.items()}
        ids = {name: jagged.take(rows) for name, jagged in self.ids.items()}
        return RequestColumns(
            scalars, self.behavior.take(rows, max_behaviors), self.candidate.take(rows), ids
        )


def _windows_from(starts: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """(m, length) those values (n,) that follow each of the places starts (m,)."""
    count = len(values) - length + 1
    if values.dtype == object:
        windows = as_strided(values, (count, length), values.strides * 2, writeable=False)
        found: np.ndarray = windows[starts]
        return found
    # one element is a whole window, so NumPy copies its bytes at once, not value by value
    window = np.dtype((np.void, length * values.itemsize))
    return np.ndarray(count, window, values, 0, values.strides)[starts].view(values.dtype).reshape(-1, length)
