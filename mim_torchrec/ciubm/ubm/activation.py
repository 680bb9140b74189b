"""Activations of DIN's attention unit: PReLU, and Dice (Zhou et al., KDD 2018, section 5.3)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.training.batch_norm import GlobalBatchNorm1d

Activation = Literal["prelu", "dice"]


class _PReLUOnCPU(torch.autograd.Function):
    """PReLU with one slope; torch's own CPU kernel takes three times as long, forward and backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.leaky_relu(x, slope.item())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        grad_x = torch.ops.aten.leaky_relu_backward(grad, x, slope.item(), False)
        grad_slope = torch.dot(grad.reshape(-1), x.clamp(max=0).reshape(-1))
        return grad_x, grad_slope.reshape(slope.shape)


class PReLU(nn.PReLU):
    """`torch.nn.PReLU` with one slope, its CPU gradient made cheap."""

    def __init__(self) -> None:
        super().__init__(num_parameters=1)

    def forward(self, x: Tensor) -> Tensor:
        """Activate a tensor of any shape."""
        return F.prelu(x, self.weight) if x.is_cuda else _PReLUOnCPU.apply(x, self.weight)


class Dice(nn.Module):
    r"""Data adaptive activation of DIN, $p(s) s + (1 - p(s)) a s$.

    $p(s)$ is a sigmoid of $s$ normalized by its mean and variance over the batch (of all ranks), and $a$
    is learned for each of `dim` channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.normalize = GlobalBatchNorm1d(dim, affine=False)
        self.slope = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Activate (n, dim)."""
        gate = torch.sigmoid(self.normalize(x))
        return x * (gate + (1 - gate) * self.slope)


def build_activation(name: Activation, dim: int) -> nn.Module:
    """The activation called `name` for `dim` channels."""
    if name == "prelu":
        return PReLU()
    if name == "dice":
        return Dice(dim)
    raise ValueError(f"activation is 'prelu' or 'dice', not {name!r}")
