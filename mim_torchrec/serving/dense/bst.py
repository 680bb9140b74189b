"""BST's interest of one request: its transformer layer on blocks of candidates that stay in the cache.

As in `ciubm.ubm.bst`, what behaviors pay each other is computed once. The pairs that the layer needs exist
for a block of candidates at a time, one column each: a sum over an embedding is then a sum of rows. The means
that layer normalizations subtract, their scales and all biases are part of the matrices around them. Of a
normalization the division by the standard deviation is left.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.ubm.bst import BST
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from mim_torchrec.serving.dense.blocks import blocks_of


def bst_interest(
    bst: BST, candidates: Tensor, behaviors: Tensor, context: BehaviorContext | None
) -> Tensor | None:
    """BST's interest, (num_candidates, 2 dim)."""
    buckets = recency_buckets(context, "BST")[-bst.max_positions :]
    target = candidates + bst.position.weight[-1]
    history = behaviors[-bst.max_positions :] + bst.position(buckets)
    count, length, dim = len(candidates), len(history), candidates.shape[1]
    scale = math.sqrt(dim // bst.heads)
    q_t, k_t, v_t = bst.projection(target).view(count, 3, bst.heads, -1).permute(1, 2, 0, 3)
    q_i, k_i, v_i = bst.projection(history).view(length, 3, bst.heads, -1).permute(1, 2, 0, 3)

    of_history, normalizers = _attend(q_t / scale, k_i, v_i)
    share = torch.sigmoid((q_t * k_t).sum(-1, keepdim=True) / scale - normalizers)
    read = torch.lerp(of_history, v_t, share).transpose(0, 1).flatten(1)
    at_target = _layer(bst, target + bst.out(read))

    within, normalizers = _attend(q_i / scale, k_i, v_i)
    shares = ((k_t / scale) @ q_i.transpose(1, 2)).sub_(normalizers.transpose(1, 2)).sigmoid_()
    among, offered = (x.transpose(1, 2).contiguous() for x in (within, v_t))  # (heads, width, ...)
    layer = _Folded.of(bst)
    alone = layer.out @ among.reshape(dim, length) + layer.center @ history.T  # without the target
    mean, blocks = candidates.new_empty(dim, count), list(blocks_of(count, length * dim))
    most = blocks[0].stop * length  # pairs of a block; the next one overwrites what is of this one
    changes, stacked = (candidates.new_empty(n * most) for n in (dim, layer.narrow.shape[1]))
    for rows in blocks:
        pairs = (rows.stop - rows.start) * length
        # lerp(among, offered, share), head by head, of which `alone` has the first part
        change = changes[: dim * pairs].view(*among.shape[:2], -1, length)
        torch.sub(offered[:, :, rows, None], among[:, :, None], out=change).mul_(shares[:, None, rows])
        own = stacked[: layer.narrow.shape[1] * pairs].view(-1, pairs)
        outputs = layer(change.view(dim, pairs), alone, own)
        torch.mean(outputs.view(dim, -1, length), 2, out=mean[:, rows])
    scaled = torch.addcmul(bst.norm.bias, mean.T, bst.norm.weight)
    return torch.cat([at_target, scaled], dim=-1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What queries (heads, n, width) read, and logarithms of the normalizers, (heads, n, 1)."""
    weights = queries @ keys.transpose(1, 2)
    largest = weights.amax(-1, keepdim=True)
    total = weights.sub_(largest).exp_().sum(-1, keepdim=True)
    return (weights @ values).div_(total), total.log().add_(largest)


def _layer(bst: BST, attended: Tensor) -> Tensor:
    """What follows the attention and its residual connection, of (..., dim)."""
    s = bst.attention_norm(attended)
    wide = F.leaky_relu_(bst.widen(s))
    return bst.norm(s.add_(bst.narrow(wide)))


@dataclass(frozen=True)
class _Folded:
    """What follows the attention, up to the scale and the shift at its end, as few products.

    Args:
        center: (dim, dim), which subtracts from a column its mean.
        out: (dim, dim), the output layer of the attention, centered.
        widen: (wide, dim + 1) of a normalized column over a one.
        narrow: (dim, wide + dim + 1) of the hidden units over that: the residual connection and the network.
        eps: of both normalizations.
    """

    center: Tensor
    out: Tensor
    widen: Tensor
    narrow: Tensor
    eps: tuple[float, float]

    @classmethod
    def of(cls, bst: BST) -> "_Folded":
        """The layer of a model."""
        first, dim = bst.attention_norm, len(bst.norm.weight)
        center = torch.eye(dim) - 1 / dim
        widen = [bst.widen.weight * first.weight, bst.widen(first.bias)[:, None]]
        residual = [torch.diag(first.weight), (first.bias + bst.narrow.bias)[:, None]]
        narrow = center @ torch.cat([bst.narrow.weight, *residual], dim=1)
        eps = first.eps, bst.norm.eps
        return cls(center, center @ bst.out.weight, torch.cat(widen, dim=1), narrow, eps)

    def __call__(self, change: Tensor, alone: Tensor, stacked: Tensor) -> Tensor:
        """The layer's normalized outputs, (dim, num_candidates * num_behaviors).

        Args:
            change: by what each target changes what each behavior reads, of that shape; it is overwritten.
            alone: (dim, num_behaviors) what the layer adds that to.
            stacked: (wide + dim + 1, num_candidates * num_behaviors), which is overwritten too.
        """
        wide, dim = len(self.widen), len(change)
        hidden, inputs = stacked[:wide], stacked[wide:]
        inputs[dim] = 1  # what the biases are multiplied by
        attended = torch.mm(self.out, change, out=inputs[:dim])
        attended.view(dim, -1, alone.shape[1]).add_(alone[:, None])
        _divide_by_deviation(attended, change, self.eps[0])
        F.leaky_relu_(torch.mm(self.widen, inputs, out=hidden))
        outputs = torch.mm(self.narrow, stacked, out=change)
        return _divide_by_deviation(outputs, stacked[:dim], self.eps[1])


def _divide_by_deviation(columns: Tensor, squares: Tensor, eps: float) -> Tensor:
    """Normalize centered columns in place; `squares`, of the same shape, is overwritten."""
    torch.mul(columns, columns, out=squares)
    return columns.mul_(squares.mean(0).add_(eps).rsqrt_())
