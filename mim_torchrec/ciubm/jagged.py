"""Pairs of (candidate, behavior) of the same request, kept packed.

A batch holds `num_requests` requests; each has its own number of candidates and of behaviors. Every user
behavior model (MIM, section 3.4) compares a candidate with behaviors of its own request, so the pairs form
one ragged list in which no position is padding. They are ordered by candidate, then by behavior, which makes
the pairs of a candidate a contiguous segment: the compressed-sparse-row layout. What is computed on them is
in `packed.py`; a search unit keeps some of them (`Pairs.top_k`, `Pairs.select`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.packed import ByBehavior, inner_products, segment_softmax, weighted_sum
from mim_torchrec.ciubm.pair_layout import PairLayout


@dataclass(frozen=True)
class Pairs:
    """Some (candidate, behavior) pairs of a batch.

    Attributes:
        candidate_index: (num_pairs,) the candidate of each pair, ascending.
        behavior_index: (num_pairs,) the behavior of each pair, ascending within a candidate.
        pair_offsets: (sum_candidates + 1,) where the pairs of each candidate start.
        by_behavior: the same pairs in the other order.
    """

    candidate_index: Tensor
    behavior_index: Tensor
    pair_offsets: Tensor
    by_behavior: ByBehavior

    @property
    def num_candidates(self) -> int:
        """Candidates in the batch, over all requests."""
        return self.pair_offsets.numel() - 1

    @property
    def num_pairs(self) -> int:
        """Pairs that are listed."""
        return self.candidate_index.numel()

    def history_lengths(self) -> Tensor:
        """Behaviors each candidate is compared with, (sum_candidates,) int64."""
        return self.pair_offsets.diff()

    @cached_property
    def longest(self) -> int:
        """The most behaviors that a candidate is compared with."""
        return int(self.history_lengths().max()) if self.num_pairs else 0

    def inner_products(self, candidates: Tensor, behaviors: Tensor) -> Tensor:
        r"""$\langle q_t, s_i \rangle$ of each pair, (num_pairs,).

        Args:
            candidates: (sum_candidates, dim).
            behaviors: (sum_behaviors, dim).
        """
        return inner_products(candidates, behaviors, self)

    def weighted_sum(self, behaviors: Tensor, weights: Tensor) -> Tensor:
        r"""Sum over the behaviors of each candidate, $\sum_i w_{t,i} h_i$.

        Args:
            behaviors: (sum_behaviors, dim).
            weights: (num_pairs,), the weight of each pair.

        Returns:
            (sum_candidates, dim); zeros for a candidate without pairs.
        """
        return weighted_sum(behaviors, weights, self)

    def segment_softmax(self, scores: Tensor) -> Tensor:
        """Softmax of pair scores (num_pairs,) over the behaviors of each candidate."""
        return segment_softmax(scores, self)

    @torch.no_grad()
    def top_k(self, scores: Tensor, k: int) -> Tensor:
        """Which pairs have the k largest scores of their candidate.

        Of equal scores, as an item that was seen twice has, the later behavior's is kept, so that the choice
        does not depend on what else is in the batch. Candidates with at most k pairs keep all; the others are
        compared in groups whose numbers of pairs lie within a factor of two, so a long history pads no short
        one.

        Args:
            scores: (num_pairs,).
            k: pairs of a candidate that are kept.

        Returns:
            (num_pairs,) bool.
        """
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)  # above the padding
        lengths = self.history_lengths()
        smallest = scores.new_full((self.num_candidates,), -torch.inf)  # of the k largest of each candidate
        width = k
        while width < self.longest:
            rows = ((lengths > width) & (lengths <= 2 * width)).nonzero().squeeze(1)
            width *= 2
            if not rows.numel():
                continue
            columns = torch.arange(min(width, self.longest), device=scores.device)
            exists = columns < lengths.index_select(0, rows)[:, None]
            position = (self.pair_offsets.index_select(0, rows)[:, None] + columns).masked_fill_(~exists, 0)
            padded = scores.index_select(0, position.view(-1)).view(position.shape)
            largest = padded.masked_fill_(~exists, -torch.inf).topk(k, dim=1, sorted=False).values
            smallest.index_copy_(0, rows, largest.amin(1))
        smallest_of_pair = smallest.index_select(0, self.candidate_index)
        kept = ~(scores < smallest_of_pair)  # keeps what is not a number, which is to end the run
        if int(kept.sum()) > self.num_kept(k):
            equal = scores == smallest_of_pair
            count = F.pad(equal.cumsum(0), (1, 0))
            later = count.index_select(0, self.pair_offsets[1:]).index_select(0, self.candidate_index)
            later -= count[1:]
            above = (kept & ~equal).long()
            spare = k - above.new_zeros(self.num_candidates).index_add_(0, self.candidate_index, above)
            kept &= ~equal | (later < spare.index_select(0, self.candidate_index))
        return kept

    def num_kept(self, k: int) -> int:
        """How many pairs `top_k` keeps."""
        return int(self.history_lengths().clamp(max=k).sum())

    def is_short(self, k: int, uses: int) -> bool:
        """Whether a list of the k best pairs of each candidate costs more than it spares.

        To list pairs takes about as long as to score and pool those that are left out. Where this is true,
        they get weights of 0 instead.

        Args:
            k: pairs of a candidate that are kept.
            uses: how often the list would be scored and pooled.
        """
        num_kept = self.num_kept(k)
        return uses * (self.num_pairs - num_kept) <= num_kept

    def select(self, kept: Tensor) -> "Pairs":
        """The pairs that are kept.

        Args:
            kept: (num_pairs,) bool.
        """
        order = self.by_behavior
        kept_by_behavior = kept.index_select(0, order.position)
        before, before_by_behavior = (F.pad(k.cumsum(0), (1, 0)) for k in (kept, kept_by_behavior))
        places, places_by_behavior = (k.nonzero().squeeze(1) for k in (kept, kept_by_behavior))
        position = order.position.index_select(0, places_by_behavior)
        return Pairs(
            candidate_index=self.candidate_index.index_select(0, places),
            behavior_index=self.behavior_index.index_select(0, places),
            pair_offsets=before.index_select(0, self.pair_offsets),
            by_behavior=ByBehavior(
                candidate_index=order.candidate_index.index_select(0, places_by_behavior),
                offsets=before_by_behavior.index_select(0, order.offsets),
                position=before.index_select(0, position),
            ),
        )


@dataclass(frozen=True)
class RequestPairs(Pairs):
    """All pairs of each candidate with the behaviors of its request; built once, used by every module.

    Attributes:
        candidate_offsets: (num_requests + 1,) where the candidates of each request start.
        behavior_offsets: (num_requests + 1,) where the behaviors of each request start.
        candidate_request: (sum_candidates,) the request of each candidate.
        behavior_request: (sum_behaviors,) the request of each behavior.
        layout: where the pairs lie; None where the offsets tell it at no cost.
    """

    candidate_offsets: Tensor
    behavior_offsets: Tensor
    candidate_request: Tensor
    behavior_request: Tensor
    layout: PairLayout | None = None

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
        return cls.laid_out(PairLayout.of(candidate_offsets, behavior_offsets))

    @classmethod
    def laid_out(cls, layout: PairLayout) -> "RequestPairs":
        """List the pairs of a layout."""
        size = layout.num_pairs if layout.of_candidate.is_cuda else None
        one = torch.repeat_interleave(layout.of_candidate, output_size=size)
        behavior = torch.repeat_interleave(layout.of_behavior, output_size=size)
        numbers = torch.arange(one.numel(), device=one.device)
        candidate = numbers + layout.to_candidate.index_select(0, behavior)
        position = layout.pair_offsets.index_select(0, candidate) + layout.place.index_select(0, behavior)
        return cls(
            candidate_index=one,
            behavior_index=numbers + layout.to_behavior.index_select(0, one),
            pair_offsets=layout.pair_offsets,
            by_behavior=ByBehavior(candidate, layout.by_behavior_offsets, position),
            candidate_offsets=layout.candidate_offsets,
            behavior_offsets=layout.behavior_offsets,
            candidate_request=layout.candidate_request,
            behavior_request=layout.behavior_request,
            layout=layout,
        )

    @cached_property
    def longest(self) -> int:
        """The most behaviors that a candidate is compared with."""
        return super().longest if self.layout is None else self.layout.longest

    def history_lengths(self) -> Tensor:
        """Behaviors each candidate is compared with, (sum_candidates,) int64."""
        return super().history_lengths() if self.layout is None else self.layout.of_candidate

    @cached_property
    def order(self) -> Tensor:
        """How many behaviors of its request come after each behavior, (sum_behaviors,) int64."""
        if self.layout is not None:
            return self.layout.order
        last = self.behavior_offsets[1:][self.behavior_request]
        return last - 1 - torch.arange(last.numel(), device=last.device)

    def recent(self, limit: int) -> "tuple[Tensor | None, RequestPairs]":
        """Histories cut to their last behaviors.

        Args:
            limit: behaviors of a request that are kept.

        Returns:
            The behaviors that are kept, (sum_kept,) int64 ascending, and the pairs with them, numbered by
            their place in this list. None is all behaviors.
        """
        layout = self.layout
        lengths = self.behavior_offsets.diff() if layout is None else layout.behavior_lengths
        if not lengths.numel() or int(lengths.max()) <= limit:
            return None, self
        shorter = lengths.clamp(max=limit)
        kept = nonzero(self.order < limit, int(shorter.sum()))
        offsets = F.pad(self.behavior_offsets.diff().clamp(max=limit).cumsum(0), (1, 0))
        known = None if layout is None else (layout.candidate_lengths, shorter)
        return kept, RequestPairs.laid_out(PairLayout.of(self.candidate_offsets, offsets, known))


def nonzero(kept: Tensor, size: int) -> Tensor:
    """Where a vector is true, (size,) int64; a GPU, for which the host would wait, is told how often."""
    return torch.nonzero_static(kept, size=size).squeeze(1) if kept.is_cuda else kept.nonzero().squeeze(1)
