"""Names of windows that hold how far their source was read, and the rule by which a log trims them.

A name `rim:{"UNIT": "POSITION", …}` says which position of each unit of the source its window reaches.
Windows of a source follow each other. So the furthest positions of all windows say as much as all their
names: what reaches no further in any of its units was added before. A log that forgets windows keeps these
positions in the place of the names, however many windows there were. A name of another form says nothing of
the kind, and is kept.
"""

import json
from collections.abc import Iterable, Mapping

PREFIX = "rim:"

Positions = dict[str, str]


def name_of(reached: Mapping[str, str]) -> str:
    """The name of a window that reaches these positions.

    >>> name_of({"b": "2", "a": "3"})
    'rim:{"a": "3", "b": "2"}'
    """
    return PREFIX + json.dumps(dict(reached), sort_keys=True)


def positions_in(name: str) -> Positions | None:
    """The positions that a name holds; None of a name of another form.

    >>> positions_in('rim:{"a": "3-0"}'), positions_in("w7"), positions_in("rim:7")
    ({'a': '3-0'}, None, None)
    """
    if not name.startswith(PREFIX):
        return None
    try:
        found = json.loads(name[len(PREFIX) :])
        for position in found.values():
            order(position)
    except (ValueError, AttributeError):
        return None
    return found or None


def positions_of(names: Iterable[str]) -> Positions:
    """The positions that windows of these names reach, the furthest of each unit.

    >>> positions_of(['rim:{"a": "3"}', 'rim:{"a": "12"}', "another tool's"])
    {'a': '12'}
    """
    found: Positions = {}
    for name in names:
        advance(found, positions_in(name) or {})
    return found


def advance(reached: Positions, further: Mapping[str, str]) -> None:
    """Move positions to those that lie behind them."""
    for unit, position in further.items():
        if unit not in reached or order(position) > order(reached[unit]):
            reached[unit] = position


def is_covered(name: str, reached: Mapping[str, str]) -> bool:
    """Whether a window of this name reaches no further than these positions.

    >>> is_covered('rim:{"a": "3"}', {"a": "10"}), is_covered('rim:{"a": "3", "b": "1"}', {"a": "10"})
    (True, False)
    """
    own = positions_in(name)
    return own is not None and all(
        unit in reached and order(position) <= order(reached[unit]) for unit, position in own.items()
    )


def order(position: str) -> tuple[int, ...]:
    """What positions of a unit are compared by.

    >>> order("12-3") > order("9-40")
    True
    """
    return tuple(int(part) for part in position.split("-"))
