"""Where the training part ends, by time alone."""

from dataclasses import dataclass

import numpy as np

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import SPLITS
from mim_torchrec.prepare.config import DAY, PrepareConfig, as_text


@dataclass(frozen=True)
class Split:
    """Times at which validation and test begin, microseconds since 1970."""

    validation: int
    test: int

    def of(self, ts: np.ndarray) -> np.ndarray:
        """The part of each time (n,): 0 train, 1 validation, 2 test."""
        return np.searchsorted(np.array([self.validation, self.test]), ts, side="right")


def choose_split(ts: np.ndarray, config: PrepareConfig) -> Split:
    """Cut at the given times, or at the times of the requests at 80 and 90 percent.

    Requests of one moment stay together. All users have the same cuts: nothing that is trained on is later
    than what is predicted.

    Args:
        ts: (n,) times of the requests, ascending.
        config: options.

    Raises:
        DataError: a part has no request.
    """
    if not len(ts):
        raise DataError(
            "no request is left; prepare.json is not written, so see the counts above: --label-window and "
            "--log-end decide which requests are too young"
        )
    if config.validation_from is not None:
        split = Split(config.time("validation_from"), config.time("test_from"))
    else:
        split = Split(int(ts[len(ts) * 8 // 10]), int(ts[len(ts) * 9 // 10]))
    counts = np.bincount(split.of(ts), minlength=3)
    for name, count in zip(SPLITS, counts, strict=True):
        if not count:
            raise DataError(
                f"no request is in the {name} part: requests are from {as_text(int(ts[0]))} to "
                f"{as_text(int(ts[-1]))}, validation begins at {as_text(split.validation)}, test at "
                f"{as_text(split.test)}; choose --validation-from and --test-from"
            )
    return split


def days(ts: np.ndarray) -> np.ndarray:
    """(n,) days since 1970, UTC."""
    return ts // DAY


def day_name(day: int) -> str:
    """Name of a day.

    >>> day_name(20758)
    '2026-11-01'
    """
    return str(np.datetime64(day, "D"))
