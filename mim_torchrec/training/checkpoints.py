"""States that a run can be resumed from: whole ones only, the newest few.

    <out>/checkpoints/epoch-0002-step-00000040/
        state/          what ranks share or divide, by torch.distributed.checkpoint
        rank-<r>.pt     what a rank has of its own: generators, queues, the schedule
        run.json        position, summary of the history, number of ranks, configuration
        model.json      which model it is, for stages whose configuration is read again
        sha256.json     digests of all of these

All ranks write into a directory that gets its name only when everything in it is on the disk, so that a kill
at any moment, or a full disk, leaves the last whole one. The directory is one that all ranks see. Training
goes on while a copy of the state is written; at most one copy is. Digests are compared before a checkpoint is
loaded; one that is damaged is set aside, and the one before it is taken.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import (
    clear_leftovers,
    discard_directory,
    remove_directory,
    to_bytes,
    write_bytes,
    write_json,
)
from mim_torchrec.errors import ExpectedError, OptionError, Status
from mim_torchrec.training.config import CheckpointConfig
from mim_torchrec.training.distributed import DistributedContext, is_restarted
from mim_torchrec.training.generators import get_generators, set_generators
from mim_torchrec.training.model_record import write_model_record
from mim_torchrec.training.sharded_state import DIGEST, Writer, cause_of, damage, own_group, seal, size_of
from mim_torchrec.training.shared_directory import begin_directory, partial_of, publish_shared

log = logging.getLogger(__name__)

WAY_OUT = "choose another --out, or --checkpoint.resume never to start from scratch"
DAMAGED = ".damaged"
NAME = re.compile(r"epoch-\d{4,}-step-\d{8,}")


class ResumeError(ExpectedError, ValueError):
    """A run cannot be resumed from the checkpoints that are there."""

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
        run: what a run must have in common with one that it resumes, such as its configuration; JSON.
        context: the process group.
        model: what `model.json` says of the model; None for none.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        run: dict[str, Any],
        context: DistributedContext,
        model: dict[str, Any] | None = None,
    ) -> None:
        if config.every < 0 or config.keep < 1:
            raise OptionError(f"checkpoints every {config.every} steps, {config.keep} kept: at least 0 and 1")
        if config.minutes < 0:
            raise OptionError(f"--checkpoint.minutes is {config.minutes}; it must be at least 0")
        self._folder, self._config, self._context = folder, config, context
        self._run, self._model = run, model
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[None]] | None = None
        self._began = time.monotonic()
        self._warned = False
        self.when_finished: Callable[[], None] | None = None
        """What rank 0 does when a checkpoint has its name, before the next one is begun."""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after a step of the run."""
        return self._config.every > 0 and step % self._config.every == 0

    def is_overdue(self) -> bool:
        """Whether the newest checkpoint is older than it may be; the clocks of ranks differ."""
        return 0 < self._config.minutes * 60 <= time.monotonic() - self._began

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
        self._began = time.monotonic()
        path = self._folder / f"epoch-{epoch:04d}-step-{step:08d}"
        partial, local = partial_of(path), state.local()
        try:
            begin_directory(path, self._context)
            on_all_ranks(lambda: self._write(partial, local, epoch, step, progress))
        except BaseException:
            discard_directory(partial)
            raise
        shared = state.shared()
        writer = Writer(partial / "state", size_of(shared))
        if self._config.asynchronous:
            staged = BlockingAsyncStager(cache_staged_state_dict=False)  # the default knows no ShardedTensor
            group = self._own_group()
            begun = dcp.async_save(shared, storage_writer=writer, process_group=group, async_stager=staged)
            wait = cast("Future[object]", begun).result  # this stager gives a future
            self._pending = path, self._writer.submit(self._finish, path, wait)
        else:
            # in this thread, whose device and stream the tensors are of
            saved: Future[None] = Future()
            try:
                self._finish(path, lambda: dcp.save(shared, storage_writer=writer))
            except (Exception, CheckpointException) as error:
                saved.set_exception(error)
            else:
                saved.set_result(None)
            self._pending = path, saved
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
                raise OSError(cause_of(error)) from error

        try:
            on_all_ranks(finish)
        except OSError as error:
            discard_directory(partial_of(path))
            raise OSError(f"{path} could not be written: {error}") from error
        log.info("checkpoint %s", path)

    def _finish(self, path: Path, save: Callable[[], object]) -> None:
        save()  # returns when all ranks have written
        if self._context.is_main:
            seal(partial_of(path))
            publish_shared(path)
            self._leave_newest()
            if self.when_finished is not None:
                self.when_finished()
            self._compare_with_grace(time.monotonic() - self._began)

    def _compare_with_grace(self, seconds: float) -> None:
        """Warn where ranks may be killed before a checkpoint is written that a signal asked for."""
        grace = grace_of_launcher()
        if grace is None or 2 * seconds <= grace or self._warned:
            return
        self._warned = True
        log.warning(
            "a checkpoint took %.0f s. The launcher kills ranks %.0f s after a signal to end, in which two "
            "may have to be written: raise its grace (--grace, TORCH_ELASTIC_SHUTDOWN_TIMEOUT) and that of "
            "the scheduler, and write checkpoints in between (--checkpoint.minutes)", seconds, grace,
        )  # fmt: skip

    def _own_group(self) -> dist.ProcessGroup | None:
        if self._group is None:
            self._group = own_group()
        return self._group

    def restore(self, state: State) -> tuple[int, int, dict[str, Any]] | None:
        """Put a task into the state of the newest whole checkpoint, and the generators of this rank too.

        Returns:
            Epoch, step and progress as they were saved; None if there is no checkpoint, or none is asked for.

        Raises:
            ResumeError: the checkpoint is of another configuration, or of another number of ranks and the
                task cannot go on with this one, or all are damaged.
        """
        self.wait()
        on_all_ranks(self._tidy)
        path = self._newest_whole()
        if path is None:
            return None
        try:
            run = json.loads((path / "run.json").read_text())
            refuse_other_run(path, run["run"], self._run)
            shared = state.shared()
            dcp.load(shared, checkpoint_id=str(path / "state"))
            own = path / f"rank-{self._context.rank % run['world_size']}.pt"
            local = torch.load(own, map_location="cpu", weights_only=True)
        except (CheckpointException, OSError, EOFError, RuntimeError, json.JSONDecodeError) as error:
            cause = cause_of(error) if isinstance(error, CheckpointException) else error
            raise ResumeError(
                f"{path} cannot be read: {cause}; remove it to resume from the one before it, if there is one"
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
        log.info("resumed from %s", path)
        return epoch, step, run["progress"]

    def _tidy(self) -> None:
        if self._context.is_main:
            clear_leftovers(self._folder)
            if self._config.resume == "never" and not is_restarted() and self._folder.exists():
                remove_directory(self._folder)

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint whose bytes are those that were written; newer ones are set aside.

        Raises:
            ResumeError: there are checkpoints, and all are damaged.
        """
        context = self._context
        paths = context.all_gather_objects(checkpoints_in(self._folder) if context.is_main else [])[0]
        damaged: list[tuple[Path, str]] = []
        whole = None
        for path in reversed(paths):
            problems = context.all_gather_objects(damage(path, context.rank, context.world_size))
            problem = next((found for found in problems if found is not None), None)
            if problem is None:
                whole = path
                break
            damaged.append((path, problem))
        if damaged and whole is None:
            reasons = "; ".join(f"{path}: {problem}" for path, problem in damaged)
            raise ResumeError(f"no checkpoint is whole: {reasons}; {WAY_OUT}")
        for path, problem in damaged:
            log.warning("%s is damaged and set aside: %s; resuming from %s", path, problem, whole)
            if context.is_main:
                aside = path.with_name(path.name + DAMAGED)
                if aside.exists():
                    remove_directory(aside)
                os.rename(path, aside)
        return whole

    def _write(
        self, folder: Path, local: dict[str, Any], epoch: int, step: int, progress: dict[str, Any]
    ) -> None:
        content = {"state": local, "generators": get_generators()}
        data = to_bytes(lambda stream: torch.save(content, stream))  # it hides the error of a failed write
        own = folder / f"rank-{self._context.rank}.pt"
        write_bytes(own, data)
        write_bytes(own.with_name(own.name + DIGEST), hashlib.sha256(data).hexdigest().encode())
        if self._context.is_main:
            facts = {"epoch": epoch, "step": step, "world_size": self._context.world_size, "run": self._run}
            write_json(folder / "run.json", facts | {"progress": progress})
            if self._model is not None:
                write_model_record(folder, self._model)

    def _leave_newest(self) -> None:
        for path in checkpoints_in(self._folder)[: -self._config.keep]:
            remove_directory(path)


def grace_of_launcher() -> float | None:
    """Seconds from SIGTERM until torchrun kills its ranks; None where it is not the launcher."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a directory, the newest last; whether they are whole is not looked at."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name))


