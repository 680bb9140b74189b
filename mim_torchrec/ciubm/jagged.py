"""Pairs of (candidate, behavior) of the same request, kept packed.

A batch holds `num_requests` requests; each has its own number of candidates and of behaviors. Every user
behavior model (MIM, section 3.4) compares a candidate with all behaviors of its own request, so the pairs
form one ragged list in which no position is padding. They are ordered by candidate, then by behavior,
which makes the pairs of a candidate a contiguous segment: the compressed-sparse-row layout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RequestPairs:
    """All (candidate, behavior) pairs of a batch; built once, used by every interest module.

    Attributes:
        candidate_offsets: (num_requests + 1,) where the candidates of each request start.
        behavior_offsets: (num_requests + 1,) where the behaviors of each request start.
        candidate_request: (sum_candidates,) the request of each candidate.
        candidate_index: (num_pairs,) the candidate of each pair, ascending.
        behavior_index: (num_pairs,) the behavior of each pair.
        pair_offsets: (sum_candidates + 1,) where the pairs of each candidate start.
    """

    candidate_offsets: Tensor
    behavior_offsets: Tensor
    candidate_request: Tensor
    candidate_index: Tensor
    behavior_index: Tensor
    pair_offsets: Tensor

    @classmethod
    def build(cls, candidate_offsets: Tensor, behavior_offsets: Tensor) -> "RequestPairs":
        """List the pairs of requests given by their offsets.

        Args:
            candidate_offsets: (num_requests + 1,) integer offsets of the packed candidates.
            behavior_offsets: (num_requests + 1,) integer offsets of the packed behaviors.

        >>> pairs = RequestPairs.build(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 2]))
        >>> pairs.candidate_index.tolist(), pairs.behavior_index.tolist()
        ([0, 0, 1, 1], [0, 1, 0, 1])
        """
        if candidate_offsets.shape != behavior_offsets.shape:
            raise ValueError(
                f"candidates belong to {candidate_offsets.numel() - 1} requests "
                f"but behaviors to {behavior_offsets.numel() - 1}"
            )
        candidate_offsets, behavior_offsets = candidate_offsets.long(), behavior_offsets.long()
        device = candidate_offsets.device
        num_candidates = candidate_offsets.diff()
        num_requests = num_candidates.numel()
        candidate_request = torch.repeat_interleave(
            torch.arange(num_requests, device=device), num_candidates
        )
        num_pairs = behavior_offsets.diff()[candidate_request]
        pair_offsets = F.pad(num_pairs.cumsum(0), (1, 0))
        candidate_index = torch.repeat_interleave(
            torch.arange(candidate_request.numel(), device=device), num_pairs
        )
        shift = behavior_offsets[:-1][candidate_request] - pair_offsets[:-1]
        behavior_index = torch.arange(candidate_index.numel(), device=device) + shift[candidate_index]
        return cls(
            candidate_offsets=candidate_offsets,
            behavior_offsets=behavior_offsets,
            candidate_request=candidate_request,
            candidate_index=candidate_index,
            behavior_index=behavior_index,
            pair_offsets=pair_offsets,
        )

    @property
    def num_candidates(self) -> int:
        """Candidates in the batch, over all requests."""
        return self.candidate_request.numel()

    @property
    def num_pairs(self) -> int:
        """(candidate, behavior) pairs in the batch."""
        return self.candidate_index.numel()

    def history_lengths(self) -> Tensor:
        """Behaviors each candidate is compared with, (sum_candidates,) int64."""
        return self.pair_offsets.diff()

    def segment_softmax(self, scores: Tensor) -> Tensor:
        """Softmax of pair scores (num_pairs,) over the behaviors of each candidate."""
        largest = scores.new_full((self.num_candidates,), -torch.inf).scatter_reduce(
            0, self.candidate_index, scores.detach(), "amax"
        )
        weights = (scores - largest[self.candidate_index]).exp()
        total = weights.new_zeros(self.num_candidates).index_add(0, self.candidate_index, weights)
        return weights / total[self.candidate_index]

    def weighted_sum(self, behaviors: Tensor, weights: Tensor) -> Tensor:
        r"""Sum over the behaviors of each candidate, $\sum_i w_{t,i} h_i$.

        An embedding bag is this product with a sparse matrix without ever writing the (num_pairs, dim)
        rows it adds up; measured on CPU at 27,000 pairs, its forward and backward take a seventh of the
        time of `index_add` at dim 128, and an eighth to a sixth of a CSR matrix product.

        Args:
            behaviors: (sum_behaviors, dim).
            weights: (num_pairs,), the weight of each pair.

        Returns:
            (sum_candidates, dim); zeros for a candidate whose request has no behaviors.
        """
        if behaviors.shape[0] == 0:
            # no pair exists; stay in the graph so that every rank computes the same set of gradients
            zeros = behaviors.new_zeros(self.num_candidates, behaviors.shape[1])
            return zeros + behaviors.sum() + weights.sum()
        return F.embedding_bag(
            self.behavior_index,
            behaviors,
            self.pair_offsets,
            mode="sum",
            per_sample_weights=weights.to(behaviors.dtype),
            include_last_offset=True,
        )
