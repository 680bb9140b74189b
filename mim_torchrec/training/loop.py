"""The one training loop: a stage gives it a task, it gives back the history and the best epoch's weights.

It logs (TensorBoard, tqdm), stops at a loss that is not finite, chooses the best epoch and stops early. It
leaves to the task what a batch is, how the loss is computed, what validation means and what is saved.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mim_torchrec.training.checkpoint import write_json
from mim_torchrec.training.distributed import Ranks

log = logging.getLogger(__name__)


class Optimizer(Protocol):
    """What torch's and torchrec's optimizers have in common."""

    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...


class Task(Protocol):
    """What a stage trains. Every rank calls every method, with the same arguments."""

    model: nn.Module
    optimizer: Optimizer

    def batches(self, epoch: int) -> Iterable[Any]:
        """This rank's batches of an epoch, as many as `num_batches` says."""

    def num_batches(self, epoch: int) -> int:
        """Steps of an epoch, the same on every rank."""

    def training_forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, whose mean over ranks is that of the whole batch, and scalars to log."""

    def num_samples(self, batch: Any) -> int:
        """Samples in this rank's batch."""

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Validation metrics, {} if there are none."""

    def save(self, path: Path) -> None:
        """Write what the stage needs of the model to a directory, in the place of what is there."""


@dataclass
class History:
    """What happened in training; `history.json` holds the same.

    Args:
        steps: of every step `step` (from 1), `epoch` (from 0) and `loss` (mean over ranks); every few steps
            also `samples_per_s` (of all ranks), `data_wait` (share of time spent waiting for batches) and
            what the task reports.
        epochs: of every epoch `epoch`, `loss` (mean over steps), `seconds` and the validation metrics.
        best_epoch: whose weights are in `best`.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None


def fit(
    task: Task,
    *,
    epochs: int,
    out: Path,
    ranks: Ranks,
    select: str | None,
    patience: int | None,
    log_every: int = 20,
) -> History:
    """Train a task.

    Args:
        task: what to train.
        epochs: passes over the training data, at least 1.
        out: gets history.json, TensorBoard's event files in `tensorboard/` and the best weights in `best/`.
        ranks: the process group; every rank calls `fit`.
        select: validation metric to maximize; the first epoch with the highest is the best. None: the last
            epoch is the best.
        patience: stop after this many epochs that were no better than the best before them.
        log_every: steps between two entries of the log.

    Returns:
        The history, the same on every rank.

    Raises:
        FloatingPointError: a loss is not finite; it names epoch and step. No step is taken on it.
        ValueError: no epochs, no batches, or an epoch without a finite value of the metric `select`.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: nothing to train")
    out.mkdir(parents=True, exist_ok=True)
    history = History()
    writer = SummaryWriter(str(out / "tensorboard")) if ranks.is_main else None
    try:
        for epoch in range(epochs):
            started = time.perf_counter()
            first = len(history.steps)
            task.model.train()
            _train_epoch(task, epoch, history, ranks, writer, log_every)
            losses = [entry["loss"] for entry in history.steps[first:]]
            entry = {"epoch": epoch, "loss": sum(losses) / len(losses)}
            entry |= ranks.all_gather_objects(task.after_epoch(epoch))[0]  # all ranks decide alike
            entry["seconds"] = time.perf_counter() - started
            if _is_better(entry, history, select):
                history.best_epoch = epoch
                task.save(out / "best")
            history.epochs.append(entry)
            if writer is not None:
                _log_epoch(entry, writer, len(history.steps))
                write_json(out / "history.json", asdict(history))
            ranks.barrier()
            if patience is not None and epoch - history.best_epoch >= patience:
                log.info("no better %s for %d epochs: stopped after epoch %d", select, patience, epoch)
                break
    finally:
        if writer is not None:
            writer.close()
    return history


def _train_epoch(
    task: Task, epoch: int, history: History, ranks: Ranks, writer: SummaryWriter | None, log_every: int
) -> None:
    total = task.num_batches(epoch)
    if total < 1:
        raise ValueError(f"epoch {epoch} has no batches: the data is smaller than one batch on every rank")
    samples, waited, since = 0, 0.0, time.perf_counter()
    bar = tqdm(total=total, desc=f"epoch {epoch}", unit="step", mininterval=1, disable=not ranks.is_main)
    with bar as progress:
        for batch, seconds in _timed(task.batches(epoch)):
            waited += seconds
            step = len(history.steps) + 1
            loss, report = task.training_forward(batch)
            value = _mean_over_ranks(loss, ranks)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} in epoch {epoch} at step {step}; try a lower learning rate, and "
                    "check the input for values that are not finite"
                )
            task.optimizer.zero_grad()
            loss.backward()
            task.optimizer.step()
            samples += task.num_samples(batch)
            entry = {"step": step, "epoch": epoch, "loss": value}
            if step % log_every == 0 or step == 1:
                elapsed = time.perf_counter() - since
                entry["samples_per_s"] = samples * ranks.world_size / elapsed
                entry["data_wait"] = waited / elapsed
                entry |= {name: float(scalar.detach()) for name, scalar in report.items()}
                samples, waited, since = 0, 0.0, time.perf_counter()
                if writer is not None:
                    for name in entry.keys() - {"step"}:
                        writer.add_scalar(f"train/{name}", entry[name], step)
                progress.set_postfix(loss=f"{value:.4f}", refresh=False)
            history.steps.append(entry)
            progress.update()


def _timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Batches, and the seconds each was waited for."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started


def _mean_over_ranks(loss: Tensor, ranks: Ranks) -> float:
    value = loss.detach().double().clone()
    if ranks.world_size > 1:
        dist.all_reduce(value)
    return float(value) / ranks.world_size


def _is_better(entry: dict[str, float], history: History, select: str | None) -> bool:
    if select is None:
        return True
    if not math.isfinite(entry.get(select, math.nan)):
        known = ", ".join(f"{name} {value}" for name, value in entry.items())
        raise ValueError(f"epoch {entry['epoch']} has no finite {select} to select by; it has {known}")
    if history.best_epoch is None:
        return True
    return entry[select] > history.epochs[history.best_epoch][select]


def _log_epoch(entry: dict[str, float], writer: SummaryWriter, step: int) -> None:
    for name in entry.keys() - {"epoch"}:
        writer.add_scalar(f"epoch/{name}", entry[name], step)
    facts = ", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name != "epoch")
    log.info("epoch %d: %s", entry["epoch"], facts)
