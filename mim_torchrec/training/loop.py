"""The one training loop: a stage gives it a task, it gives back the history and the best epoch's weights.

It logs (TensorBoard, progress), stops at a loss that is not finite, chooses the best epoch, stops early,
leaves checkpoints and resumes from them. It leaves to the task what a batch is, how the loss is computed,
what validation means and what is saved; where things lie is known to the run directory alone.
"""

import logging
import math
import resource
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.errors import Diverged, OptionError
from mim_torchrec.extras import needs
from mim_torchrec.program import heeded
from mim_torchrec.training.checkpoints import Checkpoints, ResumeError, State
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.history import History, HistoryFile
from mim_torchrec.training.outcome import StepOutcome
from mim_torchrec.training.parallel import clip_gradient, gradient_norm
from mim_torchrec.training.run_directory import RunDirectory

with needs("train"):
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Optimizer(Protocol):
    """What torch's and torchrec's optimizers have in common."""

    def zero_grad(self) -> None: ...
    def step(self, closure: None = None) -> Any: ...


class Task(Protocol):
    """What a stage trains. Every rank calls every method, with the same arguments."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def state(self) -> State: ...

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
        """Write what the stage needs of the model to a directory, replacing what is there."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came: the run stopped after a step and left a checkpoint. The exit status is 143."""

    STATUS = 128 + signal.SIGTERM

    def __init__(self, where: Path) -> None:
        super().__init__(self.STATUS)
        self.where = where

    def __str__(self) -> str:
        return f"interrupted by a signal; the same command resumes from {self.where}"


def fit(
    task: Task,
    *,
    epochs: int,
    run: RunDirectory,
    context: DistributedContext,
    select: str | None,
    patience: int | None,
    log_every: int = 20,
    checkpoints: Checkpoints | None = None,
    clip_norm: float | None = None,
) -> History:
    """Train a task.

    Args:
        task: what to train.
        epochs: passes over the training data, at least 1.
        run: gets history.jsonl, TensorBoard's event files and the best weights in `best/`.
        context: the process group; every rank calls `fit`.
        select: validation metric to maximize; the first epoch with the highest is the best. None: the last
            epoch is the best.
        patience: stop after this many epochs that were no better than the best before them.
        log_every: steps between two entries of the log.
        checkpoints: what the run is resumed from, and leaves: at the end of every epoch, as often as they
            say, and when SIGTERM or SIGINT comes. None leaves none.
        clip_norm: longest gradient that a step is taken with, see `clip_gradient`; None for any.

    Returns:
        The history without its steps, the same on every rank.

    Raises:
        FloatingPointError: a loss is not finite, or the gradient before weights are kept; it names epoch and
            step. No step is taken on it, except by fused optimizers, whose weights are not kept either, and
            `bad_batch/rank<r>.json` has the ids of the batch. No checkpoint holds anything of it.
        Interrupted: SIGTERM or SIGINT came, to whichever rank; all stop after the same step. A second
            SIGINT ends the process at once.
        LeaseError: another process has taken the directory over.
        ResumeError: the checkpoints are of another run, or of more epochs.
        OptionError: no epochs, no batches, or an epoch without a finite value of the metric `select`. A
            checkpoint behind the steps of that epoch is left.
    """
    if epochs < 1:
        raise OptionError(f"epochs is {epochs}: nothing to train")
    run.root.mkdir(parents=True, exist_ok=True)
    history, epoch, first = History(), 0, 0
    if checkpoints is not None:
        checkpoints.when_finished = run.publish_checkpoint
    found = checkpoints.restore(task.state) if checkpoints is not None else None
    if found is not None:
        epoch, first, progress = found
        history = History(**progress)
        if epoch > epochs or (epoch == epochs and first):
            raise ResumeError(f"{run.root} has trained {len(history.epochs)} epochs, {epochs} are fewer")
    log_file = _Log(run, history) if context.is_main else None
    save = _Saving(task, run, history, log_file, checkpoints)
    try:
        with _signals(checkpoints is not None) as stop:
            while epoch < epochs and not _is_over(history, select, patience):
                started = time.perf_counter()
                task.model.train()
                _train_epoch(task, epoch, first, history, run, context, log_file, log_every, save, stop,
                             clip_norm)  # fmt: skip
                entry = {"epoch": epoch, "loss": history.loss_sum / history.loss_count}
                context.at(f"the evaluation of epoch {epoch}")
                entry |= context.all_gather_objects(task.after_epoch(epoch))[0]  # all ranks decide alike
                entry["seconds"] = time.perf_counter() - started
                if not _can_be_judged(entry, select):
                    save.checkpoint(epoch, task.num_batches(epoch))
                    save.wait()
                    known = ", ".join(f"{name} {value}" for name, value in entry.items())
                    raise OptionError(f"epoch {epoch} has no finite {select} to select by; it has {known}")
                is_best = _is_better(entry, history, select)
                if is_best:
                    history.best_epoch = epoch
                    run.check_lease()
                    task.save(run.best)
                    on_all_ranks(lambda: run.upload(run.best.name))
                history.epochs.append(entry)
                history.loss_sum, history.loss_count = 0.0, 0
                if log_file is not None:
                    log_file.add_epoch(entry, is_best, history.num_steps)
                context.barrier()
                epoch, first = epoch + 1, 0
                save.checkpoint(epoch, first)
                if checkpoints is not None and any(context.all_gather_objects(stop.is_set)):
                    save.interrupt()  # the signal came in the evaluation
            save.wait()
    finally:
        if log_file is not None:
            log_file.close()
    return history