def resume_fingerprint_in(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a directory that says what run it is of, and what it says."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return path, json.loads((path / "run.json").read_text())["run"]
        except (OSError, ValueError, KeyError, TypeError):  # `restore` reports the damage
            continue
    return None


def refuse_other_run(
    path: Path, earlier: dict[str, Any], now: dict[str, Any], only: Iterable[str] | None = None
) -> None:
    """Compare the fingerprints of two runs.

    Args:
        path: the checkpoint of the earlier one.
        earlier: its fingerprint.
        now: of the run that starts.
        only: names to compare; None compares all.

    Raises:
        ResumeError: they differ; it names what does.
    """
    before, after = _flat(earlier), _flat(json.loads(json.dumps(now, default=str)))
    names = sorted(before.keys() | after.keys())
    if only is not None:
        names = [name for name in names if name.partition(".")[0] in set(only)]
    other = [name for name in names if before.get(name) != after.get(name)]
    if other:
        changes = ", ".join(f"{n} {before.get(n)!r} (now {after.get(n)!r})" for n in other)
        why = ""
        if any(name.endswith("epochs") for name in other):
            why = " (the learning rate follows a curve over all epochs, so that none can be added)"
        raise ResumeError(f"{path} is of a run with {changes}{why}; {WAY_OUT}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
