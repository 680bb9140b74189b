"""Towers whose batch normalizations are part of the linear layers around them.

In evaluation a batch normalization is a scale and a shift of each channel, both constants. They go into the
layer before it, or, at the entry of the tower, into the one after it.
"""

import torch
from torch import Tensor, nn

from mim_torchrec.ctr.dense import DeepCTR
from mim_torchrec.training.batch_norm import GlobalBatchNorm1d, PartialBatchNorm1d, ScaledBatchNorm1d


@torch.no_grad()
def fold_batch_norms(tower: DeepCTR) -> nn.Module:
    """The same function in evaluation, without batch normalization and dropout.

    Args:
        tower: trained; it is left as it is.
    """
    folded: list[nn.Module] = []
    entry: tuple[Tensor, Tensor] | None = None
    for layer in tower.layers:
        if isinstance(layer, nn.Linear):
            made = nn.Linear(layer.in_features, layer.out_features)
            weight = layer.weight.double()
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
            if entry is not None:
                scale, shift = entry
                weight, bias, entry = weight * scale, bias + weight @ shift, None
            made.weight.copy_(weight)
            made.bias.copy_(bias)
            folded.append(made)
        elif isinstance(layer, GlobalBatchNorm1d):
            scale, shift = _constants(layer)
            last = folded[-1] if folded else None
            if isinstance(last, nn.Linear):
                last.weight.copy_(last.weight.double() * scale[:, None])
                last.bias.copy_(last.bias.double() * scale + shift)
            else:
                entry = scale, shift
        elif not isinstance(layer, nn.Dropout):
            folded.append(layer)
    return nn.Sequential(*folded, nn.Flatten(0)).eval()


def _constants(norm: GlobalBatchNorm1d) -> tuple[Tensor, Tensor]:
    """What a normalization multiplies each channel by and then adds, float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if isinstance(norm, PartialBatchNorm1d):
        scale, shift = torch.where(norm.normalized, scale, 1), torch.where(norm.normalized, shift, 0)
    if isinstance(norm, ScaledBatchNorm1d):
        scale, shift = (constant * norm.scale.double() for constant in (scale, shift))
    return scale, shift if norm.bias is None else shift + norm.bias.double()
