"""The one training loop: a stage gives it a task, it gives back the history and the best epoch's weights.

It logs (TensorBoard, tqdm), stops at a loss that is not finite, chooses the best epoch, stops early, leaves
checkpoints and goes on from them. It leaves to the task what a batch is, how the loss is computed, what
validation means and what is saved.
"""

import logging
import math
import resource
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mim_torchrec.errors import Diverged, OptionError
from mim_torchrec.extras import needs
from mim_torchrec.training.checkpoint import write_json
from mim_torchrec.training.checkpoints import Checkpoints, State
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.parallel import gradient_norm

with needs("train"):
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Optimizer(Protocol):
    """What torch's and torchrec's optimizers have in common."""

    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...


class Task(Protocol):
    """What a stage trains. Every rank calls every method, with the same arguments."""

    model: nn.Module
    optimizer: Optimizer
    state: State

    def batches(self, epoch: int, first: int = 0) -> Iterable[Any]:
        """This rank's batches of an epoch, as many as `num_batches` says, without those before `first`."""

    def num_batches(self, epoch: int) -> int:
        """Steps of an epoch, the same on every rank."""

    def training_forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, whose mean over ranks is that of the whole batch, and scalars to log."""

    def num_samples(self, batch: Any) -> int:
        """Samples in this rank's batch."""

    def batch_ids(self, batch: Any) -> dict[str, list[int]]:
        """What says which samples are in this rank's batch, for somebody who looks for a bad one."""

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Validation metrics, {} if there are none."""

    def save(self, path: Path) -> None:
        """Write what the stage needs of the model to a directory, in the place of what is there."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came: the run stopped after a step and left a checkpoint. The exit status is 143."""

    STATUS = 128 + signal.SIGTERM

    def __init__(self, where: Path) -> None:
        super().__init__(self.STATUS)
        self.where = where

    def __str__(self) -> str:
        return f"interrupted by a signal; the same command goes on from {self.where}"


