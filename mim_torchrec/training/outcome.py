"""What all ranks learn of a training step: its loss, and whether one of them is to stop or to save."""

import torch
import torch.distributed as dist
from torch import Tensor

from mim_torchrec.training.distributed import DistributedContext


class StepOutcome:
    """Mean loss of a step, and whether any rank is to stop or to save: all learn it in the same step.

    On a GPU it is on its way to the host while the backward pass is launched.

    Args:
        loss: of this rank, a scalar.
        stop: whether this rank is to stop.
        overdue: whether it is to save.
        context: the process group; every rank makes one in the same step.
    """

    SAVE = 1 << 20
    """More than ranks: one number says how many are to stop, and how many are to save."""

    def __init__(self, loss: Tensor, stop: bool, overdue: bool, context: DistributedContext) -> None:
        self._world_size = context.world_size
        numbers = loss.detach().reshape(1)
        self._flags = float(stop + self.SAVE * overdue)
        if self._world_size > 1:
            numbers = loss.new_full((2,), self._flags, dtype=torch.float64)
            numbers[:1].copy_(loss.detach())
            dist.all_reduce(numbers)
        self._numbers, self._copied = numbers, None
        if loss.is_cuda:
            self._numbers = numbers.to("cpu", non_blocking=True)  # into page-locked memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[float, bool, bool]:
        """Loss, whether to stop, whether to save; a GPU is waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, flags = [*self._numbers.tolist(), self._flags][:2]
        return loss / self._world_size, flags % self.SAVE > 0, flags >= self.SAVE
