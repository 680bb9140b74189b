"""Attention of several heads on packed pairs, all heads at once: for GPUs.

A CPU computes head by head with the sparse products of `packed.py`, which write no row of a pair. A GPU would
spend such a step launching them. Here heads are columns, (num_pairs, heads), and a search keeps no shorter
list of pairs, whose size the host would have to wait for, but a mask: what it leaves out weighs nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mim_torchrec.ciubm.jagged import Pairs
from mim_torchrec.ciubm.packed import rows_of_behaviors, rows_of_candidates, segment_sum


def inner_products(candidates: Tensor, behaviors: Tensor, heads: int, pairs: Pairs) -> Tensor:
    """Inner products of each pair by head, (num_pairs, heads).

    Args:
        candidates: (sum_candidates, heads * width), head by head.
        behaviors: (sum_behaviors, heads * width) likewise.
        heads: how many.
        pairs: the pairs.
    """
    product = rows_of_candidates(candidates, pairs) * rows_of_behaviors(behaviors, pairs)
    return product.unflatten(1, (heads, -1)).sum(-1)


def weighted_sum(values: Tensor, weights: Tensor, pairs: Pairs, *, shared: bool = False) -> Tensor:
    """Values of the behaviors of each candidate, summed by head: (sum_candidates, heads * width).

    Args:
        values: (sum_behaviors, heads * width) head by head, or (sum_behaviors, width) if `shared`.
        weights: (num_pairs, heads).
        pairs: the pairs.
        shared: every head has the same values.
    """
    rows = rows_of_behaviors(values, pairs)
    of_heads = rows.unsqueeze(1) if shared else rows.unflatten(1, (weights.shape[1], -1))
    return segment_sum((of_heads * weights.unsqueeze(2)).flatten(1), pairs)


def segment_softmax(scores: Tensor, pairs: Pairs, kept: Tensor | None = None) -> Tensor:
    """Softmax of scores (num_pairs, heads) over the pairs of each candidate.

    Args:
        scores: of each pair by head.
        pairs: the pairs.
        kept: (num_pairs, heads) or (num_pairs, 1) bool, the pairs that take part; the others weigh nothing.
    """
    return _MaskedSoftmax.apply(scores, kept, pairs, False)


def softmax_and_logsumexp(scores: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """`segment_softmax`, and the logarithms of its normalizers, (sum_candidates, heads).

    Without pairs a normalizer is the lowest finite number, so that gradients stay finite.
    """
    return _MaskedSoftmax.apply(scores, None, pairs, True)


@torch.no_grad()
def top_k(scores: Tensor, k: int, pairs: Pairs) -> Tensor:
    """Which pairs have the k largest scores of their candidate, by head; as `Pairs.top_k` chooses.

    Args:
        scores: (num_pairs, heads).
        k: pairs of a candidate that are kept.
        pairs: the pairs.

    Returns:
        (num_pairs, heads) bool.
    """
    count, heads = scores.shape
    columns = torch.arange(1, pairs.longest + 1, device=scores.device)
    position = pairs.pair_offsets[1:, None] - columns  # the last behavior first
    missing = position < pairs.pair_offsets[:-1, None]
    padded = scores.index_select(0, position.clamp(min=0).view(-1)).view(*position.shape, heads)
    padded = padded.masked_fill_(missing[:, :, None], -torch.inf)
    order = padded.sort(dim=1, descending=True, stable=True).indices[:, :k]
    position = position.masked_fill_(missing, count)[:, :, None].expand_as(padded)
    kept = scores.new_zeros(count + 1, heads, dtype=torch.bool)  # the last row is of what is missing
    return kept.scatter_(0, position.gather(1, order).view(-1, heads), True)[:count]


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, kept: Tensor | None, pairs: Pairs, normalizers: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        lowest = torch.finfo(scores.dtype).min
        if kept is not None:
            scores = torch.where(kept, scores, -torch.inf)
        index, shape = pairs.candidate_index, (pairs.num_candidates, scores.shape[1])
        by_head = index[:, None].expand_as(scores)
        largest = scores.new_full(shape, lowest).scatter_reduce_(0, by_head, scores, "amax")
        weights = (scores - largest.index_select(0, index)).exp_()
        total = scores.new_full(shape, torch.finfo(scores.dtype).tiny).index_add_(0, index, weights)
        weights /= total.index_select(0, index)
        ctx.save_for_backward(weights)
        ctx.pairs = pairs
        ctx.set_materialize_grads(False)
        return (weights, (total.log_() + largest).clamp_(min=lowest)) if normalizers else weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_normalizers: Tensor | None = None
    ) -> tuple[Tensor, None, None, None]:
        (weights,) = ctx.saved_tensors
        index = ctx.pairs.candidate_index
        product = torch.zeros_like(weights) if grad is None else weights * grad
        total = product.new_zeros(ctx.pairs.num_candidates, product.shape[1]).index_add_(0, index, product)
        if grad_normalizers is not None:
            total -= grad_normalizers
        return product.addcmul_(weights, total.index_select(0, index), value=-1), None, None, None
