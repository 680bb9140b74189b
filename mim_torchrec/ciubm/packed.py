r"""What attention computes on packed (candidate, behavior) pairs: scores, softmax, weighted sums.

With behaviors as rows of a matrix and the pairs as the non-zero entries of a sparse one, scores are a sampled
dense product and pooling is a sparse product, and each is the gradient of the other:

    s = sample(Q Kᵀ)    dQ = S(ds) K    dK = S(ds)ᵀ Q
    O = S(w) V          dw = sample(dO Vᵀ)    dV = S(w)ᵀ dO

Neither writes the (num_pairs, dim) rows that it multiplies. Products with Sᵀ run over the pairs in the order
of behaviors, which a batch lists once; torch's own gradient of an embedding bag sorts them every time. On a
CPU at 26,000 pairs of dim 64 scores take 0.1 ms against 1.6 ms by gathered rows, and the gradient of a
weighted sum a tenth of that of `F.embedding_bag`.
"""

from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mim_torchrec.quiet import quiet

SAMPLED = (torch.float32, torch.float64)
"""What `torch.sparse.sampled_addmm` has kernels for; rows of other types, as of autocast, are gathered."""


class ByBehavior(NamedTuple):
    """The same pairs ordered by behavior, then by candidate; gradients of behaviors are sums in this order.

    Attributes:
        candidate_index: (num_pairs,) the candidate of each pair.
        offsets: (sum_behaviors + 1,) where the pairs of each behavior start.
        position: (num_pairs,) where each pair stands in the order by candidate.
    """

    candidate_index: Tensor
    offsets: Tensor
    position: Tensor


class PairIndices(Protocol):
    """Indices and offsets of packed pairs: all that the functions of this module read; see `jagged.Pairs`."""

    @property
    def candidate_index(self) -> Tensor: ...
    @property
    def behavior_index(self) -> Tensor: ...
    @property
    def pair_offsets(self) -> Tensor: ...
    @property
    def by_behavior(self) -> ByBehavior: ...
    @property
    def num_candidates(self) -> int: ...
    @property
    def num_pairs(self) -> int: ...


def inner_products(candidates: Tensor, behaviors: Tensor, pairs: PairIndices) -> Tensor:
    """Inner products (num_pairs,) of candidates (sum_candidates, dim) and behaviors (sum_behaviors, dim)."""
    return _InnerProducts.apply(candidates, behaviors, pairs)


def weighted_sum(behaviors: Tensor, weights: Tensor, pairs: PairIndices) -> Tensor:
    """Behaviors (sum_behaviors, dim), summed with weights (num_pairs,): (sum_candidates, dim)."""
    return _WeightedSum.apply(behaviors, weights.to(behaviors.dtype), pairs)


def segment_softmax(scores: Tensor, pairs: PairIndices) -> Tensor:
    """Softmax of scores (num_pairs,) over the pairs of each candidate."""
    return _SegmentSoftmax.apply(scores, pairs)


def segment_logsumexp(scores: Tensor, pairs: PairIndices) -> Tensor:
    """Logarithm of the summed exponentials of the scores (num_pairs,) of each candidate, (sum_candidates,).

    Without pairs it is the lowest finite number, not minus infinity, so that gradients stay finite.
    """
    return _SegmentLogSumExp.apply(scores, pairs)


def segment_sum(rows: Tensor, pairs: PairIndices) -> Tensor:
    """Sum of the rows (num_pairs, dim) of each candidate's pairs, (sum_candidates, dim)."""
    return _SegmentSum.apply(rows, pairs)


def rows_of_candidates(rows: Tensor, pairs: PairIndices) -> Tensor:
    """The row (sum_candidates, dim) of each pair's candidate, (num_pairs, dim)."""
    return _CandidateRows.apply(rows, pairs)


def rows_of_behaviors(rows: Tensor, pairs: PairIndices) -> Tensor:
    """The row (sum_behaviors, dim) of each pair's behavior, (num_pairs, dim)."""
    return _BehaviorRows.apply(rows, pairs)


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, candidates: Tensor, behaviors: Tensor, pairs: PairIndices) -> Tensor:
        ctx.save_for_backward(candidates, behaviors)
        ctx.pairs = pairs
        return _sample(candidates, behaviors, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        candidates, behaviors = ctx.saved_tensors
        needs_candidates, needs_behaviors, _ = ctx.needs_input_grad
        return (
            _weigh_by_candidate(behaviors, grad, ctx.pairs) if needs_candidates else None,
            _weigh_by_behavior(candidates, grad, ctx.pairs) if needs_behaviors else None,
            None,
        )


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, behaviors: Tensor, weights: Tensor, pairs: PairIndices) -> Tensor:
        ctx.save_for_backward(behaviors, weights)
        ctx.pairs = pairs
        return _weigh_by_candidate(behaviors, weights, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        behaviors, weights = ctx.saved_tensors
        needs_behaviors, needs_weights, _ = ctx.needs_input_grad
        return (
            _weigh_by_behavior(grad, weights, ctx.pairs) if needs_behaviors else None,
            _sample(grad, behaviors, ctx.pairs) if needs_weights else None,
            None,
        )


class _SegmentSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pairs: PairIndices) -> Tensor:
        weights, total, _ = _segment_exp(scores, pairs)
        weights /= total.index_select(0, pairs.candidate_index)
        ctx.save_for_backward(weights)
        ctx.pairs = pairs
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        product = weights * grad
        total = _add_up(product, ctx.pairs).index_select(0, ctx.pairs.candidate_index)
        return product.addcmul_(weights, total, value=-1), None


