"""What if an item were new: its vector by the encoder, and the request in which it is one more candidate.

The encoder is that of the table, as `mim rim` has it. Nothing is published: the vector goes with the one
request. The item has no ID rows, so the model takes it as any item that it has not seen in training.
"""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.id_types import INTEGERS
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.schema import category_ids
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.stable_ids import stable_ids
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.serving.messages import BadRequest, ScoreRequest
from mim_torchrec.serving.scorer import Scorer

NO_ENCODER = "this server has no encoder: start it with --encoder, the directory that `mim csft` wrote"
NAME = "an item that is not there yet"


class ItemEncoder:
    """Makes vectors of pictures with titles, one at a time.

    Args:
        path: directory or URL of the encoder.
        table_version: of the vectors that the server has; None of Base.

    Raises:
        VersionMismatch: the encoder makes others.
        CheckpointError: there is no encoder.
    """

    def __init__(self, path: Path | Url, table_version: str | None) -> None:
        # a server without an encoder imports none of what encoders need
        from mim_torchrec.representation.export import TrainedEncoder

        self._encoder = TrainedEncoder(str(path), torch.device("cpu"))
        self._one = asyncio.Lock()
        if (problem := self.problem(table_version)) is not None:
            raise VersionMismatch(f"--encoder {path}: {problem}")

    def problem(self, table_version: str | None) -> str | None:
        """Why vectors of this encoder cannot be used with those of a version; None where they can."""
        if table_version is None:
            return "the model is Base, to which a picture and a title mean nothing"
        if table_version != (own := self._encoder.version):
            return f"it makes vectors of {own}, and the server has vectors of {table_version}"
        return None

    async def encode(self, image: bytes, title: str) -> Tensor:
        """The vector (dim,) float32 of a picture and a title.

        Raises:
            BadRequest: one of them is missing or cannot be read.
        """
        if not title.strip():
            raise BadRequest("the title is empty")
        if not image:
            raise BadRequest("there is no picture")
        async with self._one:
            return await asyncio.to_thread(self._encode, image, title)

    def _encode(self, image: bytes, title: str) -> Tensor:
        try:
            picture = decode_image(image, "picture")
        except DataError as error:
            raise BadRequest(error.problem) from None
        with torch.inference_mode():
            vector = self._encoder([picture], [title])[0].float()
        if not bool(vector.isfinite().all()):
            raise BadRequest("the encoder gives no finite vector for it")
        return vector.clone()


def why_not(encoder: ItemEncoder | None, scorer: Scorer) -> str | None:
    """Why a new item cannot be tried with the model that is served; None where it can."""
    if encoder is None:
        return NO_ENCODER
    if (problem := encoder.problem(scorer.bundle.table_version)) is not None:
        return problem
    further = [
        *scorer.lookups.of_candidates,
        *(feature.name for feature in scorer.features.numbers("candidate")),
    ]
    if further:
        return f"the model reads {', '.join(further)} of an item, which a picture and a title do not have"
    return None


def with_new_item(scorer: Scorer, asked: ScoreRequest, vector: Tensor, category: str) -> ScoreRequest:
    """A request with a new item as its last candidate.

    Args:
        scorer: of the model.
        asked: the request.
        vector: (dim,) of the item.
        category: of the item; not read by a model without categories.

    Raises:
        BadRequest: the category cannot be one of the log.
    """
    values: dict[str, Any] = {"candidate_item_id": int(stable_ids(pa.array([NAME]))[0].as_py())}
    if "candidate_category" in asked.ids:
        values["candidate_category"] = _category_id(scorer, category)
    more = {name: torch.cat([asked.ids[name], torch.tensor([value])]) for name, value in values.items()}
    return replace(asked, ids=asked.ids | more, vectors={asked.num_candidates: vector})


def _category_id(scorer: Scorer, category: str) -> int:
    if not category:
        raise BadRequest("the category is empty")
    if scorer.bundle.id_types.get("category") != INTEGERS:
        return int(category_ids(pa.array([category]))[0])
    try:
        return int(category_ids(pa.array([int(category)], pa.int64()))[0])
    except (ValueError, OverflowError, pa.ArrowException):
        raise BadRequest(f"the categories of the log are integers, and {category!r} is none") from None
