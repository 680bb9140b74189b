"""Requests that are added one after another to memory that is kept: the buffer of the reader.

Memory that a process gets from the system is cleared page by page, which takes longer than to copy into it.
So a pass fills the same arrays again and again, and what is decoded is small enough for Arrow to use its own
memory again.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mim_torchrec.data.request_columns import Coded, Jagged, RequestColumns

SLACK = 1.05
"""Memory is for this many times the values that are expected; what is not used is never taken."""


class RequestBuffer:
    """Requests with the same columns, in the order in which they are added.

    Args:
        convert: of what is added, before it is copied; None adds it as it is.

    >>> lists = Jagged(np.array([2]), {"item_id": np.array([5, 6])})
    >>> one = RequestColumns({"request_id": np.array([1])}, lists, lists)
    >>> buffer = RequestBuffer()
    >>> for _ in range(2):
    ...     buffer.clear(expected=2)
    ...     buffer.add(one)
    ...     buffer.add(one)
    >>> buffer.requests().behavior.values["item_id"].tolist()
    [5, 6, 5, 6]
    """

    def __init__(self, convert: Callable[[RequestColumns], RequestColumns] | None = None) -> None:
        self._convert = convert
        self._scalars: dict[str, _Array] = {}
        self._lists: dict[str, _Lists] = {}
        self._ids: tuple[str, ...] = ()
        self._expected = self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def clear(self, expected: int) -> None:
        """Begin from the start, in the memory that there is: what `requests` has returned is overwritten.

        Args:
            expected: requests that will be added.
        """
        self._expected, self._rows = expected, 0
        for scalars in self._scalars.values():
            scalars.clear()
        for lists in self._lists.values():
            lists.clear()

    def add(self, requests: RequestColumns) -> None:
        """Copy requests to the end."""
        requests = requests if self._convert is None else self._convert(requests)
        self._rows += len(requests)
        room = SLACK * max(self._expected / max(self._rows, 1), 1.0)
        for name, values in requests.scalars.items():
            self._scalars.setdefault(name, _Array()).add(values, room)
        self._ids = tuple(requests.ids)
        jagged = {"": requests.behavior, " ": requests.candidate} | requests.ids
        for name, lists in jagged.items():
            self._lists.setdefault(name, _Lists()).add(lists, room)

    def requests(self) -> RequestColumns:
        """All of them, in the memory of the buffer."""
        return RequestColumns(
            {name: own.values for name, own in self._scalars.items()},
            self._lists[""].lists(),
            self._lists[" "].lists(),
            {name: self._lists[name].lists() for name in self._ids},
        )


def concatenate(parts: Sequence[RequestColumns]) -> RequestColumns:
    """Join requests that have the same columns."""
    if len(parts) == 1:
        return parts[0]
    buffer = RequestBuffer()
    buffer.clear(sum(map(len, parts)))
    for part in parts:
        buffer.add(part)
    return buffer.requests()


class _Array:
    """Values one after another; there is memory for more."""

    def __init__(self) -> None:
        self._memory: np.ndarray = np.empty(0, np.int64)
        self._size = 0

    @property
    def values(self) -> np.ndarray:
        return self._memory[: self._size]

    def clear(self) -> None:
        self._size = 0

    def add(self, values: np.ndarray, room: float, shift: int = 0) -> None:
        """Copy values, plus a shift, to the end; where memory is short, get `room` times as much."""
        start, stop = self._size, self._size + len(values)
        kind = np.result_type(self._memory, values) if start else values.dtype
        if stop > len(self._memory) or kind != self._memory.dtype:
            grown = np.empty(int(stop * room), kind)
            grown[:start] = self.values
            self._memory = grown
        self._size = stop
        if shift:
            np.add(values, shift, out=self._memory[start:stop])
        else:
            self._memory[start:stop] = values


class _Lists:
    """Parallel lists; a column is of codes until values that have none are added."""

    def __init__(self) -> None:
        self._lengths = _Array()
        self._values: dict[str, _Array] = {}
        self._codes: dict[str, _Array] = {}
        self._coded_ids: dict[str, list[np.ndarray]] = {}
        self._plain: set[str] = set()

    def clear(self) -> None:
        for own in (self._lengths, *self._values.values(), *self._codes.values()):
            own.clear()
        self._coded_ids, self._plain = {}, set()

    def add(self, lists: Jagged, room: float) -> None:
        for name, coded in lists.coded.items():
            if name in self._plain:
                self._values[name].add(coded.values, room)
            else:
                ids = self._coded_ids.setdefault(name, [])
                self._codes.setdefault(name, _Array()).add(coded.codes, room, sum(map(len, ids)))
                ids.append(coded.ids)
        for name, values in lists.values.items():
            own = self._values.setdefault(name, _Array())
            if name in self._coded_ids:
                own.add(self._decoded(name).values, room)
                del self._coded_ids[name]
            self._plain.add(name)
            own.add(values, room)
        self._lengths.add(lists.lengths, room)

    def lists(self) -> Jagged:
        values = {name: self._values[name].values for name in self._values if name in self._plain}
        return Jagged(self._lengths.values, values, {name: self._decoded(name) for name in self._coded_ids})

    def _decoded(self, name: str) -> Coded:
        return Coded(self._codes[name].values, np.concatenate(self._coded_ids[name]))
