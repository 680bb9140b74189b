"""The one error of bad input data: it says where the data is and what is wrong with it."""

from dataclasses import dataclass
from pathlib import Path

from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.errors import ExpectedError


@dataclass(frozen=True)
class Location:
    """A place in a data set; `row` counts within the row group, from 0.

    >>> str(Location("items/part-0.parquet", 1, 3, "image"))
    'items/part-0.parquet, row group 1, row 3, column image'
    """

    file: str | Path | Url | None = None
    row_group: int | None = None
    row: int | None = None
    column: str | None = None

    def __str__(self) -> str:
        parts = [
            None if self.file is None else str(self.file),
            None if self.row_group is None else f"row group {self.row_group}",
            None if self.row is None else f"row {self.row}",
            None if self.column is None else f"column {self.column}",
        ]
        return ", ".join(part for part in parts if part is not None)


class DataError(ExpectedError, ValueError):
    """Something is wrong with input data.

    Args:
        problem: what is wrong, and what to do.
        file: the file it is in.
        row_group: of the file, from 0.
        row: of the row group, from 0.
        column: name of the column.

    >>> print(DataError("is null", file="part-0.parquet", row_group=0, row=7, column="ts"))
    part-0.parquet, row group 0, row 7, column ts: is null
    """

    def __init__(
        self,
        problem: str,
        file: str | Path | Url | None = None,
        row_group: int | None = None,
        row: int | None = None,
        column: str | None = None,
    ) -> None:
        self.problem = problem
        self.location = Location(file, row_group, row, column)
        where = str(self.location)
        super().__init__(f"{where}: {problem}" if where else problem)


class Problems:
    """What is wrong with rows, by column and problem: how many have it, and where the first one is.

    >>> problems = Problems()
    >>> problems.add("is null", 2, Location("part-0.parquet", 0, 7, "ts"))
    >>> problems.add("is null", 1, Location("part-0.parquet", 1, 0, "ts"))
    >>> print(*problems.lines())
    3 rows: is null, the first in part-0.parquet, row group 0, row 7, column ts
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str | None, str], tuple[int, Location]] = {}

    def add(self, problem: str, rows: int, first: Location) -> None:
        """Count `rows` rows more that have a problem in the column of `first`."""
        before, where = self.found.get((first.column, problem), (0, first))
        self.found[first.column, problem] = before + rows, where

    def lines(self) -> list[str]:
        """A line for each."""
        return [
            f"{rows} row{'s'[: rows > 1]}: {problem}, {'the first in ' if rows > 1 else ''}{where}"
            for (_, problem), (rows, where) in self.found.items()
        ]
