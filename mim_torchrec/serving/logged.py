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
    def clicked(self) -> list[bool]:
        """Of each candidate, whether it was clicked."""
        return [bool(label) for label in self.columns.candidate.values["label"]]

    def asked(self, scorer: Scorer, **more: bool) -> ScoreRequest:
        """The request as a model takes it.

        Args:
            scorer: of the model, whose features the columns were read with.
            more: `contribution` and `explain`.
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
        times = self.columns.behavior.values.get("ts")
        return ScoreRequest(
            ids={name: torch.from_numpy(values.astype(np.int64)) for name, values in ids.items()},
            dense={name: torch.from_numpy(values.astype(np.float32)) for name, values in dense.items()},
            request_ts=int(scalars["ts"][0]) if "ts" in scalars else None,
            behavior_ts=None if times is None else torch.from_numpy(times.astype(np.int64)),
            **more,
        )


def read_log(dataset: Dataset, split: str, features: Features) -> Iterator[LoggedRequest]:
    """All requests of a split in the order of its files, which are read as far as one goes.

    Raises:
        DataError: a file is malformed, or lacks a column that the features name.
    """
    files = RequestFiles(dataset.requests(split), ALL_BEHAVIORS, "fail", features,
                         conventions=dataset.conventions, originals=True)  # fmt: skip
    buffer = RequestBuffer()
    total = sum(unit.rows for unit in files.units)
    for start in range(0, total, BLOCK_ROWS):
        columns, places = files.read(np.arange(start, min(start + BLOCK_ROWS, total)), buffer)
        for place in places:
            yield LoggedRequest(columns.take(np.array([place])))


def find_request(dataset: Dataset, split: str, features: Features, request_id: str | None) -> LoggedRequest:
    """A request by its id; None is the first one with behaviors.

    Raises:
        DataError: there is none; or as `read_log`.
    """
    for found in read_log(dataset, split, features):
        if found.known_as("request_id") == request_id or (request_id is None and len(found.behaviors)):
            return found
    what = "no request with behaviors" if request_id is None else f"no request {request_id!r}"
    raise DataError(f"{what}; see its column request_id", file=dataset.root / "requests" / split)


def _values(jagged: Jagged, name: str) -> Any:
    return jagged.coded[name].values if name in jagged.coded else jagged.values.get(name)
