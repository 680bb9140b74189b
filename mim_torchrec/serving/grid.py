"""All pairs of one request as a dense grid of candidates and behaviors.

A server mostly scores requests in which every candidate is compared with every behavior. Sums over packed
pairs are then matrix products, and no list of pairs is needed. For inference only: the order by behavior,
which gradients need, is not built.
"""

from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.jagged import Pairs, RequestPairs
from mim_torchrec.ciubm.packed import ByBehavior


class Grid(RequestPairs):
    """`RequestPairs` of a single request.

    Args:
        num_candidates: of the request.
        num_behaviors: likewise.
    """

    shape: tuple[int, int]

    def __init__(self, num_candidates: int, num_behaviors: int) -> None:
        shape = (num_candidates, num_behaviors)
        self.__dict__.update(  # the base class is frozen
            shape=shape,
            candidate_offsets=torch.tensor([0, num_candidates]),
            behavior_offsets=torch.tensor([0, num_behaviors]),
            pair_offsets=torch.arange(num_candidates + 1) * num_behaviors,
            candidate_request=torch.zeros(num_candidates, dtype=torch.int64),
            behavior_request=torch.zeros(num_behaviors, dtype=torch.int64),
        )

    @cached_property
    def candidate_index(self) -> Tensor:
        """See `Pairs`."""
        return torch.arange(self.shape[0]).repeat_interleave(self.shape[1])

    @cached_property
    def behavior_index(self) -> Tensor:
        """See `Pairs`."""
        return torch.arange(self.shape[1]).repeat(self.shape[0])

    @property
    def by_behavior(self) -> ByBehavior:
        """Not there: only gradients need it."""
        raise NotImplementedError("a grid of pairs has no order by behavior; train on RequestPairs.build")

    @property
    def num_pairs(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def longest(self) -> int:
        return self.shape[1] if self.shape[0] else 0

    def inner_products(self, candidates: Tensor, behaviors: Tensor) -> Tensor:
        """See `Pairs`."""
        return (candidates @ behaviors.T).reshape(-1)

    def weighted_sum(self, behaviors: Tensor, weights: Tensor) -> Tensor:
        """See `Pairs`."""
        return weights.to(behaviors.dtype).view(self.shape) @ behaviors

    def segment_softmax(self, scores: Tensor) -> Tensor:
        """See `Pairs`."""
        return scores.view(self.shape).softmax(1).reshape(-1) if self.num_pairs else scores

    def top_k(self, scores: Tensor, k: int) -> Tensor:
        """See `Pairs`."""
        rows = scores.view(self.shape)
        if self.shape[1] <= k or not self.num_pairs:
            return torch.ones(self.num_pairs, dtype=torch.bool)
        smallest = rows.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        kept = rows >= smallest
        surplus = kept.sum(1) - k
        for row in (surplus > 0).nonzero().squeeze(1).tolist():  # of equal scores the later ones are kept
            equal = (rows[row] == smallest[row]).nonzero().squeeze(1)
            kept[row, equal[: int(surplus[row])]] = False
        return kept.view(-1)

    def select(self, kept: Tensor) -> Pairs:
        """See `Pairs`."""
        places = kept.nonzero().squeeze(1)
        candidate_index = torch.div(places, max(self.shape[1], 1), rounding_mode="floor")
        behavior_index = places - candidate_index * self.shape[1]
        return _listed(candidate_index, behavior_index, kept.view(self.shape).sum(1))


def _listed(candidate_index: Tensor, behavior_index: Tensor, counts: Tensor) -> "Listed":
    """Pairs of candidates, (num_candidates,) of each; in rows where all have equally many."""
    width = int(counts[0]) if len(counts) else 0
    made = Rows if width and bool((counts == width).all()) else Listed
    nothing = cast(ByBehavior, None)  # only gradients read the order by behavior
    return made(candidate_index, behavior_index, F.pad(counts.cumsum(0), (1, 0)), nothing)


class Listed(Pairs):
    """Some pairs of a grid, without their order by behavior."""

    def select(self, kept: Tensor) -> Pairs:
        """See `Pairs`."""
        counts = torch.zeros(self.num_candidates, dtype=torch.int64)
        counts.index_add_(0, self.candidate_index, kept.long())
        return _listed(self.candidate_index[kept], self.behavior_index[kept], counts)


class Rows(Listed):
    """Pairs of which every candidate has equally many: (num_candidates, width) behaviors."""

    def _of_candidates(self, behaviors: Tensor) -> Tensor:
        """The behaviors of each candidate, (num_candidates, width, dim); heads ask for the same ones."""
        asked, found = self.__dict__.get("_last", (None, None))
        if asked is not behaviors:
            flat = behaviors.index_select(0, self.behavior_index)
            found = flat.view(self.num_candidates, -1, behaviors.shape[1])
            self.__dict__["_last"] = (behaviors, found)
        return found

    def inner_products(self, candidates: Tensor, behaviors: Tensor) -> Tensor:
        """See `Pairs`."""
        flat = behaviors.index_select(0, self.behavior_index)
        found = flat.view(self.num_candidates, -1, behaviors.shape[1])
        return torch.bmm(found, candidates[:, :, None]).reshape(-1)

    def weighted_sum(self, behaviors: Tensor, weights: Tensor) -> Tensor:
        """See `Pairs`."""
        found = self._of_candidates(behaviors)
        weights = weights.to(found.dtype).view(self.num_candidates, 1, -1)
        return torch.bmm(weights, found).squeeze(1)

    def segment_softmax(self, scores: Tensor) -> Tensor:
        """See `Pairs`."""
        return scores.view(self.num_candidates, -1).softmax(1).reshape(-1)


class Requests(RequestPairs):
    """`RequestPairs` of several requests, which lists pairs only for a model that asks for them.

    Args:
        candidate_offsets: (num_requests + 1,).
        behavior_offsets: (num_requests + 1,).
    """

    def __init__(self, candidate_offsets: Tensor, behavior_offsets: Tensor) -> None:
        requests = torch.arange(len(candidate_offsets) - 1)
        self.__dict__.update(  # the base class is frozen
            candidate_offsets=candidate_offsets,
            behavior_offsets=behavior_offsets,
            candidate_request=requests.repeat_interleave(candidate_offsets.diff()),
            behavior_request=requests.repeat_interleave(behavior_offsets.diff()),
        )

    @cached_property
    def _listed(self) -> RequestPairs:
        return RequestPairs.build(self.candidate_offsets, self.behavior_offsets)

    @property
    def candidate_index(self) -> Tensor:
        """See `Pairs`."""
        return self._listed.candidate_index

    @property
    def behavior_index(self) -> Tensor:
        """See `Pairs`."""
        return self._listed.behavior_index

    @property
    def pair_offsets(self) -> Tensor:
        """See `Pairs`."""
        return self._listed.pair_offsets

    @property
    def by_behavior(self) -> ByBehavior:
        """See `Pairs`."""
        return self._listed.by_behavior

    @property
    def num_candidates(self) -> int:
        return self.candidate_request.numel()

    def history_lengths(self) -> Tensor:
        """See `Pairs`."""
        return self.behavior_offsets.diff().index_select(0, self.candidate_request)


def pairs_of(candidate_offsets: Tensor, behavior_offsets: Tensor) -> RequestPairs:
    """The pairs of a batch, as a grid where it is of one request.

    Args:
        candidate_offsets: (num_requests + 1,).
        behavior_offsets: (num_requests + 1,).
    """
    if candidate_offsets.numel() == 2:
        return Grid(int(candidate_offsets[1]), int(behavior_offsets[1]))
    return Requests(candidate_offsets.long(), behavior_offsets.long())
