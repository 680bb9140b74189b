"""A phase of pre-training as a task of the shared loop."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from mim_torchrec.data.prefetch import prefetched
from mim_torchrec.encoders.checkpoint import Towers, save_towers
from mim_torchrec.errors import OptionError
from mim_torchrec.pretraining.config import PhaseConfig, PretrainConfig
from mim_torchrec.pretraining.objective import PretrainingObjective
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.parallel import synchronize_buffers
from mim_torchrec.training.state import TrainingState

VALIDATION, TRAINING = 0, 1


class PretrainTask:
    """What `training.loop.fit` needs to run a phase.

    Args:
        config: the stage's configuration.
        phase: the phase's own part of it.
        name: the phase.
        objective: what is trained, on the rank's device.
        towers: saved as a whole, whichever is trained.
        train: item rows to train on.
        held_out: item rows to validate on.
        item_ids: (num_items,) ids by row.
        context: the process group.
        ahead: batches that a thread makes ahead, see `PixelInputs`.

    Raises:
        OptionError: the batch does not divide by the ranks, or there are fewer items than a batch has.
    """

    def __init__(
        self,
        config: PretrainConfig,
        phase: PhaseConfig,
        name: str,
        objective: PretrainingObjective,
        towers: Towers,
        train: np.ndarray,
        held_out: np.ndarray,
        item_ids: np.ndarray,
        context: DistributedContext,
        ahead: int,
    ) -> None:
        size = phase.items_per_step(context.world_size)
        if size % context.world_size:
            raise OptionError(f"--{name}.batch-size {size} is not a multiple of {context.world_size} ranks")
        if len(train) < size:
            flag = "batch-size" if phase.batch_size_per_rank is None else "batch-size-per-rank"
            value = phase.batch_size if phase.batch_size_per_rank is None else phase.batch_size_per_rank
            few = f"a step takes {size} items, and there are {len(train)} to train on"
            raise OptionError(f"--{name}.{flag} {value}: {few}; lower it")
        self._config, self._batch_size, self._objective = config, size, objective
        self._towers, self._context = towers, context
        self._train, self._item_ids, self._ahead = train, item_ids, ahead
        self._rows = train[:0]  # of this rank in the batch that was yielded last
        # every rank validates on as many items: what is left over, fewer than there are ranks, is not used
        self._held_out = held_out[: len(held_out) // context.world_size * context.world_size]
        self.model: nn.Module = objective
        if context.world_size > 1:
            # timm's towers may hold layers after the feature map that is reconstructed from
            unused = name == "dda-vision"
            self.model = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=unused)
        self.optimizer = make_optimizer(objective, phase, config.weight_decay, context.device)
        steps = self.num_batches(0) * phase.epochs
        schedule = get_cosine_schedule_with_warmup(self.optimizer, math.ceil(config.warmup * steps), steps)
        self.optimizer.register_step_post_hook(lambda *_: schedule.step())
        self.state = TrainingState(self.model, self.optimizer, schedule)

    def num_batches(self, epoch: int) -> int:
        """Whole batches of an epoch; the rest of the items waits for the next order."""
        return len(self._train) // self._batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """This rank's part of every batch from `first` on, in an order of (seed, epoch)."""
        order = np.random.default_rng((self._config.seed, epoch)).permutation(self._train)

        def made() -> Iterator[tuple[np.ndarray, Any]]:
            for step in range(first, self.num_batches(epoch)):
                rows = order[step * self._batch_size : (step + 1) * self._batch_size]
                yield self._mine(rows), self._batch(rows, (self._config.seed, TRAINING, epoch, step))

        for mine, batch in prefetched(made(), self._ahead):
            self._rows = mine
            yield batch

    def num_samples(self, batch: Any) -> int:
        """Items of this rank in a batch."""
        return self._batch_size // self._context.world_size

    def batch_ids(self, batch: Any) -> dict[str, list[int]]:
        """Item ids of this rank's batch, the last that `batches` has yielded."""
        return {"item_ids": self._item_ids[self._rows].tolist()}

    def training_forward(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The phase's loss of a batch."""
        return self.model(batch)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """`validate`, and `score` for the loop, which looks for the highest: minus the loss."""
        metrics = self.validate()
        return metrics | ({"score": -metrics["validation_loss"]} if metrics else {})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics of the held-out items, in batches of nearly the size of those in training.

        Masks are the same whenever it is called.

        Returns:
            `validation_loss` and what the objective knows besides; {} if nothing is held out.

        Raises:
            OptionError: held-out titles have no words, so that there is no loss.
        """
        if not len(self._held_out):
            return {}
        synchronize_buffers(self._objective)
        self._objective.eval()
        # in columns of one item a rank, so that every part has as many items on every rank
        columns = self._held_out.reshape(-1, self._context.world_size)
        parts = max(1, round(len(self._held_out) / self._batch_size))
        sums = torch.zeros(3, dtype=torch.float64)
        for part, rows in enumerate(np.array_split(columns, parts)):
            batch = self._batch(rows.ravel(), (self._config.seed, VALIDATION, part))
            sums += self._objective.sums(batch).double().cpu()
        sums = torch.stack(self._context.all_gather_objects(sums)).sum(0)
        if not sums[2]:
            raise OptionError("there is nothing to predict in the held-out items: have their titles words?")
        found = self._objective.metrics(sums)
        return {f"validation_{name}": float(value) for name, value in found.items()}

    def save(self, path: Path) -> None:
        """Write both towers."""
        if self._context.is_main:
            save_towers(*self._towers, path)

    def _batch(self, rows: np.ndarray, key: tuple[int, ...]) -> Any:
        """This rank's part of a batch of all ranks."""
        return self._objective.batch(self._mine(rows), (*key, self._context.rank))

    def _mine(self, rows: np.ndarray) -> np.ndarray:
        count = len(rows) // self._context.world_size
        return rows[self._context.rank * count : (self._context.rank + 1) * count]


def make_optimizer(
    objective: PretrainingObjective, phase: PhaseConfig, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW: decay on matrices only, a learning rate of its own for what stands on the towers; one kernel on
    a GPU."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():  # the towers come first, with what heads share
        if parameter.requires_grad:
            tower = name.startswith(("vision.", "text."))
            groups.setdefault((tower, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW([
        {"params": parameters, "lr": phase.lr if tower else phase.head_lr,
         "weight_decay": weight_decay if matrix else 0.0}
        for (tower, matrix), parameters in groups.items()
    ], fused=device.type == "cuda" or None)  # fmt: skip
