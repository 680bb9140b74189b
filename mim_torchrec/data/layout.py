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
from typing import Any

from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.listing import data_files, is_data
from mim_torchrec.embeddings.remote.fetching import refuse_half_written
from mim_torchrec.embeddings.remote.places import Url, place
from mim_torchrec.embeddings.remote.published import find_index
from mim_torchrec.errors import OptionError

SPLITS = ("train", "validation", "test")
DESCRIPTIONS = ("dataset.json", "manifest.json")
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
        root: its directory, or the URL of one.
        days: ranges of days by split, as "2026-11-01..2026-11-20", of which the requests are read; None or a
            split that is not there reads all.

    Attributes:
        conventions: for `open_parquet`; its unit of times is `time_unit` of dataset.json.
        text_ids: vocabularies whose ids are text in the log, although the files have their numbers, by
            `text_ids` of dataset.json.

    Raises:
        DataError: there is no such directory, or its dataset.json cannot be read.
        OptionError: a range of days is none.
    """

    def __init__(self, root: str | Path | Url, days: Mapping[str, str | None] | None = None) -> None:
        self.root = place(root)
        self._published: dict[str, Url] | None = None  # data files at a URL, by path
        if isinstance(self.root, Url):
            self._published = _listed(self.root)
        elif not self.root.is_dir():
            raise DataError("no such directory; check the path", file=self.root)
        self._days = {
            split: Days.parse(text, f"--{split}-days") for split, text in (days or {}).items() if text
        }
        facts = self._facts()
        self.conventions = Conventions(facts.get("time_unit"))
        self.text_ids = frozenset(facts.get("text_ids", ()))

    def items(self) -> list[Path | Url]:
        """Files of the item table, sorted. Raises DataError if there are none."""
        return self._files("items")

    def pairs(self) -> list[Path | Url]:
        """Files of the C-SFT pairs, sorted. Raises DataError if there are none."""
        return self._files("pairs")

    def requests(self, split: str) -> list[Path | Url]:
        """Files of the requests of "train", "validation" or "test", sorted.

        Raises:
            DataError: there are none, none of the days asked for, or days are shared by two splits.
        """
        if split not in SPLITS:
            raise OptionError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        whole = self.root / "requests"
        there = self._folders("requests")
        folders = [name for name in (split, f"split={split}") if name in there]
        if len(folders) > 1:
            raise DataError(
                f"is there beside {whole / folders[1]}; remove one of the two", file=whole / folders[0]
            )
        days = self._days.get(split)
        if folders or not any(_DAY.fullmatch(name) for name in there):
            folder = f"requests/{folders[0] if folders else split}"
            return self._files(folder) if days is None else self._of_days(folder, days)
        if days is None:
            problem = f"is divided by days, not into splits: say which are those of {split}"
            raise DataError(f"{problem}, as --{split}-days 2026-11-01..2026-11-20", file=whole)
        for other, others in self._days.items():
            if other != split and others.first <= days.last and days.first <= others.last:
                raise OptionError(
                    f"--{split}-days {days} and --{other}-days {others} share days; a request is in one split"
                )
        return self._of_days("requests", days)

    def file(self, path: str) -> Path | Url | None:
        """A file by its path in the data set, "manifest.json" or a data file; None where there is none."""
        if self._published is not None:
            return self._published.get(path)
        found = self.root / path
        return found if isinstance(found, Path) and found.is_file() else None

    def path_of(self, file: Path | Url) -> str:
        """The path in the data set of one of its files."""
        if isinstance(file, Path):
            assert isinstance(self.root, Path)
            return file.relative_to(self.root).as_posix()
        assert self._published is not None
        return next(path for path, url in self._published.items() if url == file)

    def _folders(self, folder: str) -> set[str]:
        """Names of folders and files directly in a folder."""
        if self._published is not None:
            inside = (
                path.removeprefix(f"{folder}/") for path in self._published if path.startswith(f"{folder}/")
            )
            return {path.partition("/")[0] for path in inside}
        assert isinstance(self.root, Path)
        return {part.name for part in (self.root / folder).glob("*")}

    def _by_path(self, folder: str) -> dict[str, Path | Url]:
        """Data files in a folder, by their path in it, in order. Raises DataError if there are none."""
        found: dict[str, Path | Url]
        if self._published is not None:
            inside = {p.removeprefix(f"{folder}/"): u for p, u in self._published.items()
                      if p.startswith(f"{folder}/")}  # fmt: skip
            found = {path: inside[path] for path in sorted(inside)}
        else:
            assert isinstance(self.root, Path)
            top = self.root / folder
            found = {file.relative_to(top).as_posix(): file for file in data_files(top)}
        if not found:
            raise DataError(
                "no *.parquet file there; check the path of the data set", file=self.root / folder
            )
        return found

    def _files(self, folder: str) -> list[Path | Url]:
        return list(self._by_path(folder).values())

    def _of_days(self, folder: str, days: Days) -> list[Path | Url]:
        by_day = [(_day(path, file), file) for path, file in self._by_path(folder).items()]
        found = [file for day, file in by_day if day in days]
        if not found:
            there = sorted(day for day, _ in by_day)
            raise DataError(
                f"no file of the days {days}; there are {there[0]} to {there[-1]}", file=self.root / folder
            )
        return found

    def _facts(self) -> dict[str, Any]:
        """What dataset.json says; nothing where there is none."""
        file: Path | Url = self.root / "dataset.json"
        if self._published is not None:
            if "dataset.json" not in self._published:
                return {}
            file = self._published["dataset.json"]
        elif isinstance(file, Path) and not file.is_file():
            return {}
        try:
            facts = json.loads(file.read_bytes().decode())
            if not isinstance(facts, dict):
                raise ValueError(f"found {type(facts).__name__}")
        except ValueError as error:
            raise DataError(f"is no JSON object ({error}); write it again, or remove it", file=file) from None
        return facts


def _listed(root: Url) -> dict[str, Url]:
    """Data files at a URL, by path: as they were published, or as they lie there.

    Raises:
        DataError: there is nothing.
        FetchError: the data set is being written.
    """
    index = find_index(root)
    if index is None:
        refuse_half_written(root)
        found = {path: root / path for path in root.walk()}
    else:
        found = {path: index.url_of(path) for path in index.files}
    if not found:
        raise DataError("no such directory; check the URL", file=root)
    return {path: url for path, url in found.items() if path in DESCRIPTIONS or is_data(path)}


def _day(path: str, file: Path | Url) -> date:
    """The day of the partition that a file is in, by its path in the data set."""
    for part in path.split("/")[:-1]:
        if (found := _DAY.fullmatch(part)) is not None:
            try:
                return date.fromisoformat(found[2])
            except ValueError:
                raise DataError(f"{part}: expected a day such as dt=2026-11-01", file=file) from None
    raise DataError("is in no folder of a day (dt=2026-11-01); move it into one", file=file)
