"""Times of a zone to UTC as integer arithmetic, which every engine computes alike.

A wall clock repeats an hour in autumn; the first one is meant. In spring it skips one; a time in it counts
from the offset before. Both are the rule of Python's `datetime` (fold = 0).
"""

import datetime
import zoneinfo
from dataclasses import dataclass

import ibis
from ibis.expr.types import BooleanValue, IntegerValue

SECOND = 1_000_000
DAY = 86_400 * SECOND
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class LocalTime:
    """A zone between two wall-clock times.

    Args:
        name: such as "Europe/Berlin".
        first: earliest wall-clock time, microseconds since 1970-01-01 of the wall clock.
        last: latest.

    >>> berlin = LocalTime("Europe/Berlin", 0, 86_400 * 1_000_000)
    >>> berlin.offsets
    [3600000000]
    """

    name: str
    first: int
    last: int

    @property
    def offsets(self) -> list[int]:
        """Microseconds ahead of UTC, from each change to the next; one more than there are changes."""
        return [self._offset(self._start), *(after for _, _, after in self._changes())]

    @property
    def switches(self) -> list[int]:
        """Wall-clock times from which the next offset counts."""
        return [at + max(before, after) for at, before, after in self._changes()]

    @property
    def repeated(self) -> list[tuple[int, int]]:
        """Wall-clock times that occur twice, from and to."""
        return [(at + after, at + before) for at, before, after in self._changes() if after < before]

    def utc(self, local: IntegerValue) -> IntegerValue:
        """UTC of wall-clock times in microseconds."""
        offsets, switches = self.offsets, self.switches
        if not switches:
            return local - offsets[0]
        branches = [(local < at, local - offset) for at, offset in zip(switches, offsets, strict=False)]
        return ibis.cases(*branches, else_=local - offsets[-1])

    def is_repeated(self, local: IntegerValue) -> BooleanValue:
        """Whether a wall-clock time occurs twice."""
        found = ibis.literal(False)
        for first, end in self.repeated:
            found = found | ((local >= first) & (local < end))
        return found

    @property
    def _start(self) -> int:
        return (self.first // DAY - 2) * DAY

    def _changes(self) -> list[tuple[int, int, int]]:
        """Changes of the offset: when (UTC), and the offsets before and after."""
        days = range(self._start, self.last + 3 * DAY, DAY)
        found = []
        for start in days:
            before, after = self._offset(start), self._offset(start + DAY)
            if before != after:
                found.append((self._change_after(start, before), before, after))
        return found

    def _change_after(self, start: int, before: int) -> int:
        """The second from which the offset is another one; there is one within a day."""
        low, high = 0, DAY // SECOND
        while high - low > 1:
            middle = (low + high) // 2
            if self._offset(start + middle * SECOND) == before:
                low = middle
            else:
                high = middle
        return start + high * SECOND

    def _offset(self, utc: int) -> int:
        moment = (EPOCH + datetime.timedelta(microseconds=utc)).astimezone(zoneinfo.ZoneInfo(self.name))
        offset = moment.utcoffset()
        assert offset is not None
        return offset // datetime.timedelta(microseconds=1)
