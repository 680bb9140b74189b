"""BST's interest of one request: its transformer layer on blocks of candidates that stay in the cache.

As in `ciubm.ubm.bst`, what behaviors pay each other is computed once. The rows of (candidate, behavior) that
the layer needs exist for a block of candidates at a time, and operations overwrite them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.ubm.bst import BST, attend_within
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from mim_torchrec.serving.blocks import blocks_of


def bst_interest(
    bst: BST, candidates: Tensor, behaviors: Tensor, context: BehaviorContext | None
) -> Tensor | None:
    """BST's interest, (num_candidates, 2 dim)."""
    buckets = recency_buckets(context, "BST")[-bst.max_positions :]
    target = candidates + bst.position.weight[-1]
    history = behaviors[-bst.max_positions :] + bst.position(buckets)
    of_target, of_history = bst.projection(target), bst.projection(history)
    among, normalizers = attend_within(of_history, torch.tensor([0, len(history)]), bst.heads)
    count, length, dim = len(candidates), len(history), candidates.shape[1]
    scale = math.sqrt(dim // bst.heads)
    q_t, k_t, v_t = of_target.view(count, 3, bst.heads, -1).permute(1, 2, 0, 3)  # (heads, candidates, width)
    q_i, k_i, v_i = of_history.view(length, 3, bst.heads, -1).permute(1, 2, 0, 3)

    scores = (q_t / scale) @ k_i.transpose(1, 2)
    share = torch.sigmoid((q_t * k_t).sum(-1) / scale - scores.logsumexp(-1))
    read = torch.lerp(scores.softmax(-1) @ v_i, v_t, share[:, :, None]).transpose(0, 1).flatten(1)
    at_target = _layer(bst, target + bst.out(read))

    back = (k_t / scale) @ q_i.transpose(1, 2) - normalizers.T[:, None]
    shares = torch.sigmoid(back).permute(1, 2, 0).contiguous()  # (candidates, behaviors, heads)
    columns_of_head = torch.eye(bst.heads).repeat_interleave(dim // bst.heads, dim=1)
    offered, mean = v_t.transpose(0, 1).flatten(1), torch.empty_like(candidates)
    for rows in blocks_of(count, length * dim):
        pairs = shares[rows] @ columns_of_head  # lerp(among, offered, share), head by head
        pairs.mul_(offered[rows, None] - among).add_(among)
        attended = F.linear(pairs.view(-1, dim), bst.out.weight).view_as(pairs).add_(history)
        torch.mean(_layer(bst, attended), 1, out=mean[rows])
    return torch.cat([at_target, mean], dim=-1)


def _layer(bst: BST, attended: Tensor) -> Tensor:
    """What follows the attention and its residual connection, of (..., dim)."""
    s = bst.attention_norm(attended)
    wide = F.leaky_relu_(bst.widen(s))
    return bst.norm(s.add_(bst.narrow(wide)))
