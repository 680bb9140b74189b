"""Where the pairs of a batch lie, by candidate and by behavior, from the lengths of its requests.

Listing pairs takes sizes that depend on the lengths. A GPU that has only the lengths would have the host wait
for every size. So whoever sends a batch to a GPU makes its layout first, in memory, and sends that as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLayout:
    """Of all pairs of candidates with the behaviors of their requests.

    Attributes:
        candidate_lengths: (num_requests,) int64 in memory, candidates of each request.
        behavior_lengths: (num_requests,) int64 in memory, behaviors likewise.
        candidate_offsets: (num_requests + 1,) where the candidates of each request start.
        behavior_offsets: (num_requests + 1,) where the behaviors of each request start.
        candidate_request: (sum_candidates,) the request of each candidate.
        behavior_request: (sum_behaviors,) the request of each behavior.
        place: (sum_behaviors,) the place of each behavior in its request.
        order: (sum_behaviors,) how many behaviors of its request come after each.
        of_candidate: (sum_candidates,) pairs of each candidate.
        pair_offsets: (sum_candidates + 1,) where they start.
        to_behavior: (sum_candidates,) what makes the number of such a pair that of its behavior.
        of_behavior: (sum_behaviors,) pairs of each behavior.
        by_behavior_offsets: (sum_behaviors + 1,) where they start in the order by behavior.
        to_candidate: (sum_behaviors,) what makes the number of such a pair that of its candidate.
    """

    candidate_lengths: Tensor
    behavior_lengths: Tensor
    candidate_offsets: Tensor
    behavior_offsets: Tensor
    candidate_request: Tensor
    behavior_request: Tensor
    place: Tensor
    order: Tensor
    of_candidate: Tensor
    pair_offsets: Tensor
    to_behavior: Tensor
    of_behavior: Tensor
    by_behavior_offsets: Tensor
    to_candidate: Tensor

    @classmethod
    def of(
        cls,
        candidate_offsets: Tensor,
        behavior_offsets: Tensor,
        lengths: tuple[Tensor, Tensor] | None = None,
    ) -> "PairLayout":
        """The layout of requests given by their offsets, (num_requests + 1,) each.

        Args:
            candidate_offsets: of the packed candidates.
            behavior_offsets: of the packed behaviors.
            lengths: of both in memory, where the offsets are on a GPU; the host waits for those that it is
                not given.

        Raises:
            ValueError: the offsets are of different numbers of requests.
        """
        if candidate_offsets.shape != behavior_offsets.shape:
            raise ValueError(
                f"candidates belong to {candidate_offsets.numel() - 1} requests "
                f"but behaviors to {behavior_offsets.numel() - 1}"
            )
        candidate_offsets, behavior_offsets = candidate_offsets.long(), behavior_offsets.long()
        candidates, behaviors = candidate_offsets.diff(), behavior_offsets.diff()
        if lengths is None:
            lengths = candidates.cpu(), behaviors.cpu()
        num_candidates = num_behaviors = None
        if candidate_offsets.is_cuda:
            num_candidates, num_behaviors = (int(each.sum()) for each in lengths)
        of_request = torch.repeat_interleave(candidates, output_size=num_candidates)
        by_request = torch.repeat_interleave(behaviors, output_size=num_behaviors)
        first_behavior = behavior_offsets.index_select(0, by_request)
        of_candidate = behaviors.index_select(0, of_request)
        of_behavior = candidates.index_select(0, by_request)
        pair_offsets, by_behavior_offsets = (
            F.pad(each.cumsum(0), (1, 0)) for each in (of_candidate, of_behavior)
        )
        numbers = torch.arange(by_request.numel(), device=by_request.device)
        return cls(
            candidate_lengths=lengths[0],
            behavior_lengths=lengths[1],
            candidate_offsets=candidate_offsets,
            behavior_offsets=behavior_offsets,
            candidate_request=of_request,
            behavior_request=by_request,
            place=numbers - first_behavior,
            order=behavior_offsets[1:].index_select(0, by_request) - 1 - numbers,
            of_candidate=of_candidate,
            pair_offsets=pair_offsets,
            to_behavior=behavior_offsets.index_select(0, of_request) - pair_offsets[:-1],
            of_behavior=of_behavior,
            by_behavior_offsets=by_behavior_offsets,
            to_candidate=candidate_offsets.index_select(0, by_request) - by_behavior_offsets[:-1],
        )

    @classmethod
    def of_lengths(cls, candidates: Tensor, behaviors: Tensor) -> "PairLayout":
        """The layout of requests given by their lengths, (num_requests,) each, in memory."""
        lengths = candidates.long(), behaviors.long()
        candidate_offsets, behavior_offsets = (F.pad(each.cumsum(0), (1, 0)) for each in lengths)
        return cls.of(candidate_offsets, behavior_offsets, lengths)

    @property
    def num_pairs(self) -> int:
        """Pairs of the batch."""
        return int((self.candidate_lengths * self.behavior_lengths).sum())

    @property
    def longest(self) -> int:
        """The most behaviors that a candidate is compared with."""
        behaviors = self.behavior_lengths[self.candidate_lengths > 0]
        return int(behaviors.max()) if behaviors.numel() else 0

    def tensors(self) -> list[Tensor]:
        """All but the lengths, which stay in memory."""
        return [getattr(self, name) for name in self._names()]

    def moved(self, tensors: Sequence[Tensor]) -> "PairLayout":
        """The same layout, whose `tensors` are elsewhere."""
        return PairLayout(
            candidate_lengths=self.candidate_lengths,
            behavior_lengths=self.behavior_lengths,
            **dict(zip(self._names(), tensors, strict=True)),
        )

    def _names(self) -> list[str]:
        return [one.name for one in fields(self)][2:]
