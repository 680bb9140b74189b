"""Activations of DIN's attention unit: PReLU, and Dice (Zhou et al., KDD 2018, section 5.3).

An attention unit runs on every (candidate, behavior) pair, tens of thousands a step. On a CPU most of its
time goes into writing and reading intermediate results of that size, so these run in blocks of rows that stay
in the cache, recompute them in the backward pass, and can end in the unit's last layer, which has one output.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mim_torchrec.errors import OptionError
from mim_torchrec.training.batch_norm import GlobalBatchNorm1d

Activation = Literal["prelu", "dice"]

BLOCK_ELEMENTS = 1 << 17


def blocks(x: Tensor) -> Iterator[slice]:
    """Rows of (n, dim) in blocks that fit into the cache of a CPU; all at once on another device."""
    rows = max(1, BLOCK_ELEMENTS // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return (slice(start, start + rows) for start in range(0, x.shape[0], rows))


class PReLU(nn.PReLU):
    """`torch.nn.PReLU` with one slope, made cheap on a CPU."""

    def __init__(self) -> None:
        super().__init__(num_parameters=1)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Activate (n, dim); with a weight (dim,) give the inner product of each row with it, (n,)."""
        if x.is_cuda:
            active = F.prelu(x, self.weight)
            return active if weight is None else active @ weight
        return _PReLUOnCPU.apply(x, self.weight, weight)


class Dice(nn.Module):
    r"""Data adaptive activation of DIN, $p(s) s + (1 - p(s)) a s$.

    $p(s)$ is a sigmoid of $s$ normalized by its mean and variance over the batch (of all ranks), and $a$
    is learned for each of `dim` channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.normalize = GlobalBatchNorm1d(dim, affine=False)
        self.slope = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Activate (n, dim); with a weight (dim,) give the inner product of each row with it, (n,)."""
        norm = self.normalize
        mean, variance = norm.running_mean, norm.running_var
        count: Tensor | None = None
        if self.training:
            with torch.no_grad():
                mean, variance, count = _statistics(x, norm)
        return _Dice.apply(x, self.slope, weight, mean, torch.rsqrt(variance + norm.eps), count)


def build_activation(name: Activation, dim: int) -> nn.Module:
    """The activation called `name` for `dim` channels."""
    if name == "prelu":
        return PReLU()
    if name == "dice":
        return Dice(dim)
    raise OptionError(f"activation is 'prelu' or 'dice', not {name!r}")


def _all_reduce(x: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _statistics(x: Tensor, norm: GlobalBatchNorm1d) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, variance and number of the rows of all ranks; updates the running statistics.

    Fewer than two rows have no variance: then these are the running statistics, and there is no number.
    """
    totals = _all_reduce(torch.cat([x.sum(0), x.new_full((1,), x.shape[0])]))
    count = totals[-1]
    if x.shape[0] < 2 and count < 2:  # where this rank has two, there is no need to look
        return norm.running_mean, norm.running_var, None
    mean = totals[:-1] / count
    squares = torch.zeros_like(mean)
    for rows in blocks(x):
        squares += (x[rows] - mean).square_().sum(0)
    squares = _all_reduce(squares)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(squares / (count - 1), norm.momentum)
    return mean, squares / count, count


class _PReLUOnCPU(torch.autograd.Function):
    """PReLU with one slope; torch's own CPU kernel takes three times as long, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, slope, weight)
        if weight is None:
            return F.leaky_relu(x, slope.item())
        out = x.new_empty(x.shape[0])
        for rows in blocks(x):
            torch.mv(F.leaky_relu(x[rows], slope.item()), weight, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, slope, weight = ctx.saved_tensors
        grad_x, grad_slope = torch.empty_like(x), torch.zeros_like(slope)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        for rows in blocks(x):
            grad_active = grad[rows]
            if grad_weight is not None:
                grad_weight += F.leaky_relu(x[rows], slope.item()).t().mv(grad_active)
                grad_active = grad_active[:, None] * weight
            leaky = torch.ops.aten.leaky_relu_backward.grad_input
            leaky(grad_active, x[rows], slope.item(), False, grad_input=grad_x[rows])
            grad_slope += torch.dot(grad_active.reshape(-1), x[rows].clamp(max=0).reshape(-1))
        return grad_x, grad_slope, grad_weight


class _Dice(torch.autograd.Function):
    """Dice by given statistics; `count` is the number of rows they are of, None where they are constants.

    Its gradient is that of batch normalization too, so the statistics need none of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slope: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
        count: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, slope, weight, mean, inverse_std)
        ctx.count = count
        out = torch.empty_like(x) if weight is None else x.new_empty(x.shape[0])
        for rows in blocks(x):
            factor = ((x[rows] - mean) * inverse_std).sigmoid_().mul_(1 - slope).add_(slope)
            if weight is None:
                torch.mul(x[rows], factor, out=out[rows])
            else:
                torch.mv(factor.mul_(x[rows]), weight, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, slope, weight, mean, inverse_std = ctx.saved_tensors
        grad_x, grad_slope = torch.empty_like(x), torch.zeros_like(slope)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        sums = x.new_zeros(2, x.shape[1])  # of the gradients of normalized rows, and of their products
        for rows in blocks(x):
            s, grad_active = x[rows], grad[rows]
            normalized = (s - mean).mul_(inverse_std)
            gate = normalized.sigmoid()
            factor = (gate * (1 - slope)).add_(slope)
            if grad_weight is not None:
                grad_weight += (s * factor).t().mv(grad_active)
                grad_active = grad_active[:, None] * weight
            torch.mul(grad_active, factor, out=grad_x[rows])
            product = grad_active * s
            grad_gate = product * gate
            grad_slope += product.sum(0) - grad_gate.sum(0)
            grad_normalized = grad_gate.mul_(1 - gate).mul_(1 - slope)
            sums[0] += grad_normalized.sum(0)
            sums[1] += normalized.mul_(grad_normalized).sum(0)
            grad_x[rows].addcmul_(grad_normalized, inverse_std)
        if ctx.count is not None:
            first, second = _all_reduce(sums) * (inverse_std / ctx.count)
            for rows in blocks(x):
                normalized = (x[rows] - mean).mul_(inverse_std)
                grad_x[rows] -= normalized.mul_(second).add_(first)
        return grad_x, grad_slope, grad_weight, None, None, None