class _SegmentLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pairs: PairIndices) -> Tensor:
        weights, total, largest = _segment_exp(scores, pairs)
        weights /= total.index_select(0, pairs.candidate_index)
        ctx.save_for_backward(weights)
        ctx.pairs = pairs
        return (total.log() + largest).clamp_(min=torch.finfo(scores.dtype).min)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return weights * grad.index_select(0, ctx.pairs.candidate_index), None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: PairIndices) -> Tensor:
        ctx.pairs = pairs
        return sum_by_candidate(rows, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.pairs.candidate_index), None


class _CandidateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: PairIndices) -> Tensor:
        ctx.pairs = pairs
        return rows.index_select(0, pairs.candidate_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_by_candidate(grad, ctx.pairs), None


class _BehaviorRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: PairIndices) -> Tensor:
        ctx.pairs = pairs
        return rows.index_select(0, pairs.behavior_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_by_behavior(grad, ctx.pairs), None


def _segment_exp(scores: Tensor, pairs: PairIndices) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of scores less the largest of their candidate, their sums, and the largest."""
    index = pairs.candidate_index
    largest = scores.new_full((pairs.num_candidates,), -torch.inf).scatter_reduce_(0, index, scores, "amax")
    weights = (scores - largest.index_select(0, index)).exp_()
    return weights, _add_up(weights, pairs), largest


def _add_up(values: Tensor, pairs: PairIndices) -> Tensor:
    return values.new_zeros(pairs.num_candidates).index_add_(0, pairs.candidate_index, values)


@cache
def _announce_csr() -> None:
    """Make the first CSR tensor of the process, at which torch warns once that they are in beta."""
    with quiet("Sparse CSR tensor support is in beta"):
        none = torch.tensor([], dtype=torch.int64)
        torch.sparse_csr_tensor(torch.tensor([0, 0]), none, none, (1, 1), check_invariants=False)


def _sample(candidates: Tensor, behaviors: Tensor, pairs: PairIndices) -> Tensor:
    if pairs.num_pairs == 0:
        return candidates.new_zeros(0)
    has_kernel = all(rows.dtype in SAMPLED for rows in (candidates, behaviors))
    if has_kernel and (candidates.is_cuda or torch.backends.mkl.is_available()):
        _announce_csr()
        structure = torch.sparse_csr_tensor(
            pairs.pair_offsets,
            pairs.behavior_index,
            candidates.new_zeros(pairs.num_pairs),
            (candidates.shape[0], behaviors.shape[0]),
            check_invariants=False,
        )
        rows, columns = candidates.contiguous(), behaviors.contiguous().t()
        return torch.sparse.sampled_addmm(structure, rows, columns).values()
    c = candidates.index_select(0, pairs.candidate_index)
    return (c * behaviors.index_select(0, pairs.behavior_index)).sum(-1)


def sum_by_candidate(rows: Tensor, pairs: PairIndices) -> Tensor:
    """Rows (num_pairs, dim) summed over the pairs of each candidate; for use within autograd functions."""
    if rows.is_cuda:
        return torch.segment_reduce(rows, "sum", offsets=pairs.pair_offsets, unsafe=True)
    return _bags(rows, None, torch.arange(rows.shape[0], device=rows.device), pairs.pair_offsets)


def sum_by_behavior(rows: Tensor, pairs: PairIndices) -> Tensor:
    """Rows (num_pairs, dim) summed over the pairs of each behavior; for use within autograd functions."""
    return _bags(rows, None, pairs.by_behavior.position, pairs.by_behavior.offsets)


def _weigh_by_candidate(behaviors: Tensor, weights: Tensor, pairs: PairIndices) -> Tensor:
    return _bags(behaviors, weights, pairs.behavior_index, pairs.pair_offsets)


def _weigh_by_behavior(candidates: Tensor, weights: Tensor, pairs: PairIndices) -> Tensor:
    order = pairs.by_behavior
    return _bags(candidates, weights.index_select(0, order.position), order.candidate_index, order.offsets)


def _bags(rows: Tensor, weights: Tensor | None, index: Tensor, offsets: Tensor) -> Tensor:
    if index.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    return F.embedding_bag(
        index,
        rows.detach().contiguous(),  # without a gradient it takes a faster path, which autograd functions may
        offsets,
        mode="sum",
        per_sample_weights=None if weights is None else weights.contiguous(),
        include_last_offset=True,
    )
