"""Progress of RIM: the name of a window holds the positions that it reaches in the source.

Publishing a window and recording that its items were read are therefore one step. An item goes into exactly
one window, whichever process is killed.
"""

import json
from collections.abc import Iterable

from mim_torchrec.rim.sources import Arrival, Positions

PREFIX = "rim:"


def window_name(arrivals: Iterable[Arrival]) -> str:
    """Name of a window of arrivals, in the order they came.

    >>> one = Arrival(unit="a.parquet", position="3", place="")
    >>> window_name([one]), positions_of([window_name([one]), "another tool's"])
    ('rim:{"a.parquet": "3"}', {'a.parquet': '3'})
    """
    reached = {arrival.unit: arrival.position for arrival in arrivals}
    return PREFIX + json.dumps(reached, sort_keys=True)


def positions_of(names: Iterable[str]) -> Positions:
    """The positions that windows reach, the furthest of each unit."""
    found: Positions = {}
    for name in names:
        if name.startswith(PREFIX):
            for unit, position in json.loads(name[len(PREFIX) :]).items():
                if unit not in found or order(position) > order(found[unit]):
                    found[unit] = position
    return found


def order(position: str) -> tuple[int, ...]:
    """What positions of a unit are compared by.

    >>> order("12-3") > order("9-40")
    True
    """
    return tuple(int(part) for part in position.split("-"))
