"""Matrix products in lower precision, for tensor cores of GPUs; weights, gradients and sums stay float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.errors import OptionError

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def matrix_products_in(
    precision: Precision, device: torch.device, *, training: bool = True
) -> Iterator[None]:
    """Let GPUs compute float32 products in TF32 where that is asked for, as long as this lasts.

    Args:
        precision: `tf32`, or another, which changes nothing here.
        device: on which they are computed.
        training: TF32 must be there. Otherwise a CPU computes in float32.

    Raises:
        OptionError: TF32 on a CPU, in training.
    """
    if precision == "tf32" and device.type != "cuda" and training:
        raise OptionError("--precision tf32 is of GPUs; a CPU computes in fp32 or bf16")
    if precision != "tf32" or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class BFloat16Linear(nn.Linear):
    """A linear layer that multiplies in bfloat16; its weights, its gradients and its results are float32."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "BFloat16Linear":
        """The same layer, with the same parameters."""
        size = linear.in_features, linear.out_features
        layer = cls(*size, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_features) to (n, out_features) float32."""
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(x.bfloat16(), self.weight.bfloat16(), bias).float()


def linear_layers_in_bfloat16(module: nn.Module) -> None:
    """Replace the linear layers inside a module, whose parameters keep their names.

    What computes with the weights of such a layer by itself keeps its float32 products.
    """
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, BFloat16Linear.of(child))
        else:
            linear_layers_in_bfloat16(child)
