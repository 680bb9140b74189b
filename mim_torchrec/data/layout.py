"""Where the files of a data set are: folders of splits, partitions by day, nested folders.

    requests/train/*.parquet                          folders of splits
    requests/split=train/dt=2026-11-01/*.parquet      partitions in the names of folders, as Hive has them
    requests/dt=2026-11-01/*.parquet                  days only: the splits are ranges of days

Folders may be nested to any depth. Files and folders whose names begin with `.` or `_` are no data. The
values of partitions choose files; they are no columns.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.listing import data_files
from mim_torchrec.errors import OptionError

SPLITS = ("train", "validation", "test")
DAY_KEYS = ("dt", "date", "day")
_DAY = re.compile(rf"({'|'.join(DAY_KEYS)})=(.*)")


@dataclass(frozen=True)
class Days:
    """A range of days, both ends included.

    >>> days = Days.parse("2026-11-01..2026-11-20")
    >>> date(2026, 11, 20) in days, date(2026, 11, 21) in days
    (True, False)
    """

    first: date
    last: date

    @classmethod
    def parse(cls, text: str, flag: str = "days") -> "Days":
        """Read `2026-11-01..2026-11-20`, or one day.

        Raises:
            OptionError: it is no range of days.
        """
        first, dots, last = text.partition("..")
        try:
            days = cls(date.fromisoformat(first), date.fromisoformat(last if dots else first))
        except ValueError:
            raise OptionError(
                f"{flag} is {text!r}; expected a day or a range, as 2026-11-01..2026-11-20"
            ) from None
        if days.last < days.first:
            raise OptionError(f"{flag} is {text!r}, which ends before it begins")
        return days

    def __contains__(self, day: date) -> bool:
        return self.first <= day <= self.last

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


class Dataset:
    """Where the files of a data set are, and what they have in common.

    Args:
        root: its directory.
        days: ranges of days by split, as "2026-11-01..2026-11-20", of which the requests are read; None or a
            split that is not there reads all.

    Attributes:
        conventions: for `open_parquet`; its unit of times is `time_unit` of dataset.json.

    Raises:
        DataError: there is no such directory, or its dataset.json cannot be read.
        OptionError: a range of days is none.
    """

    def __init__(self, root: str | Path, days: Mapping[str, str | None] | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError("no such directory; check the path", file=self.root)
        self._days = {
            split: Days.parse(text, f"--{split}-days") for split, text in (days or {}).items() if text
        }
        self.conventions = Conventions(self._time_unit())

    def items(self) -> list[Path]:
        """Files of the item table, sorted. Raises DataError if there are none."""
        return _files(self.root / "items")

    def pairs(self) -> list[Path]:
        """Files of the C-SFT pairs, sorted. Raises DataError if there are none."""
        return _files(self.root / "pairs")

    def requests(self, split: str) -> list[Path]:
        """Files of the requests of "train", "validation" or "test", sorted.

        Raises:
            DataError: there are none, none of the days asked for, or days are shared by two splits.
        """
        if split not in SPLITS:
            raise OptionError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        whole = self.root / "requests"
        folders = [folder for folder in (whole / split, whole / f"split={split}") if folder.is_dir()]
        if len(folders) > 1:
            raise DataError(f"is there beside {folders[1]}; remove one of the two", file=folders[0])
        days = self._days.get(split)
        if folders or not any(_DAY.fullmatch(part.name) for part in whole.glob("*")):
            files = _files(folders[0] if folders else whole / split)
            return files if days is None else _of_days(files, days, folders[0])
        if days is None:
            problem = f"is divided by days, not into splits: say which are those of {split}"
            raise DataError(f"{problem}, as --{split}-days 2026-11-01..2026-11-20", file=whole)
        for other, others in self._days.items():
            if other != split and others.first <= days.last and days.first <= others.last:
                raise OptionError(
                    f"--{split}-days {days} and --{other}-days {others} share days; a request is in one split"
                )
        return _of_days(_files(whole), days, whole)

    def _time_unit(self) -> str | None:
        file = self.root / "dataset.json"
        if not file.is_file():
            return None
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            unit = facts.get("time_unit")
        except (ValueError, AttributeError) as error:
            raise DataError(f"is no JSON object ({error}); write it again, or remove it", file=file) from None
        return unit


def _files(folder: Path) -> list[Path]:
    files = data_files(folder)
    if not files:
        raise DataError("no *.parquet file there; check the path of the data set", file=folder)
    return files


def _of_days(files: list[Path], days: Days, folder: Path) -> list[Path]:
    by_day = [(_day(file, folder), file) for file in files]
    found = [file for day, file in by_day if day in days]
    if not found:
        there = sorted(day for day, _ in by_day)
        raise DataError(f"no file of the days {days}; there are {there[0]} to {there[-1]}", file=folder)
    return found


def _day(file: Path, folder: Path) -> date:
    """The day of the partition that a file is in."""
    for part in file.relative_to(folder).parts[:-1]:
        if (found := _DAY.fullmatch(part)) is not None:
            try:
                return date.fromisoformat(found[2])
            except ValueError:
                raise DataError(f"{part}: expected a day such as dt=2026-11-01", file=file) from None
    raise DataError("is in no folder of a day (dt=2026-11-01); move it into one", file=file)
