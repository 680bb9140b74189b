"""The typed description of a run: stages, what each runs, and what it reads of the others.

A description is a TOML file (`loading.py`) or is built in Python of the classes here; both are checked alike.
Strings hold references: `${csft}` is the output of the stage csft, `${table/manifest.json#table_version}` a
value of a JSON file in an output, `${out}` the output of the stage itself, and `${run}` the directory of the
run. A stage depends on every stage that it refers to.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from mim_torchrec import toml_files
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.errors import OptionError
from mim_torchrec.toml_files import Strict, did_you_mean

REFERENCE = re.compile(r"(?<!\$)\$\{([^{}]*)\}")
PARTS = re.compile(r"(?P<name>[^/#]+)(?:/(?P<file>[^#]+)#(?P<key>.+))?")
RUN, OUT = "run", "out"
OWN_FOLDERS = ("stages", "pipeline")
"""Folders of a run directory that hold records and no results."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Value = str | int | float | bool


class PipelineError(OptionError):
    """A description of a pipeline is wrong; the message names the file and the place."""


class Job(Strict):
    """What the scheduler gives to a stage. What is not stated has the default of the TorchX component.

    Args:
        j: `<nodes>x<processes>` of a component that runs torchrun.
        cpu: cores of a node.
        gpu: accelerators of a node.
        memMB: memory of a node in MiB.
        h: named resource, in place of cpu, gpu and memMB.
        image: container image.
        mounts: of a container, in TorchX's words.
        max_retries: times that the scheduler starts the job again.
        max_restarts: times that torchrun starts its workers again.
        env: environment variables.
    """

    j: str | None = None
    cpu: int | None = None
    gpu: int | None = None
    memMB: int | None = None
    h: str | None = None
    image: str | None = None
    mounts: list[str] | None = None
    max_retries: int | None = None
    max_restarts: int | None = None
    env: dict[str, str] = Field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        """What is stated, by name."""
        return {name: value for name, value in self.model_dump().items() if value not in (None, {})}


class Stage(Strict):
    """One step of a run: a TorchX component, or a command of `mim` in one process.

    Args:
        component: such as `mim.csft`; any TorchX component can be named.
        command: words after `mim`, such as `import movielens`.
        arguments: positional arguments.
        flags: by name, without dashes; a list gives several words.
        out: what the stage writes, a path in the run directory or a URL; its name by default, False for none.
            It is passed as `--out` unless a flag or an argument holds `${out}`.
        job: resources.
        after: stages that come before, beyond those that are referred to.
        files: files from outside the run that are read; a change makes the result outdated.
    """

    component: str | None = None
    command: str | None = None
    arguments: list[Value] = Field(default_factory=list)
    flags: dict[str, Value | list[Value]] = Field(default_factory=dict)
    out: str | Literal[False] | None = None
    job: Job = Field(default_factory=Job)
    after: list[str] = Field(default_factory=list)
    files: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        if (self.component is None) == (self.command is None):
            raise ValueError(
                "a stage has either a component, such as 'mim.ctr', or a command, such as 'shop'"
            )
        if self.command is not None and {"j", "max_restarts"} & self.job.given().keys():
            raise ValueError("a command runs in one process: job.j and job.max_restarts are of components")
        return self

    def strings(self) -> Iterator[tuple[str, str]]:
        """Strings that may hold references, each with its place."""
        for number, argument in enumerate(self.arguments):
            if isinstance(argument, str):
                yield f"arguments.{number}", argument
        for name, value in self.flags.items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield f"flags.{name}", one
        for name, text in self.job.env.items():
            yield f"job.env.{name}", text

    def with_out(self) -> "Stage":
        """The stage with its output among the flags, where it is nowhere else."""
        if self.out is False or any(f"${{{OUT}}}" in text for _, text in self.strings()):
            return self
        return self.model_copy(update={"flags": {**self.flags, OUT: f"${{{OUT}}}"}})


