r"""Behavior Sequence Transformer (Chen et al., DLP-KDD 2019).

One transformer layer, the number the paper found best, over a history and the target, whose positions are
embeddings of the recency before the request (section 2.1). With E = embedding + position (Eq. 1–6):

    S' = LayerNorm(E + MultiHead(E))      F = LayerNorm(S' + FFN(S'))      FFN = W₂ LeakyReLU(W₁ ·)

(the paper writes MultiHead(S) in S', with S = MultiHead(E); we read it as the usual residual connection.)

The paper puts the outputs of all positions side by side, which needs one length for all histories. Ours have
any, so the interest is the target's output beside the mean of the behaviors' outputs. Histories are cut to
their last `max_positions` behaviors (20 in the paper). Left out: stacked layers.

What behaviors pay each other does not depend on the target. With their attention o_i among themselves and
its normalizer Z_i, the target t joins as $o_i + p (v_t - o_i)$ with $p = σ(⟨q_i, k_t⟩/√d − \log Z_i)$:
attention is quadratic in the length once a history, and linear for each candidate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mim_torchrec.ciubm import heads as heads_at_once
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.packed import rows_of_behaviors, rows_of_candidates, segment_logsumexp, segment_sum
from mim_torchrec.ciubm.pair_layout import PairLayout
from mim_torchrec.ciubm.ubm.interface import (
    NUM_RECENCY_BUCKETS,
    BehaviorContext,
    Interest,
    Need,
    UBMOptions,
    UserBehaviorModel,
    recency_buckets,
)
from mim_torchrec.domains import Count
from mim_torchrec.errors import OptionError

GROUP_STEP = 8


class BST(UserBehaviorModel):
    """BST's transformer layer.

    Args:
        dim: size of candidate and behavior embeddings.
        heads: attention heads; 8 in the paper.
        max_positions: most recent behaviors of a request that are used.
        feedforward: width of the feed-forward network's hidden layer; `dim` by default.
        dropout: probability of dropping an output of the attention or of the feed-forward network.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        max_positions: int = 50,
        feedforward: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads or max_positions < 1:
            raise OptionError(f"impossible: {dim} dimensions, {heads} heads, max_positions {max_positions}")
        self.out_dim = 2 * dim
        self.heads = heads
        self.max_positions = max_positions
        self.position = nn.Embedding(NUM_RECENCY_BUCKETS + 1, dim)  # the last row is the target's
        self.projection = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.attention_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, feedforward or dim)
        self.narrow = nn.Linear(feedforward or dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Run the layer on each candidate with its history."""
        buckets = recency_buckets(context, "BST")
        recent, pairs = pairs.recent(self.max_positions)
        if recent is not None:
            behaviors, buckets = behaviors.index_select(0, recent), buckets.index_select(0, recent)
        target = candidates + self.position.weight[-1]
        history = behaviors + self.position(buckets)
        if target.is_cuda:
            projected = self.projection(torch.cat([target, history]))
            of_target, of_history = projected.split([len(target), len(history)])
        else:
            of_target, of_history = self.projection(target), self.projection(history)
        read = self._attend(of_target, of_history, pairs)

        inputs = torch.cat([rows_of_behaviors(history, pairs), target])
        s = self.attention_norm(inputs + self.dropout(self.out(read)))
        outputs = self.norm(s + self.dropout(self.narrow(F.leaky_relu(self.widen(s)))))

        lengths = pairs.history_lengths()[:, None]
        at_pairs, at_target = outputs.split([pairs.num_pairs, len(target)])
        mean = segment_sum(at_pairs, pairs) / lengths.clamp(min=1)
        at_target = torch.where(lengths > 0, at_target, 0.0)
        return Interest(torch.cat([at_target, mean], dim=-1))

    def _attend(self, target: Tensor, history: Tensor, pairs: RequestPairs) -> Tensor:
        """Multi-head attention of all positions to all, joined head by head.

        Args:
            target: (sum_candidates, 3 dim) queries, keys and values.
            history: (sum_behaviors, 3 dim) likewise.
            pairs: the pairs.

        Returns:
            (num_pairs + sum_candidates, dim): what each behavior reads in the presence of each candidate,
            then what the target of each candidate reads.
        """
        if target.is_cuda:
            return attend_at_once(target, history, pairs, self.heads)
        among, normalizers = attend_within(history, pairs.behavior_offsets, self.heads)
        width = target.shape[1] // (3 * self.heads)
        of_heads = zip(*(_split(x, self.heads).unbind(0) for x in (target, history)), strict=True)
        at_targets, back = [], []
        for of_target, of_history in of_heads:
            q_t, k_t, v_t = of_target.unbind(0)
            q_i, k_i, v_i = of_history.unbind(0)
            q_t = q_t / math.sqrt(width)
            scores = pairs.inner_products(q_t, k_i)
            read = pairs.weighted_sum(v_i, pairs.segment_softmax(scores))
            share = torch.sigmoid((q_t * k_t).sum(-1) - segment_logsumexp(scores, pairs))
            at_targets.append(torch.lerp(read, v_t, share[:, None]))
            back.append(pairs.inner_products(k_t / math.sqrt(width), q_i))

        share = torch.sigmoid(torch.stack(back, dim=1) - rows_of_behaviors(normalizers, pairs))
        values = target[:, -self.heads * width :]
        own, offered = rows_of_behaviors(among, pairs), rows_of_candidates(values, pairs)
        by_head = (pairs.num_pairs, self.heads, width)
        at_pairs = torch.lerp(own.view(by_head), offered.view(by_head), share[:, :, None])
        return torch.cat([at_pairs.flatten(1), torch.cat(at_targets, dim=-1)])


def attend_at_once(target: Tensor, history: Tensor, pairs: RequestPairs, heads: int) -> Tensor:
    """`BST._attend` of all heads and histories at once, in few launches."""
    among, normalizers = attend_padded(history, pairs, heads)
    dim = among.shape[1]
    scale = math.sqrt(dim // heads)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (heads, -1))

    q_t, k_t, v_t = target.split(dim, dim=1)
    q_i, k_i, v_i = history.split(dim, dim=1)
    of_target, offered = rows_of_candidates(target, pairs).split([2 * dim, dim], dim=1)
    rows = rows_of_behaviors(torch.cat([k_i, q_i, v_i, among, normalizers], dim=1), pairs)
    crossed, value, own, of_normalizer = rows.split([2 * dim, dim, dim, heads], dim=1)
    # of each pair, how much its target heeds its behavior, and the other way round
    scores, back = (of_target * crossed).unflatten(1, (2, heads, -1)).sum(-1).unbind(1)
    weights, logsumexp = heads_at_once.softmax_and_logsumexp(scores / scale, pairs)
    read = segment_sum((by_head(value) * weights[:, :, None]).flatten(1), pairs)
    itself = (by_head(q_t) * by_head(k_t)).sum(-1)
    normalizer, score = torch.cat([of_normalizer, logsumexp]), torch.cat([back, itself])
    kept = torch.sigmoid(torch.sub(normalizer, score, alpha=1 / scale))  # what the target does not take
    known, new = torch.cat([own, read]), torch.cat([offered, v_t])
    return torch.lerp(by_head(new), by_head(known), kept[:, :, None]).flatten(1)


def attend_padded(projected: Tensor, pairs: RequestPairs, heads: int) -> tuple[Tensor, Tensor]:
    """`attend_within` of the histories of a batch, all padded to the longest.

    Args:
        projected: (sum_behaviors, 3 dim).
        pairs: whose layout says how long histories are.
        heads: attention heads.
    """
    layout = pairs.layout
    assert layout is not None
    longest = int(layout.behavior_lengths.max()) if layout.behavior_lengths.numel() else 0
    if not longest:
        return projected[:, : projected.shape[1] // 3], projected[:, :heads]
    return _AttendPadded.apply(projected, layout, longest, heads)


class _AttendPadded(torch.autograd.Function):
    """`_AttendWithin` in few launches, in one block (histories, heads, longest, width) of all histories."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, layout: PairLayout, longest: int, heads: int
    ) -> tuple[Tensor, Tensor]:
        columns = torch.arange(longest, device=projected.device)
        position = layout.behavior_offsets[:-1, None] + columns
        missing = position >= layout.behavior_offsets[1:, None]
        position.clamp_(max=projected.shape[0] - 1)
        place = layout.behavior_request * longest + layout.place
        shape = *position.shape, 3, heads, projected.shape[1] // (3 * heads)
        padded = projected.index_select(0, position.view(-1)).view(shape).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = (each.flatten(0, 1) for each in padded)
        weights = torch.bmm(q, k.transpose(1, 2)).div_(math.sqrt(shape[-1]))
        by_history = weights.unflatten(0, (-1, heads))
        by_history.masked_fill_(missing[:, None, None], torch.finfo(weights.dtype).min)
        normalizers = weights.logsumexp(-1, keepdim=True)
        weights.sub_(normalizers).exp_()
        read = torch.cat([torch.bmm(weights, v), normalizers], dim=2)
        found = read.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1).index_select(0, place)
        by_history.masked_fill_(missing[:, None, :, None], 0)  # of no position: it has no gradient
        out = found[:, :, :-1].flatten(1)
        ctx.save_for_backward(padded, weights, position, place, out)
        return out, found[:, :, -1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_normalizers: Tensor) -> tuple[Tensor, None, None, None]:
        padded, weights, position, place, out = ctx.saved_tensors
        heads, longest, width = padded.shape[2:]
        q, k, v = (each.flatten(0, 1) for each in padded)
        by_head = grad.unflatten(1, (heads, width))
        shift = (by_head * out.unflatten(1, (heads, width))).sum(-1).sub_(grad_normalizers)
        both = torch.cat([by_head, shift[:, :, None]], dim=2).index_select(0, position.view(-1))
        both = both.unflatten(0, (-1, longest)).transpose(1, 2).flatten(0, 1)
        d_out, shift = both[:, :, :-1], both[:, :, -1:]
        d_scores = torch.bmm(d_out, v.transpose(1, 2)).sub_(shift).mul_(weights).div_(math.sqrt(width))
        d_q, d_k = torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q)
        parts = d_q, d_k, torch.bmm(weights.transpose(1, 2), d_out)
        of_positions = torch.stack(parts, dim=1).unflatten(0, (-1, heads)).permute(0, 3, 2, 1, 4)
        return of_positions.flatten(0, 1).index_select(0, place).flatten(1), None, None, None


