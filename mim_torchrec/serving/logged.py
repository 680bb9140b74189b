"""Requests of a data set as a server is asked them: read and checked as in training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features, Role
from mim_torchrec.data.request_buffer import RequestBuffer
from mim_torchrec.data.request_columns import Jagged, RequestColumns
from mim_torchrec.data.request_files import BLOCK_ROWS, RequestFiles
from mim_torchrec.data.schema import ORIGINAL, Dataset
from mim_torchrec.serving.messages import ScoreRequest
from mim_torchrec.serving.scorer import Scorer

ALL_BEHAVIORS = 1 << 30
OF_ITEMS: tuple[Role, ...] = ("candidate", "behavior")


@dataclass(frozen=True)
class LoggedRequest:
    """One request of a data set.

    Args:
        columns: of this request alone.
    """

    columns: RequestColumns

    def known_as(self, name: str) -> str:
        """`request_id` or `user_id` as people know it."""
        scalars = self.columns.scalars
        return str(scalars.get(f"{name}{ORIGINAL}", scalars[name])[0])

    @property
    def candidates(self) -> np.ndarray:
        """(num_candidates,) int64 item ids."""
        return self.columns.candidate.values["item_id"]

    @property
    def behaviors(self) -> np.ndarray:
        """(num_behaviors,) int64 item ids, the oldest first."""
        return self.columns.behavior.values["item_id"]

    @property
    def request_ts(self) -> int | None:
        """When the request was made, microseconds since 1970; None where the log has no times."""
        scalars = self.columns.scalars
        return int(scalars["ts"][0]) if "ts" in scalars else None

    @property
    def behavior_ts(self) -> np.ndarray | None:
        """(num_behaviors,) int64 microseconds since 1970; None where the log has no times."""
        return self.columns.behavior.values.get("ts")

    @property
    def clicked(self) -> list[bool]:
        """Of each candidate, whether it was clicked."""
        return [bool(label) for label in self.columns.candidate.values["label"]]

    def asked(self, scorer: Scorer, contribution: bool = False, explain: bool = False) -> ScoreRequest:
        """The request as a model takes it.

        Args:
            scorer: of the model, whose features the columns were read with.
            contribution: see `ScoreRequest`.
            explain: likewise.
        """
        scalars, lists = self.columns.scalars, self.columns.ids
        ids: dict[str, np.ndarray] = {
            name: scalars[name] for name in ("user_id", "query_id") if name in scalars
        }
        ids |= {name: found.values["id"] for name, found in lists.items()}
        dense = {feature.name: scalars[feature.name] for feature in scorer.features.numbers("request")}
        for role in OF_ITEMS:
            jagged = self.columns.candidate if role == "candidate" else self.columns.behavior
            for name in ("item_id", "category"):
                if (values := _values(jagged, name)) is not None:
                    ids[f"{role}_{name}"] = values
            ids |= {f.name: jagged.values[f.name] for f in scorer.features.ids(role)}
            dense |= {f.name: jagged.values[f.name] for f in scorer.features.numbers(role)}
        times = self.behavior_ts
        return ScoreRequest(
            ids={name: torch.from_numpy(values.astype(np.int64)) for name, values in ids.items()},
            dense={name: torch.from_numpy(values.astype(np.float32)) for name, values in dense.items()},
            request_ts=self.request_ts,
            behavior_ts=None if times is None else torch.from_numpy(times.astype(np.int64)),
            contribution=contribution,
            explain=explain,
        )


class Log:
    """All requests of a split, by number in the order of its files.

    Args:
        dataset: the data set.
        split: of its requests.
        features: of the model that is asked.

    Raises:
        DataError: a file is malformed, or lacks a column that the features name.
    """

    def __init__(self, dataset: Dataset, split: str, features: Features) -> None:
        self._files = RequestFiles(dataset.requests(split), ALL_BEHAVIORS, "fail", features,
                                   conventions=dataset.conventions, originals=True)  # fmt: skip
        self._total = sum(unit.rows for unit in self._files.units)

    def __iter__(self) -> Iterator[LoggedRequest]:
        """Read on as far as one goes."""
        buffer = RequestBuffer()
        for start in range(0, self._total, BLOCK_ROWS):
            numbers = np.arange(start, min(start + BLOCK_ROWS, self._total))
            columns, places = self._files.read(numbers, buffer)
            for place in places:
                yield LoggedRequest(columns.take(np.array([place])))

    def __getitem__(self, number: int) -> LoggedRequest:
        columns, places = self._files.read(np.array([number]), RequestBuffer())
        return LoggedRequest(columns.take(places))


def find_request(dataset: Dataset, split: str, features: Features, request_id: str | None) -> LoggedRequest:
    """A request by its id; None is the first one with behaviors.

    Raises:
        DataError: there is none; or as `Log`.
    """
    for found in Log(dataset, split, features):
        if found.known_as("request_id") == request_id or (request_id is None and len(found.behaviors)):
            return found
    what = "no request with behaviors" if request_id is None else f"no request {request_id!r}"
    raise DataError(f"{what}; see its column request_id", file=dataset.root / "requests" / split)


def _values(jagged: Jagged, name: str) -> Any:
    return jagged.coded[name].values if name in jagged.coded else jagged.values.get(name)
