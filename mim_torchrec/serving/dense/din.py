r"""DIN's interest of one request as products of matrices.

The first layer of the attention unit is linear in the behavior: for a candidate $q$ it is

    (W_s - W_d + W_p \mathrm{diag}(q)) s + ((W_q + W_d) q + b),

a matrix of its own. The matrices of some candidates, one below the other, times all behaviors give their
hidden units as rows of behaviors, (candidates, hidden, behaviors). They stay in the cache until the unit's
last layer has made one number of each pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.ubm.activation import Dice, PReLU
from mim_torchrec.ciubm.ubm.din import DIN
from mim_torchrec.ciubm.ubm.interface import BehaviorContext
from mim_torchrec.serving.dense.blocks import blocks_of


def din_interest(
    din: DIN, candidates: Tensor, behaviors: Tensor, context: BehaviorContext | None
) -> Tensor | None:
    """DIN's interest, (num_candidates, dim)."""
    dim, hidden = behaviors.shape[1], din.first.out_features
    w_candidate, w_behavior, w_difference, w_product = din.first.weight.chunk(4, dim=1)
    constant = F.linear(candidates, w_candidate + w_difference, din.first.bias)
    of_all = w_behavior - w_difference
    columns = torch.cat([behaviors.T, behaviors.new_ones(1, len(behaviors))])  # the last one for the constant
    out = torch.zeros_like(candidates)
    for rows in blocks_of(len(candidates), hidden * len(behaviors)):
        own = candidates[rows]
        matrices = candidates.new_empty(len(own), hidden, dim + 1)
        torch.addcmul(of_all, w_product, own[:, None], out=matrices[:, :, :dim])
        matrices[:, :, dim] = constant[rows]
        units = (matrices.view(-1, dim + 1) @ columns).view(len(own), hidden, -1)
        for layer in din.middle:
            units = _linear(layer, units) if isinstance(layer, nn.Linear) else _active(layer, units)
        scores = _linear(din.last, _active(din.activation, units)).squeeze(1)
        torch.mm(scores.softmax(1) if din.softmax else scores, behaviors, out=out[rows])
    return out


def _linear(layer: nn.Linear, units: Tensor) -> Tensor:
    """A layer on units (candidates, channels, behaviors): `matmul` would transpose, and copy, all of them."""
    return torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(units), -1, -1), units)


def _active(activation: nn.Module, units: Tensor) -> Tensor:
    """An activation of units (candidates, channels, behaviors), which it may overwrite."""
    if isinstance(activation, PReLU):
        return F.leaky_relu_(units, activation.weight.item())
    assert isinstance(activation, Dice)
    norm, slope = activation.normalize, activation.slope[:, None]
    scale = torch.rsqrt(norm.running_var + norm.eps)[:, None]
    gate = (units - norm.running_mean[:, None]).mul_(scale).sigmoid_()
    return units.mul_(gate.mul_(1 - slope).add_(slope))