def _split(projected: Tensor, heads: int) -> Tensor:
    """(n, 3 dim) to (heads, 3, n, dim / heads)."""
    return projected.unflatten(1, (3, heads, -1)).permute(2, 1, 0, 3).contiguous()


def attend_within(projected: Tensor, offsets: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head self-attention within each ragged sequence.

    Sequences are padded within groups whose lengths differ by less than 8.

    Args:
        projected: (num_positions, 3 dim) queries, keys and values.
        offsets: (num_sequences + 1,) where each sequence starts.
        heads: attention heads.

    Returns:
        (num_positions, dim) outputs, and (num_positions, heads) logarithms of the normalizers.
    """
    return _AttendWithin.apply(projected, offsets, heads)


class _AttendWithin(torch.autograd.Function):
    """Scaled dot-product attention that gives its normalizers too, with their gradient."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, offsets: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        out = projected.new_empty(projected.shape[0], projected.shape[1] // 3)
        normalizers = projected.new_empty(projected.shape[0], heads)
        scale = math.sqrt(projected.shape[1] // (3 * heads))
        ctx.heads, ctx.groups = heads, []
        for position, exists in _groups(offsets):
            q, k, v = _pad(projected, position, exists, 3 * heads).chunk(3, dim=1)
            weights = (q / scale) @ k.transpose(2, 3)
            weights.masked_fill_(~exists[:, None, None], -torch.inf)
            largest = weights.amax(-1, keepdim=True)
            total = weights.sub_(largest).exp_().sum(-1, keepdim=True)
            weights /= total
            out[position] = (weights @ v).transpose(1, 2)[exists].flatten(1)
            normalizers[position] = (largest + total.log()).squeeze(-1).transpose(1, 2)[exists]
            ctx.groups.append((position, exists, weights))
        ctx.save_for_backward(projected, out)
        return out, normalizers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_normalizers: Tensor) -> tuple[Tensor, None, None]:
        projected, out = ctx.saved_tensors
        grad_projected = torch.empty_like(projected)
        scale = math.sqrt(projected.shape[1] // (3 * ctx.heads))
        shift = (grad * out).unflatten(1, (ctx.heads, -1)).sum(-1) - grad_normalizers
        for position, exists, weights in ctx.groups:
            q, k, v = _pad(projected, position, exists, 3 * ctx.heads).chunk(3, dim=1)
            d_out = _pad(grad, position, exists, ctx.heads)
            d_scores = d_out @ v.transpose(2, 3)
            d_scores.sub_(_pad(shift, position, exists, ctx.heads)).mul_(weights).div_(scale)
            parts = d_scores @ k, d_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ d_out
            grad_projected[position] = torch.cat(parts, dim=1).transpose(1, 2)[exists].flatten(1)
        return grad_projected, None, None


def _groups(offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences of like length: their positions, and which places of a block (n, longest) these fill."""
    lengths = offsets.diff()
    group_of = (lengths + GROUP_STEP - 1) // GROUP_STEP
    for group in group_of[lengths > 0].unique().tolist():
        rows = (group_of == group).nonzero().squeeze(1)
        columns = torch.arange(int(lengths[rows].max()), device=offsets.device)
        exists = columns < lengths[rows][:, None]
        yield (offsets[rows][:, None] + columns)[exists], exists


def _pad(rows: Tensor, position: Tensor, exists: Tensor, parts: int) -> Tensor:
    """The rows at these positions as (n, parts, longest, dim / parts), zeros where there is none."""
    padded = rows.new_zeros(*exists.shape, rows.shape[1])
    padded[exists] = rows.index_select(0, position)
    return padded.unflatten(2, (parts, -1)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class BSTOptions(UBMOptions):
    """Options of BST."""

    name = "bst"

    heads: Count = 4
    """Attention heads; each takes its fraction of the embeddings of an item."""
    max_positions: Count = 50
    """Most recent behaviors that are used."""

    @property
    def needs(self) -> frozenset[Need]:
        """See `UBMOptions`."""
        return frozenset({"recency"})

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> BST:
        """See `UBMOptions`."""
        return BST(dim, self.heads, self.max_positions, dropout=dropout)