class _Log:
    """Where rank 0 writes down what happens: the history and TensorBoard."""

    def __init__(self, run: RunDirectory, history: History) -> None:
        self._file = HistoryFile(run.history, history)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=history.num_steps + 1)

    def add_step(self, entry: dict[str, float], is_logged: bool) -> None:
        self._file.add_step(entry, flush=is_logged)
        if is_logged:
            for name in entry.keys() - {"step"}:
                self._board.add_scalar(f"train/{name}", entry[name], entry["step"])

    def add_epoch(self, entry: dict[str, float], is_best: bool, step: int) -> None:
        self._file.add_epoch(entry, is_best)
        for name in entry.keys() - {"epoch"}:
            self._board.add_scalar(f"epoch/{name}", entry[name], step)
        facts = ", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name != "epoch")
        log.info("epoch %d: %s", entry["epoch"], facts)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._board.close()
        self._file.close()


class _Saving:
    """Checkpoints of the run, behind the history that they rely on; every rank calls every method."""

    def __init__(
        self,
        task: Task,
        run: RunDirectory,
        history: History,
        log_file: _Log | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._task, self._run, self._history = task, run, history
        self._log, self._checkpoints = log_file, checkpoints

    def is_due(self, step: int) -> bool:
        return self._checkpoints is not None and self._checkpoints.is_due(step)

    def is_overdue(self) -> bool:
        return self._checkpoints is not None and self._checkpoints.is_overdue()

    def checkpoint(self, epoch: int, step: int) -> None:
        if self._checkpoints is None:
            return
        on_all_ranks(self._log.sync if self._log is not None else lambda: None)
        self._run.check_lease()
        self._checkpoints.save(self._task.state, epoch, step, self._history.progress())

    def wait(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def interrupt(self) -> NoReturn:
        self.wait()
        interrupted = Interrupted(self._run.checkpoints)
        log.warning("%s", interrupted)
        raise interrupted


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
    run: RunDirectory,
    context: DistributedContext,
    log_file: _Log | None,
    log_every: int,
    save: _Saving,
    stop: "_Flag",
    clip_norm: float | None,
) -> None:
    total = task.num_batches(epoch)
    if total < 1:
        if history.loss_count:  # another number of ranks has read all of it
            return
        raise OptionError(f"epoch {epoch} has no batches: the data is smaller than one batch on every rank")
    samples, waited, since = 0, 0.0, time.perf_counter()
    with Progress(total, f"epoch {epoch}", "step", initial=first, show=context.is_main) as progress:
        for place, (batch, seconds) in enumerate(_timed(task.batches(epoch, first)), first + 1):
            waited += seconds
            step = history.num_steps + 1
            context.at(f"epoch {epoch}, step {step}")
            task.optimizer.zero_grad()  # before the forward pass, in which fused kernels take their rate
            loss, report = task.training_forward(batch)
            outcome = StepOutcome(loss, stop.is_set, save.is_overdue(), context)
            if loss.is_cuda:  # by the time that the host waits for the loss, the GPU has enough to do
                loss.backward()
            value, stopping, overdue = outcome.read()
            if not math.isfinite(value):
                save.wait()
                raise _diverged(task, batch, run, context, epoch, step, f"the loss is {value}")
            if not loss.is_cuda:
                loss.backward()
            is_logged = step % log_every == 0 or step == 1
            is_kept = stopping or overdue or save.is_due(step) or place == total
            if is_logged or is_kept or clip_norm is not None:
                gradient = gradient_norm(task.model)
            norm = float(gradient) if is_logged or is_kept else math.nan
            if is_kept and not math.isfinite(norm):  # otherwise the loss of the next step says it
                save.wait()
                raise _diverged(task, batch, run, context, epoch, step, f"the gradient is {norm}")
            if clip_norm is not None:
                clip_gradient(task.model, gradient, clip_norm)
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
                progress.note(loss=f"{value:.4f}")
            if log_file is not None:
                log_file.add_step(entry, is_logged)
            history.num_steps = step
            history.loss_sum, history.loss_count = history.loss_sum + value, history.loss_count + 1
            progress.update()
            if stopping or overdue or save.is_due(step):
                save.checkpoint(epoch, place)
            if stopping:
                save.interrupt()


def _diverged(
    task: Task, batch: Any, run: RunDirectory, context: DistributedContext, epoch: int, step: int, what: str
) -> Diverged:
    """The error of a step, behind a file with the ids of its batch."""
    file = run.root / "bad_batch" / f"rank{context.rank}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"epoch": epoch, "step": step, "problem": what} | task.batch_ids(batch))
    return Diverged(
        f"{what} in epoch {epoch} at step {step}; the ids of the batch are in {file.parent}. Try a lower "
        "learning rate, and check the input for values that are not finite"
    )


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
    numbers = heeded(signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, flag.set) for number in numbers}
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


def _can_be_judged(entry: dict[str, float], select: str | None) -> bool:
    return select is None or math.isfinite(entry.get(select, math.nan))


def _is_better(entry: dict[str, float], history: History, select: str | None) -> bool:
    if select is None or history.best_epoch is None:
        return True
    return entry[select] > history.epochs[history.best_epoch][select]
