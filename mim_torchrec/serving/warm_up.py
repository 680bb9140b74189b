"""A score before the first request: it shows that a deployment works, and torch makes what it makes once."""

import torch

from mim_torchrec.data.features import Ids
from mim_torchrec.serving.inputs import Whole, inputs_of
from mim_torchrec.serving.messages import ScoreRequest
from mim_torchrec.serving.scorer import Scorer

UNKNOWN = -1


def warm_up(scorer: Scorer) -> None:
    """Score one candidate that nobody knows, for a history of one behavior.

    Raises:
        Exception: the model cannot give scores.
    """
    known = {name: found for name, found in inputs_of(scorer).items() if not isinstance(found.kind, Whole)}
    one = torch.full((1,), UNKNOWN, dtype=torch.int64)
    scorer.score([
        ScoreRequest(
            ids={name: one.clone() for name, found in known.items() if isinstance(found.kind, Ids)},
            dense={name: torch.zeros(1) for name, found in known.items() if not isinstance(found.kind, Ids)},
            request_ts=0,
            behavior_ts=torch.zeros(1, dtype=torch.int64),
            contribution=scorer.mm is not None,
        )
    ])  # fmt: skip
