"""What a scorer is asked, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


class BadRequest(ValueError):
    """A request that the model cannot score, and why."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """One user, what they did, and what is to be scored.

    Args:
        ids: by feature, of the request or of its behaviors or candidates, int64.
        dense: by feature, float32.
        request_ts: microseconds since 1970.
        behavior_ts: (num_behaviors,) likewise.
        contribution: whether to say what content interest contributed.
        explain: whether to say what every interest and every behavior contributed.
        vectors: of candidates that no store has yet, (dim,) float32 by their place among the candidates.
    """

    ids: dict[str, Tensor]
    dense: dict[str, Tensor] = field(default_factory=dict)
    request_ts: int | None = None
    behavior_ts: Tensor | None = None
    contribution: bool = False
    explain: bool = False
    vectors: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        return self.ids["candidate_item_id"].numel()

    @property
    def num_behaviors(self) -> int:
        return self.ids["behavior_item_id"].numel()

    @property
    def num_pairs(self) -> int:
        """Pairs of candidate and behavior that are scored, also those of an explanation."""
        pairs = self.num_candidates * self.num_behaviors
        return pairs * (self.num_behaviors + 1) if self.explain else pairs


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the logit of each candidate loses where one thing is left out; such differences add up to nothing.

    Attributes:
        logits: (num_candidates,) of a click.
        interests: by name, (num_candidates,) what is lost where the interest is that of an empty history.
        behaviors: (num_candidates, num_behaviors) what is lost where the behavior is not in the history. Only
            the behaviors that the model uses, the last ones.
        relevance: (num_candidates, num_behaviors) cosine of the vectors, 0 where one is missing (α of Eq. 7);
            None where the model has no content interest.
    """

    logits: Tensor
    interests: dict[str, Tensor]
    behaviors: Tensor
    relevance: Tensor | None


@dataclass(frozen=True)
class Scores:
    """What the model says of a request.

    Attributes:
        scores: (num_candidates,) probabilities of a click.
        contribution: (num_candidates,) what the score loses without the multi-modal vector of the candidate,
            None if it was not asked for.
        unknown: by kind of id, how many of the request the stores do not know.
        was_kept: whether the matrix of the history was in the cache; None where no cache was asked.
        second: (num_candidates,) probabilities of the second label, over all impressions and given a click;
            None where the model has none.
        logits: (num_candidates,) of a click.
        explanation: None if it was not asked for.
    """

    scores: Tensor
    contribution: Tensor | None
    unknown: dict[str, int]
    was_kept: bool | None = None
    second: tuple[Tensor, Tensor] | None = None
    logits: Tensor | None = None
    explanation: Explanation | None = None
