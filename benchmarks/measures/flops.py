"""Floating-point operations of a training step, where torch's counter leaves some out and overdoes others.

Attention on packed pairs is a sampled dense product and weighted bags (`mim_torchrec.ciubm.packed`);
`FlopCounterMode` knows neither. The weight gradient of a grouped convolution it counts `groups` times. Fused
attention on a CPU it does not know, so attention is computed by its formula meanwhile. Lookups, unweighted
sums and elementwise operations count nothing; `lookups` counts the bytes of lookups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

aten = torch.ops.aten


def _sampled(structure: Tensor, rows: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * structure._nnz() * rows.shape[1]


def _weighted_bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> int:
    return 0 if per_sample_weights is None else 2 * indices.numel() * weight.shape[1]


_formula: Any  # a type checker knows no attributes of functions
for _formula in (_sampled, _weighted_bags):
    _formula._get_raw = True  # tensors, not their shapes: the number of pairs is not a size of an argument


def _convolution_backward(
    gradient: list[int],
    inputs: list[int],
    weight: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: list[bool],
    **__: Any,
) -> int:
    """Each of the two gradients has the products of the forward pass, once for each channel of a group."""
    return conv_flop_count(inputs, weight, gradient, transposed) * sum(output_mask[:2])


FORMULAS = {
    aten.convolution_backward: _convolution_backward,
    aten.sparse_sampled_addmm: _sampled,
    aten._embedding_bag: _weighted_bags,
    aten._embedding_bag_forward_only: _weighted_bags,
}


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of a call, a multiply and an add counting as two."""
    math = sdpa_kernel(SDPBackend.MATH)
    with math, FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Cost:
    """Of one call of a module."""

    parameters: int
    """Parameters of the module."""
    gflops: float
    """Floating-point operations, a multiply and an add counting as two, in thousands of millions."""


@torch.no_grad()
def tower_cost(module: nn.Module, call: Callable[[], Any]) -> Cost:
    """Count the parameters of a module and the operations of its forward pass.

    Args:
        module: on any device. Built under `FakeTensorMode` or, of timm, on the meta device it takes no memory
            and nothing is computed; models of transformers ask for values, which a meta tensor has not.
        call: calls the module once.
    """
    was_training = module.training
    module.eval()
    operations = count_flops(call)
    module.train(was_training)
    return Cost(sum(parameter.numel() for parameter in module.parameters()), operations / 1e9)
