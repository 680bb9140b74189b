"""What a tower costs: its parameters, and the floating-point operations of a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Of one call of a module."""

    parameters: int
    """Parameters of the module."""
    gflops: float
    """Floating-point operations, a multiply and an add counting as two, in thousands of millions."""


@torch.no_grad()
def tower_cost(module: nn.Module, call: Callable[[], Any]) -> Cost:
    """Count what a call of a module does.

    Attention is computed by its formula meanwhile: the counter does not see into fused kernels. Only matrix
    products and convolutions are counted, which is nearly all.

    Args:
        module: on any device. Built under `FakeTensorMode` or, of timm, on the meta device it takes no memory
            and nothing is computed; models of transformers ask for values, which a meta tensor has not.
        call: calls the module once.
    """
    was_training = module.training
    module.eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    module.train(was_training)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(parameters, counter.get_total_flops() / 1e9)
