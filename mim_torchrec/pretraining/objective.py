"""What the phases of pre-training have in common: batches of items, and sums that ranks can add up.

Every loss is a sum over something counted (masked pixels, masked tokens, items), so that ranks with unequal
counts together have the loss and, by DDP's mean of gradients, the gradient of one process that sees all.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class PretrainingObjective(nn.Module, ABC):
    """The trained part of a phase and its loss in one module, so that DDP averages every gradient.

    Args:
        fix_batch_norm: normalize by the stored statistics, in training as well.

    Submodules named `vision` and `text` are towers, every other one stands on them.
    """

    def __init__(self, fix_batch_norm: bool) -> None:
        super().__init__()
        self._fix_batch_norm = fix_batch_norm

    @abstractmethod
    def batch(self, rows: np.ndarray, key: Sequence[int]) -> Any:
        """A batch of items.

        Args:
            rows: (n,) item rows.
            key: what is drawn (masks) depends on these numbers alone, so that a run can be resumed.
        """

    @abstractmethod
    def sums(self, batch: Any) -> Tensor:
        """(3,): the sum of losses, a second sum that `metrics` knows, and the count of what was summed."""

    @abstractmethod
    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """Means from (3,) sums: `loss` and one that is better when higher."""

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, whose mean over ranks is that of all ranks' batches, and scalars about it.

        A batch with nothing to count (titles without words) has the loss 0.
        """
        sums = self.sums(batch)
        total, world_size = sums.detach()[2].clone(), 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            world_size = dist.get_world_size()
            dist.all_reduce(total)
        report = {name: value for name, value in self.metrics(sums.detach()).items() if name != "loss"}
        return sums[0] * world_size / total.clamp(min=1), report

    def train(self, mode: bool = True) -> "PretrainingObjective":
        """Set the mode, which fixed batch normalization does not follow."""
        super().train(mode)
        if self._fix_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def generator(key: Sequence[int]) -> torch.Generator:
    """A generator whose draws depend on these non-negative numbers alone."""
    return torch.Generator().manual_seed(seed_of(key))


def seed_of(key: Sequence[int]) -> int:
    """One seed of several non-negative numbers.

    >>> seed_of((1, 2)) == seed_of((1, 2)), seed_of((1, 2)) == seed_of((2, 1))
    (True, False)
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])
