"""What was found in a data set: facts, problems that a stage would stop at, and what looks wrong."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mim_torchrec.data.errors import DataError, Problems

T = TypeVar("T")


@dataclass
class Report:
    """Of a whole data set; parts are its folders, such as `requests/train`."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Counts and ranges, by part."""
    errors: list[str] = field(default_factory=list)
    """What stops a stage, a line each: what, where, what to do."""
    warnings: list[str] = field(default_factory=list)
    """What a stage takes, and is often a mistake."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block an error of the data becomes a line, and ends the block."""
        try:
            yield
        except DataError as error:
            self.errors.append(str(error))

    def add(self, part: str, problems: Problems, remedy: str) -> None:
        """Rows of a part that stop a stage."""
        self.errors += [f"{part}: {line}; {remedy}" for line in problems.lines()]

    def warn(self, part: str, problem: str) -> None:
        """Something of a part that looks wrong."""
        self.warnings.append(f"{part}: {problem}")

    def lines(self) -> list[str]:
        """All of it, for people."""
        width = max(map(len, self.facts), default=0)
        facts = [
            f"{part:<{width}}  {', '.join(f'{name} {_shown(value)}' for name, value in facts.items())}"
            for part, facts in self.facts.items()
        ]
        return [
            *facts,
            *(f"error    {line}" for line in self.errors),
            *(f"warning  {line}" for line in self.warnings),
        ]


def sampled(units: Sequence[T], share: float) -> list[T]:
    """A share of them, spread evenly, at least one where there is one.

    >>> sampled(range(10), 0.3)
    [0, 3, 6]
    """
    count = max(round(len(units) * share), min(len(units), 1))
    return [units[k * len(units) // count] for k in range(count)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
