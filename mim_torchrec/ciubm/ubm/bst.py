r"""Behavior Sequence Transformer (Chen et al., DLP-KDD 2019).

One transformer layer, the number the paper found best, over a history and the target, whose positions are
embeddings of the time gap to the request (section 2.1). With E = embedding + position (Eq. 1–6):

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.packed import segment_logsumexp, segment_sum
from mim_torchrec.ciubm.ubm.interface import (
    NUM_GAP_BUCKETS,
    BehaviorContext,
    Interest,
    UserBehaviorModel,
    gap_buckets,
)

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
            raise ValueError(f"impossible: {dim} dimensions, {heads} heads, max_positions {max_positions}")
        self.out_dim = 2 * dim
        self.heads = heads
        self.max_positions = max_positions
        self.position = nn.Embedding(NUM_GAP_BUCKETS + 1, dim)  # the last row is the target's
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
        buckets = gap_buckets(context, "BST")
        recent, pairs = pairs.recent(self.max_positions)
        if recent.numel() < behaviors.shape[0]:
            behaviors, buckets = behaviors.index_select(0, recent), buckets.index_select(0, recent)
        target = candidates + self.position.weight[-1]
        history = behaviors + self.position(buckets)
        of_target, of_history = self.projection(target), self.projection(history)
        target_out, pair_out = self._attend(of_target, of_history, pairs)

        num_pairs = pairs.num_pairs
        inputs = torch.cat([history.index_select(0, pairs.behavior_index), target])
        s = self.attention_norm(inputs + self.dropout(self.out(torch.cat([pair_out, target_out]))))
        outputs = self.norm(s + self.dropout(self.narrow(F.leaky_relu(self.widen(s)))))

        lengths = pairs.history_lengths()[:, None]
        mean = segment_sum(outputs[:num_pairs], pairs) / lengths.clamp(min=1)
        at_target = torch.where(lengths > 0, outputs[num_pairs:], 0.0)
        return Interest(torch.cat([at_target, mean], dim=-1))

    def _attend(self, target: Tensor, history: Tensor, pairs: RequestPairs) -> tuple[Tensor, Tensor]:
        """Multi-head attention of all positions to all, joined head by head.

        Args:
            target: (sum_candidates, 3 dim) queries, keys and values.
            history: (sum_behaviors, 3 dim) likewise.
            pairs: the pairs.

        Returns:
            What the target of each candidate reads, (sum_candidates, dim), and what each behavior reads in
            the presence of each candidate, (num_pairs, dim).
        """
        among, normalizer = attend_within(history, pairs.behavior_offsets, self.heads)
        width = target.shape[1] // (3 * self.heads)
        at_targets, at_pairs = [], []
        for head in range(self.heads):
            q_t, k_t, v_t = target.unflatten(1, (3, self.heads, width))[:, :, head].unbind(1)
            q_i, k_i, v_i = history.unflatten(1, (3, self.heads, width))[:, :, head].unbind(1)
            q_t, q_i = q_t / math.sqrt(width), q_i / math.sqrt(width)
            scores = pairs.inner_products(q_t, k_i)
            read = pairs.weighted_sum(v_i, pairs.segment_softmax(scores))
            share = torch.sigmoid((q_t * k_t).sum(-1) - segment_logsumexp(scores, pairs))
            at_targets.append(torch.lerp(read, v_t, share[:, None]))

            own = among[:, head].index_select(0, pairs.behavior_index)
            back = pairs.inner_products(k_t, q_i)
            share = torch.sigmoid(back - normalizer[:, head].index_select(0, pairs.behavior_index))
            at_pairs.append(torch.lerp(own, v_t.index_select(0, pairs.candidate_index), share[:, None]))
        return torch.cat(at_targets, dim=-1), torch.cat(at_pairs, dim=-1)


def attend_within(projected: Tensor, offsets: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head self-attention within each ragged sequence.

    Sequences are padded within groups whose lengths differ by less than 8.

    Args:
        projected: (num_positions, 3 dim) queries, keys and values.
        offsets: (num_sequences + 1,) where each sequence starts.
        heads: attention heads.

    Returns:
        (num_positions, heads, dim / heads) outputs, and (num_positions, heads) logarithms of the normalizer.
    """
    lengths = offsets.diff()
    width = projected.shape[1] // (3 * heads)
    outputs, normalizers, order = [], [], []
    groups = (lengths + GROUP_STEP - 1) // GROUP_STEP
    for group in groups[lengths > 0].unique().tolist():
        rows = (groups == group).nonzero().squeeze(1)
        longest = int(lengths[rows].max())
        columns = torch.arange(longest, device=offsets.device)
        exists = columns < lengths[rows][:, None]
        position = (offsets[rows][:, None] + columns).clamp(max=projected.shape[0] - 1)
        padded = projected.index_select(0, position.reshape(-1))
        q, k, v = padded.view(rows.numel(), longest, 3, heads, width).permute(2, 0, 3, 1, 4)
        scores = (q / math.sqrt(width)) @ k.transpose(2, 3)
        scores = scores.masked_fill(~exists[:, None, None], -torch.inf)
        normalizer = scores.logsumexp(-1)
        out = (scores - normalizer[..., None]).exp() @ v
        outputs.append(out.transpose(1, 2)[exists])
        normalizers.append(normalizer.transpose(1, 2)[exists])
        order.append(position[exists])
    if not order:
        return projected[:, : heads * width].unflatten(1, (heads, width)), projected[:, :heads]
    back = torch.cat(order).argsort()
    return torch.cat(outputs).index_select(0, back), torch.cat(normalizers).index_select(0, back)
