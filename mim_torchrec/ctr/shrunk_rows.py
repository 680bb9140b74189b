"""Rows of ID embeddings multiplied by the factors of `--id-shrinkage`, in few operators.

The rows of an item lie in several tensors, one for each table and role, and every row has its own factor.
They are brought together once, and the multiplication writes them where the model reads them. So it takes as
many operators as bringing them together takes without factors, and two more in the backward pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mim_torchrec.ciubm.jagged import RequestPairs


class Factors(NamedTuple):
    """By what the rows of a batch are multiplied.

    Attributes:
        items: (num_tables, sum_candidates + sum_behaviors) of the tables of an item.
        requests: (num_features, num_requests) of the features of requests; None where their rows have been
            multiplied.
    """

    items: Tensor
    requests: Tensor | None


def shrunk_items(
    candidates: Sequence[Tensor], behaviors: Sequence[Tensor], factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of the tables of an item, multiplied and put side by side.

    Args:
        candidates: of each table (sum_candidates, dim).
        behaviors: of each table (sum_behaviors, dim).
        factors: (num_tables, sum_candidates + sum_behaviors).

    Returns:
        (sum_candidates, num_tables * dim) and (sum_behaviors, num_tables * dim).
    """
    rows = [part for pair in zip(candidates, behaviors, strict=True) for part in pair]
    return _ShrunkItems.apply(factors, *rows)


def shrunk_requests(rows: Tensor, factors: Tensor, pairs: RequestPairs) -> Tensor:
    """The rows of each candidate's request, multiplied.

    Args:
        rows: (num_requests, num_features * dim), those of the features of a request side by side.
        factors: (num_features, num_requests).
        pairs: of the batch.

    Returns:
        (sum_candidates, num_features * dim).
    """
    return _ShrunkRequests.apply(rows, factors, pairs)


class _ShrunkItems(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(factors)
        ctx.num_candidates = rows[0].shape[0]
        by_table = torch.cat(rows).view(*factors.shape, rows[0].shape[1])
        by_item = by_table.new_empty(by_table.shape[1], by_table.shape[0], by_table.shape[2])
        torch.mul(by_table.transpose(0, 1), factors.t()[:, :, None], out=by_item)
        found = by_item.flatten(1)
        return found[: ctx.num_candidates], found[ctx.num_candidates :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        tables, (count, width) = factors.shape[0], grads[0].shape
        by_table = factors.new_empty(*factors.shape, width // tables)
        by_item, of_items = by_table.transpose(0, 1), factors.t()[:, :, None]
        for role, grad in zip((slice(None, count), slice(count, None)), grads, strict=True):
            torch.mul(grad.unflatten(1, (tables, -1)), of_items[role], out=by_item[role])
        parts = (part for table in by_table for part in (table[:count], table[count:]))
        return None, *parts


class _ShrunkRequests(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, factors: Tensor, pairs: RequestPairs) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.pairs = pairs
        return _multiplied(rows, factors).index_select(0, pairs.candidate_request)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (factors,) = ctx.saved_tensors
        pairs: RequestPairs = ctx.pairs
        if grad.is_cuda:  # candidates of a request are neighbors
            offsets = pairs.candidate_offsets
            to_rows = torch.segment_reduce(grad, "sum", offsets=offsets, unsafe=True)
        else:
            to_rows = grad.new_zeros(factors.shape[1], grad.shape[1])
            to_rows.index_add_(0, pairs.candidate_request, grad)
        return _multiplied(to_rows, factors), None, None


def _multiplied(rows: Tensor, factors: Tensor) -> Tensor:
    return (rows.unflatten(1, (factors.shape[0], -1)) * factors.t()[:, :, None]).flatten(1)
