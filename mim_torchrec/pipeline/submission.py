"""Stages as jobs of TorchX: built of a component, submitted to a scheduler, watched and cancelled."""

import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torchx.specs as specs
from torchx.runner import Runner, get_runner
from torchx.runner.config import apply as apply_torchxconfig
from torchx.specs.api import AppState, parse_app_handle
from torchx.specs.finder import ComponentNotFoundException, ComponentValidationException, get_component
from torchx.util.types import to_dict

from mim_torchrec.errors import ExpectedError, OptionError, SetupError
from mim_torchrec.launch.jobs import process, service
from mim_torchrec.pipeline import local_processes
from mim_torchrec.pipeline.fingerprints import SOURCES, own_program
from mim_torchrec.pipeline.records import Record
from mim_torchrec.pipeline.spec import Stage, Value

LOCAL = "local_cwd"
"""The scheduler whose jobs are processes of this machine."""
DEPENDENCY = "dependency"
"""Run option of a scheduler that starts jobs after others, in the words of our Slurm."""
HERE = (LOCAL, "slurm")
"""Schedulers that run jobs in an environment like that of the one who submits."""


@service()
def _command(*script_args: str, words: str) -> specs.AppDef:
    """A command of mim in one process."""
    return process(words.split()[0], f"mim_torchrec.cli {words}", script_args)


