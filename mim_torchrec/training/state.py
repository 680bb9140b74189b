"""What checkpoints hold of a model that is trained by an optimizer of PyTorch and a schedule."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mim_torchrec.training.checkpoints import ResumeError
from mim_torchrec.training.parallel import synchronize_buffers

EXTRA = "_extra_state"


class TrainingState:
    """State of a model, plain or wrapped by DDP or FSDP2, its optimizer and its schedule.

    Extra state of modules is a rank's own: queues of negatives differ from rank to rank.

    Args:
        model: the model.
        optimizer: of its parameters.
        schedule: of the learning rate, stepped by the optimizer's hook.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self._model, self._optimizer, self._schedule = model, optimizer, schedule

    def shared(self) -> dict[str, Any]:
        """Parameters, buffers (those of rank 0, on every rank) and the optimizer's state."""
        synchronize_buffers(self._model)
        _complete(self._optimizer)
        model = get_model_state_dict(self._model)
        return {
            "model": {name: value for name, value in model.items() if not name.endswith(EXTRA)},
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer),
        }

    def load_shared(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint filled."""
        extra = self._extra()
        set_model_state_dict(self._model, state["model"] | extra)
        set_optimizer_state_dict(self._model, self._optimizer, state["optimizer"])

    def local(self) -> dict[str, Any]:
        """Extra state of modules, and the schedule."""
        return {"extra": self._extra(), "schedule": self._schedule.state_dict()}

    def load_local(self, state: dict[str, Any]) -> None:
        """Take what `local` gave."""
        model = get_model_state_dict(self._model)
        set_model_state_dict(self._model, model | state["extra"])
        self._schedule.load_state_dict(state["schedule"])

    def reshard(self, epoch: int, step: int, world_size: int) -> int:
        """Raises ResumeError: negatives and schedule depend on the number of ranks."""
        raise ResumeError("each has generators and a queue of its own")

    def _extra(self) -> dict[str, Any]:
        model = get_model_state_dict(self._model)
        return {name: value for name, value in model.items() if name.endswith(EXTRA)}


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Give the state of AdamW before its first step to parameters that no gradient has reached yet.

    Loading asks for a state of every parameter; a tower may have layers that a loss does not use.
    """
    example = next(((p, state) for p, state in optimizer.state.items() if state), None)
    if example is None:  # no step yet: PyTorch makes the state of all parameters
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    name: torch.zeros_like(parameter if value.shape == example[0].shape else value)
                    for name, value in example[1].items()
                }
