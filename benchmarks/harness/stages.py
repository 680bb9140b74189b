"""Stages that a benchmark computes, run as a pipeline (`mim_torchrec.pipeline`).

A benchmark whose stages are known beforehand is a TOML file, as the demo is. One that computes a grid, or
chooses a setting by what earlier stages have scored, describes stages here and runs them in groups.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mim_torchrec.errors import OptionError
from mim_torchrec.pipeline import spec
from mim_torchrec.pipeline.execution import RunOptions
from mim_torchrec.pipeline.running import run as run_pipeline

Value = str | int | float | bool | Path
Words = list[Value]
"""Of a flag that takes several."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a run.

    Args:
        name: unique in the run; names the log and the entry of the report.
        command: words after `mim`, such as ("import", "movielens") or ("ctr",).
        out: file or directory that the command makes; an outdated one is removed before it runs.
        arguments: positional arguments.
        options: flags and their values.
        ranks: `<nodes>x<processes>` to launch with TorchX; None runs `mim <command>` in one process.
        after: stages whose results this one reads.
        files: files from outside the run that it reads; changing one makes the result outdated.
    """

    name: str
    command: tuple[str, ...]
    out: Path
    arguments: tuple[Value, ...] = ()
    options: Mapping[str, Value | Words] = field(default_factory=dict)
    ranks: str | None = None
    after: tuple["Stage", ...] = ()
    files: tuple[Path, ...] = ()

    def described(self, root: Path, threads: int | None) -> spec.Stage:
        """The stage in the words of a pipeline.

        Args:
            root: directory of the run.
            threads: OMP_NUM_THREADS of its processes; by default the launcher decides.

        Raises:
            OptionError: its output is not in the run directory.
        """
        if not self.out.is_relative_to(root):
            raise OptionError(f"stage {self.name} writes to {self.out}, which is outside {root}")
        program: dict[str, str] = (
            {"command": " ".join(self.command)}
            if self.ranks is None
            else {"component": f"mim.{self.command[0]}"}
        )
        inputs = [stage for stage in self.after if not stage.out.is_relative_to(root)]
        return spec.Stage(
            **program,
            arguments=[_plain(value) for value in self.arguments],
            flags={
                key: [_plain(word) for word in value] if isinstance(value, list) else _plain(value)
                for key, value in self.options.items()
                if key != "out"
            },
            out=str(self.out.relative_to(root)),
            job=spec.Job(j=self.ranks, env={} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            after=[stage.name for stage in self.after if stage not in inputs],
            files=[str(file) for stage in (self, *inputs) for file in stage.files],
        )


def _plain(value: Value) -> spec.Value:
    """A value in which nothing is taken for a reference."""
    return str(value).replace("${", "$${") if isinstance(value, str | Path) else value


class Run:
    """The stages of one run directory.

    Args:
        root: directory of the run; every stage's `out` lies inside.
        verbose: print one line when a stage starts and one when it ends.
    """

    def __init__(self, root: Path, verbose: bool = True) -> None:
        self.root = root.resolve()
        self.seconds: dict[str, float] = {}
        self._verbose = verbose
        self._known: dict[str, spec.Stage] = {}

    def run(self, stages: Iterable[Stage], jobs: int = 1, threads: int | None = None) -> None:
        """Run stages, `jobs` at a time, skipping those whose result is there.

        Args:
            stages: with those that they read among them, or run before.
            jobs: how many run side by side.
            threads: OMP_NUM_THREADS of every process; by default the launcher decides.

        Raises:
            StageError: a stage failed; those already running end first.
        """
        before = set(self._known)
        given = {stage.name: stage.described(self.root, threads) for stage in stages}
        self._known |= given
        pipeline = spec.Pipeline(name="benchmark", stages=self._known)
        options = RunOptions(jobs=jobs, only=list(given), verbose=self._verbose, unmentioned=before)
        results = run_pipeline(pipeline, self.root, options)
        self.seconds |= {name: results[name].seconds for name in given}


def ctr_stage(
    name: str,
    *,
    root: Path,
    data: Stage,
    table: Stage | None,
    seed: int,
    options: Mapping[str, Value | Words],
    ranks: str,
) -> Stage:
    """A run of the CTR stage: MIM on `table`, Base where it is None. The table must be there already."""
    flags: dict[str, Value | Words] = {"data": data.out, "out": root / "ctr" / name, "seed": seed}
    if table is None:
        flags["mim"] = "off"
    else:
        version = json.loads((table.out / "manifest.json").read_text())["table_version"]
        flags |= {"mim": "on", "table": table.out, "table-version": version}
    return Stage(
        name=f"ctr-{name}",
        command=("ctr",),
        out=root / "ctr" / name,
        options=flags | dict(options),
        ranks=ranks,
        after=(data,) if table is None else (data, table),
    )


def export_stage(
    root: Path,
    name: str,
    data: Stage,
    encoder: Stage | str,
    ranks: str,
    options: Mapping[str, Value] | None = None,
) -> Stage:
    """The table of all items, by the encoder of a C-SFT stage or a `plain:<vision>+<text>`."""
    flags: dict[str, Value] = {"data": data.out, "out": root / name}
    flags["encoder"] = encoder.out / "encoder" if isinstance(encoder, Stage) else encoder
    return Stage(
        name=f"export-{name}",
        command=("export",),
        options=flags | dict(options or {}),
        out=root / name,
        ranks=ranks,
        after=(data, encoder) if isinstance(encoder, Stage) else (data,),
    )