@dataclass(frozen=True)
class JobStatus:
    """What a scheduler says of a job.

    Args:
        state: of TorchX; None where the scheduler no longer knows the job.
        why: of a failure, in words.
    """

    state: AppState | None
    why: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether the job runs no more."""
        return self.state is None or specs.is_terminal(self.state)


def words_of(values: Sequence[Value], flags: dict[str, Value | list[Value]]) -> list[str]:
    """Words of a command line."""
    found = [str(value) for value in values]
    for name, value in flags.items():
        found += [f"--{name}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
    return found


def build(name: str, stage: Stage) -> specs.AppDef:
    """The job of a stage, whose references have been resolved.

    Raises:
        OptionError: the component is unknown, or does not take what it is given.
    """
    place = f"stages.{name}"
    job = stage.job.given()
    word = own_program(stage)
    if word is not None and word not in SOURCES:
        place += ".command" if stage.command else ".component"
        raise OptionError(f"{place}: {word!r} is no stage of a run; there are {', '.join(SOURCES)}")
    if stage.command is not None:
        try:
            made: specs.AppDef = _command(*words_of(stage.arguments, stage.flags), words=stage.command, **job)
        except ValueError as error:
            raise OptionError(f"{place}.job: {error}") from error
        return made
    try:
        component = get_component(str(stage.component)).fn
    except (ComponentNotFoundException, ComponentValidationException, OSError) as error:
        text = str(error).splitlines()[0].partition(". Please")[0]
        raise OptionError(f"{place}.component: {text}") from None
    own, rest = _divided(component, stage)
    parameters = inspect.signature(component).parameters
    if unknown := [key for key in job if key not in parameters]:
        raise OptionError(f"{place}.job.{unknown[0]}: component {stage.component} has no such argument")
    takes_words = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())
    words = words_of(stage.arguments, rest)
    if words and not takes_words:
        raise OptionError(f"{place}: component {stage.component} does not take {shlex.join(words)}")
    missing = [
        n for n, p in parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and n not in own
    ]  # fmt: skip
    if missing:
        raise OptionError(f"{place}.flags.{missing[0]}: component {stage.component} needs it")
    try:
        app: specs.AppDef = component(*words, **own, **job)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{place}: component {stage.component}: {error}") from error
    return app


def _divided(
    component: Callable, stage: Stage
) -> tuple[dict[str, Value | list[Value]], dict[str, Value | list[Value]]]:
    """Flags that are arguments of the component itself, and those for its program."""
    parameters = inspect.signature(component).parameters
    own, rest = {}, {}
    for name, value in stage.flags.items():
        key = name.replace("-", "_")
        if key in parameters and key not in type(stage.job).model_fields:
            takes_text = parameters[key].annotation in (str, str | None, "str")
            own[key] = str(value) if takes_text and not isinstance(value, list) else value
        else:
            rest[name] = value
    return own, rest


def shown(stage: Stage) -> str:
    """The command line of a stage, for people."""
    words = words_of(stage.arguments, stage.flags)
    ranks = ["-j", stage.job.j] if stage.job.j else []
    start = ["mim", *stage.command.split()] if stage.command else [str(stage.component), *ranks]
    return shlex.join([*start, *words])


class Submitter:
    """Submits jobs to one scheduler, and closes it.

    Args:
        scheduler: of TorchX.
        options: of the scheduler, `key=value,key=value`; those of `.torchxconfig` are below them.
        folder: for logs of local jobs, absolute.

    Raises:
        OptionError: no such scheduler, or one of the options is none of its.
    """

    def __init__(self, scheduler: str, options: str, folder: Path) -> None:
        self.scheduler, self._folder = scheduler, folder
        self.runner: Runner = get_runner()
        if scheduler not in self.runner.scheduler_backends():
            known = ", ".join(self.runner.scheduler_backends())
            raise OptionError(f"--scheduler {scheduler}: TorchX has {known}")
        try:
            known_options = self.runner.scheduler_run_opts(scheduler)
            if unknown := [key for key in to_dict(options) if known_options.get(key) is None]:
                raise OptionError(f"--scheduler-args: {scheduler} has no option {unknown[0]!r}")
            self._knows_dependencies = known_options.get(DEPENDENCY) is not None
            self._options: dict[str, Any] = dict(known_options.cfg_from_str(options))
            apply_torchxconfig(scheduler, self._options)
        except (ImportError, ValueError, TypeError) as error:
            if isinstance(error, ExpectedError):
                raise
            raise OptionError(f"--scheduler {scheduler} {options}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.close()

    @property
    def is_local(self) -> bool:
        """Whether jobs are processes of this machine."""
        return self.scheduler == LOCAL

    def request(
        self, title: str, app: specs.AppDef, mark: str, after: Sequence[str] = ()
    ) -> specs.AppDryRunInfo[Any]:
        """What would be submitted.

        Args:
            title: name of the job.
            app: of `build`.
            mark: of its processes.
            after: handles of jobs that must succeed first, where the scheduler can wait for them.

        Raises:
            OptionError: the scheduler refuses the job.
        """
        app.name = title
        for role in app.roles:
            role.env[local_processes.MARK] = mark
            if self.scheduler in HERE:
                role.env.setdefault("MIM_PYTHON", os.environ.get("MIM_PYTHON", sys.executable))
            if self.is_local:  # TorchX puts it before the PATH that it finds
                role.env["PATH"] = str(Path(sys.executable).parent)
        options = self._options | ({"log_dir": str(self._folder)} if self.is_local else {})
        if after:
            ids = "afterok:" + ":".join(parse_app_handle(handle)[2] for handle in after)
            own = options.get(DEPENDENCY)
            options[DEPENDENCY] = f"{own},{ids}" if own else ids
        try:
            return self.runner.dryrun(app, self.scheduler, cfg=options)
        except (ExpectedError, ValueError, TypeError, AssertionError) as error:
            raise OptionError(f"{self.scheduler} refuses {title}: {error}") from error

    @property
    def waits_for_jobs(self) -> bool:
        """Whether the scheduler starts a job when others have succeeded."""
        return self._knows_dependencies

    def submit(self, info: specs.AppDryRunInfo[Any]) -> str:
        """Submit; returns the handle.

        Raises:
            SetupError: the scheduler does not take the job.
        """
        try:
            return self.runner.schedule(info)
        except (subprocess.CalledProcessError, OSError) as error:
            if isinstance(error, ExpectedError):
                raise
            raise SetupError(f"{self.scheduler} does not take the job: {error}") from error

    def log_of(self, info: specs.AppDryRunInfo[Any]) -> Path | None:
        """Where the first process of a local job writes while it runs."""
        if not self.is_local:
            return None
        role = next(iter(info.request.role_params))
        return Path(info.request.log_dir, role, "0", "combined.log")

    def status(self, handle: str) -> JobStatus:
        """What the scheduler says of a job."""
        try:
            found = self.runner.status(handle)
        except subprocess.CalledProcessError as error:
            raise SetupError(f"{self.scheduler} cannot be asked for {handle}: {error}") from error
        if found is None:
            return JobStatus(None, "because the scheduler no longer knows its job")
        if self.is_local and found.is_terminal():
            return JobStatus(found.state, self._exit_code(handle))
        return JobStatus(found.state, f"as {found.msg if found.msg not in ('', specs.NONE) else found.state}")

    def _exit_code(self, handle: str) -> str:
        """The exit status of a local job that has ended, in words; TorchX leaves it beside the logs."""
        (file,) = self._folder.glob(f"*/{parse_app_handle(handle)[2]}/SUCCESS")
        replicas = [one for role in json.loads(file.read_text())["roles"].values() for one in role]
        code = next((one["exitcode"] for one in replicas if one["exitcode"]), 0)
        return f"with exit code {code}" if code >= 0 else f"by signal {-code}"

    def write_log(self, handle: str, app: specs.AppDef, log: Path) -> None:
        """Copy what the processes of a job that has ended have said, and remove local originals."""
        several = sum(role.num_replicas for role in app.roles) > 1
        log.unlink(missing_ok=True)  # the link to the log of the running job
        with log.open("w") as file:
            for role in app.roles:
                for number in range(role.num_replicas):
                    start = f"{role.name}/{number} " if several else ""
                    file.writelines(start + line for line in self._lines(handle, role.name, number))
        if self.is_local:
            app_id = parse_app_handle(handle)[2]
            for folder in self._folder.glob(f"*/{app_id}"):
                shutil.rmtree(folder, ignore_errors=True)

    def _lines(self, handle: str, role: str, number: int) -> Iterator[str]:
        try:
            for line in self.runner.log_lines(handle, role, number):
                yield line if line.endswith("\n") else line + "\n"
        except (ExpectedError, RuntimeError, OSError, ValueError, NotImplementedError) as error:
            yield f"(no log of {role}/{number}: {error})\n"


def cancel(runner: Runner, records: Collection[Record]) -> int:
    """Cancel the jobs of records, on whatever scheduler, and wait for local ones to end.

    Returns:
        How many jobs ran.

    Raises:
        SetupError: a local job is one of another machine, or its processes do not end.
    """
    local = [record for record in records if record.scheduler == LOCAL]
    if away := next((record for record in local if not record.is_of_this_machine), None):
        raise SetupError(f"a job runs as a process of {away.host}: run `mim pipeline cancel` there")
    running = [record for record in local if local_processes.processes_of([record.mark])]
    local_processes.end([record.mark for record in running])
    count = len(running)
    for record in records:
        if record.scheduler == LOCAL:
            continue
        if record.handle is None:
            raise SetupError(
                f"the run was killed while it submitted a job to {record.scheduler}. If there is one, "
                f"{local_processes.MARK}={record.mark} is in its environment: cancel it and remove its record"
            )
        status = runner.status(record.handle)
        if status is not None and not status.is_terminal():
            runner.cancel(record.handle)
            count += 1
    return count
