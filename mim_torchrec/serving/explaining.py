"""Why candidates got their scores: exact leave-one-out of every interest and every behavior.

Nothing is estimated. A behavior is taken out of the history, and the request is scored once more; an interest
is replaced by that of an empty history, which is zeros. The relevance α (Eq. 7) is the cosine itself. Left
out: the second label, and what behaviors contribute together.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import Interests
from mim_torchrec.serving.messages import Explanation, ScoreRequest
from mim_torchrec.serving.scorer import Scorer

PAIRS_AT_ONCE = 100_000
"""Pairs of candidate and behavior that are scored together."""


class WithoutInterest(nn.Module):
    """CiUBM in which one interest is zero, as it is with an empty history.

    Args:
        ciubm: or what takes and gives what it does.
        name: of the interest, a field of `Interests`.
    """

    def __init__(self, ciubm: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = ciubm, name

    def forward(self, *args: Any) -> Interests:
        """See `CiUBM.forward`."""
        found: Interests = self.inner(*args)
        nothing: dict[str, Any] = {self.name: torch.zeros_like(getattr(found, self.name))}
        return replace(found, **nothing)


def explain(scorer: Scorer, request: ScoreRequest) -> Explanation:
    """Explain the scores of a request.

    Args:
        scorer: of the model.
        request: as it is scored.

    Raises:
        BadRequest: see `Scorer.score`.
        StoreFailed: a store gives no rows.
    """
    request = replace(scorer.recent(request), contribution=False, explain=False)
    whole = _logits(scorer, [request])[0]
    interests = {}
    for name in scorer.interests:
        with scorer.calling(partial(WithoutInterest, name=name)):
            interests[name] = whole - _logits(scorer, [request])[0]
    count = request.num_behaviors
    at_once = max(1, PAIRS_AT_ONCE // max(request.num_pairs, 1))
    without: list[Tensor] = []
    for start in range(0, count, at_once):
        some = range(start, min(start + at_once, count))
        without += _logits(scorer, [without_behavior(request, place) for place in some])
    behaviors = (
        torch.stack([whole - one for one in without], dim=1) if without else whole.new_zeros(len(whole), 0)
    )
    relevance = None
    if scorer.mm is not None:
        relevance = scorer.relevance(request)
    return Explanation(logits=whole, interests=interests, behaviors=behaviors, relevance=relevance)


def without_behavior(request: ScoreRequest, place: int) -> ScoreRequest:
    """The request with a history that lacks one behavior."""

    def left(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: _without(value, place) if name.startswith("behavior_") else value
            for name, value in values.items()
        }

    times = request.behavior_ts
    return replace(
        request,
        ids=left(request.ids),
        dense=left(request.dense),
        behavior_ts=None if times is None else _without(times, place),
    )


def _without(values: Tensor, place: int) -> Tensor:
    return torch.cat([values[:place], values[place + 1 :]])


def _logits(scorer: Scorer, requests: list[ScoreRequest]) -> list[Tensor]:
    found = (scores.logits for scores in scorer.score(requests, keep=False))
    return [logits for logits in found if logits is not None]
