"""What both towers have in common: the precision in which they compute."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from mim_torchrec.training.precision import Precision


class Tower(nn.Module):
    """A foundation model as a feature extractor.

    Attributes:
        precision: in which its layers compute, by `torch.autocast`; no part of its configuration and of its
            checkpoints. Features, weights and gradients are float32 whatever it is. `tf32` is of a process:
            see `matrix_products_in`.
    """

    precision: Precision = "fp32"

    def computing(self, device: torch.device) -> AbstractContextManager[object]:
        """Within it, layers on a device compute in the tower's precision."""
        if self.precision == "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


def compute_in(precision: Precision, *towers: Tower) -> None:
    """Set the precision in which towers compute."""
    for tower in towers:
        tower.precision = precision