class Pipeline(Strict):
    """The stages of a run by name, in the order in which they start where none waits for another.

    Args:
        name: of the run in reports and of its jobs.
        stages: by name.

    Raises:
        ValidationError: an unknown reference, a cycle, two stages with one output, a path outside the run.
    """

    name: Name
    stages: dict[Name, Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, stage in self.stages.items():
            if name in (RUN, OUT):
                raise ValueError(f"stages.{name}: ${{{name}}} has a meaning of its own; choose another name")
            for other in stage.after:
                if other not in self.stages:
                    raise ValueError(
                        f"stages.{name}.after: no stage {other!r}{did_you_mean(other, self.stages)}"
                    )
            for place, text in stage.strings():
                for head, file, key in references(text):
                    self._check_reference(f"stages.{name}.{place}", stage, head, file, key)
        self._check_outputs()
        try:
            order = list(TopologicalSorter(self.dependencies).static_order())
        except CycleError as error:
            raise ValueError(f"stages wait for each other: {' -> '.join(error.args[1])}") from None
        assert len(order) == len(self.stages)
        return self

    def _check_reference(
        self, place: str, stage: Stage, head: str, file: str | None, key: str | None
    ) -> None:
        if head == RUN or (head == OUT and stage.out is not False):
            if file is not None:
                raise ValueError(f"{place}: ${{{head}}} is a path and has no values")
        elif head == OUT:
            raise ValueError(f"{place}: ${{{OUT}}} in a stage that has none (out = false)")
        elif head not in self.stages:
            raise ValueError(
                f"{place}: ${{{head}}} is neither a parameter nor a stage{did_you_mean(head, self.stages)}"
            )
        elif self.stages[head].out is False:
            raise ValueError(f"{place}: stage {head} has no output (out = false)")

    def _check_outputs(self) -> None:
        owners: dict[PurePosixPath, str] = {}
        urls: dict[str, str] = {}
        for name in self.stages:
            out = self.output(name)
            if out is None:
                continue
            if isinstance(out, Url):
                for other_url, owner in urls.items():
                    if f"{out}/".startswith(f"{other_url}/") or f"{other_url}/".startswith(f"{out}/"):
                        raise ValueError(f"stages.{name}.out: {out} and {other_url} of {owner} overlap")
                urls[str(out)] = name
                continue
            if out.is_absolute() or ".." in out.parts or out in (PurePosixPath(""), PurePosixPath(".")):
                raise ValueError(f"stages.{name}.out: {str(out)!r} is not a path in the run directory")
            if out.parts[0] in OWN_FOLDERS:
                raise ValueError(f"stages.{name}.out: {out.parts[0]!r} holds the records of the run")
            for other, owner in owners.items():
                if out == other:
                    raise ValueError(f"stages.{name}.out: {str(out)!r} is the output of {owner} too")
                if out.is_relative_to(other) or other.is_relative_to(out):
                    raise ValueError(f"stages.{name}.out: {str(out)!r} and {str(other)!r} of {owner} overlap")
            owners[out] = name

    @cached_property
    def dependencies(self) -> dict[str, list[str]]:
        """Names of the stages that each one waits for."""
        found = {}
        for name, stage in self.stages.items():
            heads = [head for _, text in stage.strings() for head, _, _ in references(text)]
            found[name] = list(dict.fromkeys(n for n in [*stage.after, *heads] if n not in (RUN, OUT)))
        return found

    def output(self, name: str) -> PurePosixPath | Url | None:
        """Path of an output in the run directory, or its URL; None where the stage has none."""
        out = self.stages[name].out
        if isinstance(out, str) and "://" in out:
            return Url(out)
        return None if out is False else PurePosixPath(name if out is None else out)

    def closure(self, names: list[str]) -> list[str]:
        """Stages with all that they wait for, in the order of the pipeline.

        Raises:
            PipelineError: no such stage.
        """
        needed, waiting = set(), list(names)
        while waiting:
            name = waiting.pop()
            if name not in self.stages:
                raise PipelineError(f"no stage {name!r}{did_you_mean(name, self.stages)}")
            if name not in needed:
                needed.add(name)
                waiting += self.dependencies[name]
        return [name for name in self.stages if name in needed]


def references(text: str) -> Iterator[tuple[str, str | None, str | None]]:
    """Name, file and key of every reference in a string.

    Raises:
        ValueError: a reference is not of the form `${name}` or `${name/file.json#key}`.

    >>> list(references("${csft}/encoder and ${table/manifest.json#table_version}"))
    [('csft', None, None), ('table', 'manifest.json', 'table_version')]
    """
    for content in REFERENCE.findall(text):
        parts = PARTS.fullmatch(content)
        if parts is None:
            raise ValueError(f"${{{content}}} is not of the form ${{stage}} or ${{stage/file.json#key}}")
        yield parts["name"], parts["file"], parts["key"]


def explained(error: ValidationError) -> str:
    """Every fault that pydantic has found, each with its place, in one line."""
    return toml_files.explained(error, _fields)


def _fields(place: tuple[int | str, ...]) -> list[str]:
    if len(place) <= 1:
        return [*Pipeline.model_fields, "parameters", "templates"]
    return list(Job.model_fields if "job" in place[:-1] else [*Stage.model_fields, "like", "each"])
