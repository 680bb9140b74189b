"""States of a run that it can be taken up from: whole ones only, the newest few.

    <out>/checkpoints/epoch-0002-step-00000040/
        state/          what ranks share or divide, by torch.distributed.checkpoint
        rank-<r>.pt     what a rank has of its own: generators, queues, the schedule
        run.json        position, history, number of ranks, configuration

All ranks write into a directory that gets its name only when everything in it is on the disk, so that a kill
at any moment, or a full disk, leaves the last whole one. The directory is one that all ranks see. Training
goes on while a copy of the state is written; at most one copy is.
"""

import io
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from mim_torchrec.errors import ExpectedError, OptionError, Status
from mim_torchrec.training.checkpoint import (
    begin_directory,
    on_all_ranks,
    partial_of,
    publish_directory,
    remove,
)
from mim_torchrec.training.distributed import DistributedContext, is_restarted

log = logging.getLogger(__name__)

WAY_OUT = "choose another --out, or --checkpoint.resume never to start anew"
NAME = re.compile(r"epoch-\d{4,}-step-\d{8,}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of the run."""

    every: int = 0
    """Steps between two checkpoints; 0 for those at the end of every epoch, and at SIGTERM, only."""
    keep: int = 2
    """How many of the newest are kept."""
    asynchronous: bool = True
    """Go on with training while a copy of the state is written; it takes the memory of that copy."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint in `out`, exactly as if the run had not been broken off;
    `never` removes what is there and starts anew, though not when torchrun starts its workers again."""


class ResumeError(ExpectedError, ValueError):
    """A run cannot be taken up from the checkpoints that are there."""

    status = Status.STATE


class State(Protocol):
    """Everything that a task changes while it trains."""

    def shared(self) -> dict[str, Any]:
        """What ranks share or divide, for `torch.distributed.checkpoint`; loading changes it in place."""

    def load_shared(self, state: dict[str, Any]) -> None:
        """Take what `shared` gave and a checkpoint filled."""

    def local(self) -> dict[str, Any]:
        """What this rank has of its own: tensors, numbers, words, and lists and dicts of them."""

    def load_local(self, state: dict[str, Any]) -> None:
        """Take what `local` gave."""

    def reshard(self, epoch: int, step: int, world_size: int) -> int:
        """Go on, after loading, with another number of ranks than `world_size` that trained so far.

        Args:
            epoch: the epoch to go on with.
            step: its batches that each of those ranks was trained on.
            world_size: how many they were.

        Returns:
            The step to go on with.

        Raises:
            ResumeError: the task cannot.
        """


class Checkpoints:
    """The checkpoints of one run; every rank calls every method.

    Args:
        folder: `<out>/checkpoints`.
        config: how often, how many.
        run: what a run must have in common with one that it takes up, such as its configuration; JSON.
        context: the process group.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, run: dict[str, Any], context: DistributedContext
    ) -> None:
        if config.every < 0 or config.keep < 1:
            raise OptionError(f"checkpoints every {config.every} steps, {config.keep} kept: at least 0 and 1")
        self._folder, self._config, self._context = folder, config, context
        self._run = json.loads(json.dumps(run, default=str))
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[None]] | None = None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after a step of the run."""
        return self._config.every > 0 and step % self._config.every == 0

    def save(self, state: State, epoch: int, step: int, progress: dict[str, Any]) -> None:
        """Write a checkpoint; where it is asynchronous, it has its name after the next `wait` at the latest.

        Args:
            state: of the task.
            epoch: the epoch to go on with.
            step: batches of that epoch that were trained on.
            progress: what `restore` gives back; JSON.

        Raises:
            OSError: a rank could not write, this time or the last; all ranks raise, and whole checkpoints are
                untouched.
        """
        self.wait()
        path = self._folder / f"epoch-{epoch:04d}-step-{step:08d}"
        partial, local = partial_of(path), state.local()
        try:
            begin_directory(path, self._context)
            on_all_ranks(lambda: self._write(partial, local, epoch, step, progress), self._context)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        target, shared = str(partial / "state"), state.shared()
        if self._config.asynchronous:
            staged = BlockingAsyncStager(cache_staged_state_dict=False)  # the default knows no ShardedTensor
            saved = dcp.async_save(
                shared, checkpoint_id=target, process_group=self._own_group(), async_stager=staged
            )
            self._pending = path, self._writer.submit(self._finish, path, saved.result)
        else:
            self._pending = (
                path,
                self._writer.submit(self._finish, path, lambda: dcp.save(shared, checkpoint_id=target)),
            )
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written has its name; every rank calls it.

        Raises:
            OSError: a rank could not write; all ranks raise, and whole checkpoints are untouched.
        """
        if self._pending is None:
            return
        (path, written), self._pending = self._pending, None

        def finish() -> None:
            try:
                written.result()
            except CheckpointException as error:
                raise OSError(_cause(error)) from error

        try:
            on_all_ranks(finish, self._context)
        except OSError as error:
            shutil.rmtree(partial_of(path), ignore_errors=True)
            raise OSError(f"{path} could not be written: {error}") from error
        log.info("checkpoint %s", path)

    def _finish(self, path: Path, save: Callable[[], object]) -> None:
        save()  # returns when all ranks have written
        if self._context.is_main:
            publish_directory(path)
            self._leave_newest()

    def _own_group(self) -> dist.ProcessGroup | None:
        """A group for the writer's thread, whose exchanges must not mix with those of training."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        return self._group

    def restore(self, state: State) -> tuple[int, int, dict[str, Any]] | None:
        """Put a task into the state of the newest checkpoint, and the generators of this rank too.

        Returns:
            Epoch, step and progress as they were saved; None if there is no checkpoint, or none is asked for.

        Raises:
            ResumeError: the checkpoint is of another configuration, or of another number of ranks and the
                task cannot go on with this one, or damaged.
        """
        self.wait()
        if self._context.is_main:
            for leftover in (*self._folder.glob("*.partial"), *self._folder.glob("*.old")):
                shutil.rmtree(leftover)
            if self._config.resume == "never" and not is_restarted() and self._folder.exists():
                remove(self._folder)
        newest = self._all()[-1:] if self._context.is_main else []
        found = self._context.all_gather_objects(newest)[0]
        if not found:
            return None
        path = found[0]
        try:
            run = json.loads((path / "run.json").read_text())
            self._check(run, path)
            shared = state.shared()
            dcp.load(shared, checkpoint_id=str(path / "state"))
            own = path / f"rank-{self._context.rank % run['world_size']}.pt"
            local = torch.load(own, map_location="cpu", weights_only=True)
        except (CheckpointException, OSError, EOFError, RuntimeError, json.JSONDecodeError) as error:
            cause = _cause(error) if isinstance(error, CheckpointException) else error
            raise ResumeError(
                f"{path} cannot be read: {cause}; remove it to go on from the one before it, if there is one"
            ) from error
        state.load_shared(shared)
        state.load_local(local["state"])
        set_generators(local["generators"])
        epoch, step, world_size = run["epoch"], run["step"], run["world_size"]
        if world_size != self._context.world_size:
            try:
                step = state.reshard(epoch, step, world_size)
            except ResumeError as error:
                now = self._context.world_size
                raise ResumeError(
                    f"{path} is of {world_size} ranks, this run has {now}: {error}; {WAY_OUT}"
                ) from None
            log.info("the rest of epoch %d is divided over %d ranks, not %d", epoch, self._context.world_size,
                     world_size)  # fmt: skip
        log.info("taken up from %s", path)
        return epoch, step, run["progress"]

    def _all(self) -> list[Path]:
        found = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(path for path in found if NAME.fullmatch(path.name))

    def _write(
        self, folder: Path, local: dict[str, Any], epoch: int, step: int, progress: dict[str, Any]
    ) -> None:
        content = io.BytesIO()  # torch.save hides the error of a file that cannot be written
        torch.save({"state": local, "generators": get_generators()}, content)
        with (folder / f"rank-{self._context.rank}.pt").open("wb") as stream:
            stream.write(content.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        if self._context.is_main:
            facts = {"epoch": epoch, "step": step, "world_size": self._context.world_size, "run": self._run}
            with (folder / "run.json").open("w") as stream:
                json.dump(facts | {"progress": progress}, stream)
                stream.flush()
                os.fsync(stream.fileno())

    def _leave_newest(self) -> None:
        for path in self._all()[: -self._config.keep]:
            remove(path)

    def _check(self, run: dict[str, Any], path: Path) -> None:
        names = sorted(run["run"].keys() | self._run.keys())
        other = [n for n in names if run["run"].get(n) != self._run.get(n)]
        if other:
            changes = ", ".join(f"{n} {run['run'].get(n)!r} (now {self._run.get(n)!r})" for n in other)
            raise ResumeError(f"{path} is of a run with {changes}; {WAY_OUT}")


def get_generators() -> dict[str, Any]:
    """States of the generators of Python, numpy and torch in this process, on the CPU and its own GPU."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generators(states: dict[str, Any]) -> None:
    """Put the generators into the states that `get_generators` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def _cause(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}"
