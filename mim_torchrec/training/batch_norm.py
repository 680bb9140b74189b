"""Batch normalization whose statistics are those of the batch of all ranks.

`torch.nn.SyncBatchNorm` runs on GPUs only and `BatchNorm1d` would normalize each rank's share by itself, so
two ranks would train another model than one. Rows may be distributed unevenly, and a rank may have none.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the gradient of each rank's term is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class GlobalBatchNorm1d(nn.Module):
    """Batch normalization of (rows, num_features) over the rows of all ranks.

    Without a process group, or with one rank, it is `torch.nn.BatchNorm1d`. A batch of fewer than two rows
    over all ranks has no variance: it is normalized by the running statistics and leaves them as they are.
    Every rank must call it the same number of times.

    Args:
        num_features: size of a row.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
        affine: learn a scale and a shift.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (rows, num_features)."""
        if not self.training:
            return self._normalize_by_running(x)
        if dist.is_initialized() and dist.get_world_size() > 1:
            return self._forward_global(x)
        if x.shape[0] < 2:
            return self._normalize_by_running(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, *self._affine(), True, self.momentum, self.eps
        )

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """By what normalized features are multiplied, and what is added to them; None is nothing."""
        return self.weight, self.bias

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, *self._affine(), False, self.momentum, self.eps
        )

    def _forward_global(self, x: Tensor) -> Tensor:
        totals = _AllReduceSum.apply(torch.cat([x.sum(0), x.new_full((1,), x.shape[0])]))
        count = totals[-1].detach()
        if x.shape[0] < 2 and count < 2:  # where this rank has two, there is no need to look
            return self._normalize_by_running(x)
        mean = totals[:-1] / count
        centered = x - mean
        var = _AllReduceSum.apply(centered.square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        out = centered * torch.rsqrt(var + self.eps)
        weight, bias = self._affine()
        if weight is not None:
            out = out * weight
        return out if bias is None else out + bias


class PartialBatchNorm1d(GlobalBatchNorm1d):
    """Batch normalization of some features without a scale and a shift; the others pass as they are.

    Args:
        normalized: (num_features,) bool, which features are normalized.
    """

    normalized: Tensor

    def __init__(self, normalized: Tensor) -> None:
        super().__init__(normalized.numel(), affine=False)
        self.register_buffer("normalized", normalized, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (rows, num_features)."""
        return torch.where(self.normalized, super().forward(x), x)


class ScaledBatchNorm1d(GlobalBatchNorm1d):
    """Batch normalization whose features are then multiplied by constants, which are kept with the weights.

    Args:
        num_features: size of a row.
    """

    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)
        self.register_buffer("scale", torch.ones(num_features))

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.scale, None