@dataclass
class History:
    """What happened in training; `history.json` holds the same.

    Args:
        steps: of every step `step` (from 1), `epoch` (from 0) and `loss` (mean over ranks); every few steps
            also `samples_per_s` (of all ranks), `data_wait` (share of time spent waiting for batches),
            `grad_norm` (before the step), `peak_memory_gib` (of rank 0, so far) and what the task reports.
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
    context: DistributedContext,
    select: str | None,
    patience: int | None,
    log_every: int = 20,
    checkpoints: Checkpoints | None = None,
) -> History:
    """Train a task.

    Args:
        task: what to train.
        epochs: passes over the training data, at least 1.
        out: gets history.json, TensorBoard's event files in `tensorboard/` and the best weights in `best/`.
        context: the process group; every rank calls `fit`.
        select: validation metric to maximize; the first epoch with the highest is the best. None: the last
            epoch is the best.
        patience: stop after this many epochs that were no better than the best before them.
        log_every: steps between two entries of the log.
        checkpoints: where the run is taken up from, and leaves checkpoints: at the end of every epoch, as
            often as they say, and when SIGTERM or SIGINT comes. None leaves none.

    Returns:
        The history, the same on every rank.

    Raises:
        FloatingPointError: a loss is not finite; it names epoch and step. No step is taken on it, and
            `bad_batch/rank<r>.json` has the ids of the batch.
        Interrupted: SIGTERM or SIGINT came, to whichever rank; all stop after the same step. A second
            SIGINT ends the process at once.
        ResumeError: the checkpoints are of another run.
        OptionError: no epochs, no batches, or an epoch without a finite value of the metric `select`.
    """
    if epochs < 1:
        raise OptionError(f"epochs is {epochs}: nothing to train")
    out.mkdir(parents=True, exist_ok=True)
    history, epoch, first = History(), 0, 0
    found = checkpoints.restore(task.state) if checkpoints is not None else None
    if found is not None:
        epoch, first, progress = found
        history = History(**progress)
    steps = len(history.steps)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=steps + 1) if context.is_main else None
    try:
        with _signals(checkpoints is not None) as stop:
            while epoch < epochs and not _is_over(history, select, patience):
                started = time.perf_counter()
                task.model.train()
                _train_epoch(task, epoch, first, history, out, context, writer, log_every, checkpoints, stop)
                losses = [entry["loss"] for entry in history.steps if entry["epoch"] == epoch]
                entry = {"epoch": epoch, "loss": sum(losses) / len(losses)}
                entry |= context.all_gather_objects(task.after_epoch(epoch))[0]  # all ranks decide alike
                entry["seconds"] = time.perf_counter() - started
                if _is_better(entry, history, select):
                    history.best_epoch = epoch
                    task.save(out / "best")
                history.epochs.append(entry)
                if writer is not None:
                    _log_epoch(entry, writer, len(history.steps))
                    write_json(out / "history.json", asdict(history))
                context.barrier()
                epoch, first = epoch + 1, 0
                if checkpoints is not None:
                    checkpoints.save(task.state, epoch, first, asdict(history))
                    if any(context.all_gather_objects(stop.is_set)):  # in the evaluation
                        _interrupt(out, checkpoints)
            if checkpoints is not None:
                checkpoints.wait()
    finally:
        if writer is not None:
            writer.close()
    return history


def _is_over(history: History, select: str | None, patience: int | None) -> bool:
    if patience is None or history.best_epoch is None:
        return False
    over = len(history.epochs) - 1 - history.best_epoch >= patience
    if over:
        log.info("no better %s for %d epochs: stopped after epoch %d", select, patience,
                 len(history.epochs) - 1)  # fmt: skip
    return over


def _train_epoch(
    task: Task,
    epoch: int,
    first: int,
    history: History,
    out: Path,
    context: DistributedContext,
    writer: SummaryWriter | None,
    log_every: int,
    checkpoints: Checkpoints | None,
    stop: "_Flag",
) -> None:
    total = task.num_batches(epoch)
    if total < 1:
        raise OptionError(f"epoch {epoch} has no batches: the data is smaller than one batch on every rank")
    samples, waited, since = 0, 0.0, time.perf_counter()
    bar = tqdm(total=total, initial=first, desc=f"epoch {epoch}", unit="step", mininterval=1,
               disable=not context.is_main)  # fmt: skip
    with bar as progress:
        for place, (batch, seconds) in enumerate(_timed(task.batches(epoch, first)), first + 1):
            waited += seconds
            step = len(history.steps) + 1
            task.optimizer.zero_grad()  # before the forward pass, in which fused kernels take their rate
            loss, report = task.training_forward(batch)
            value, stopping = _over_ranks(loss, stop.is_set, context)
            if not math.isfinite(value):
                if checkpoints is not None:
                    checkpoints.wait()
                file = out / "bad_batch" / f"rank{context.rank}.json"
                file.parent.mkdir(exist_ok=True)
                write_json(
                    file, {"epoch": epoch, "step": step, "loss": float(loss.detach())} | task.batch_ids(batch)
                )
                raise Diverged(
                    f"the loss is {value} in epoch {epoch} at step {step}; the ids of the batch are in "
                    f"{file.parent}. Try a lower learning rate, and check the input for values that are not "
                    "finite"
                )
            loss.backward()
            is_logged = step % log_every == 0 or step == 1
            norm = float(gradient_norm(task.model)) if is_logged else math.nan
            task.optimizer.step()
            samples += task.num_samples(batch)
            entry = {"step": step, "epoch": epoch, "loss": value}
            if is_logged:
                elapsed = time.perf_counter() - since
                entry["samples_per_s"] = samples * context.world_size / elapsed
                entry["data_wait"] = waited / elapsed
                entry["grad_norm"] = norm
                entry["peak_memory_gib"] = peak_memory(context.device) / 2**30
                entry |= {name: float(scalar.detach()) for name, scalar in report.items()}
                samples, waited, since = 0, 0.0, time.perf_counter()
                if writer is not None:
                    for name in entry.keys() - {"step"}:
                        writer.add_scalar(f"train/{name}", entry[name], step)
                progress.set_postfix(loss=f"{value:.4f}", refresh=False)
            history.steps.append(entry)
            progress.update()
            if checkpoints is not None and (stopping or checkpoints.is_due(step)):
                checkpoints.save(task.state, epoch, place, asdict(history))
            if stopping:
                _interrupt(out, checkpoints)


def _interrupt(out: Path, checkpoints: Checkpoints) -> NoReturn:
    checkpoints.wait()
    interrupted = Interrupted(out / "checkpoints")
    log.warning("%s", interrupted)
    raise interrupted


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or that this process had resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Flag:
    """Whether a signal to stop came."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, number: int, _: FrameType | None) -> None:
        self.is_set = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one is meant at once


@contextmanager
def _signals(catch: bool) -> Iterator[_Flag]:
    """Remember SIGTERM and SIGINT in place of ending, where checkpoints are left and signals arrive."""
    flag = _Flag()
    if not catch or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.set) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _over_ranks(loss: Tensor, stop: bool, context: DistributedContext) -> tuple[float, bool]:
    """Mean loss, and whether any rank is to stop: all learn it in the same step."""
    both = torch.stack([loss.detach().double(), loss.new_tensor(float(stop), dtype=torch.float64)])
    if context.world_size > 1:
        dist.all_reduce(both)
    value, stopping = both.tolist()
    return value / context.world_size, stopping > 0


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
