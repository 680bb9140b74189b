"""`mim pipeline`: run the stages of a file on any scheduler of TorchX, see their states, cancel them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mim_torchrec import program
from mim_torchrec.domains import Count, check_domains
from mim_torchrec.embeddings.remote.places import LocalPath
from mim_torchrec.errors import OptionError
from mim_torchrec.pipeline import overview
from mim_torchrec.pipeline.execution import RunOptions
from mim_torchrec.pipeline.loading import load
from mim_torchrec.pipeline.planning import Planner
from mim_torchrec.pipeline.records import Records
from mim_torchrec.pipeline.reporting import columns, table
from mim_torchrec.pipeline.resolving import Resolver
from mim_torchrec.pipeline.running import run
from mim_torchrec.pipeline.spec import Pipeline
from mim_torchrec.pipeline.submission import LOCAL, Submitter, build, shown

Parameters = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a pipeline; what is done and unchanged is kept, what was interrupted is resumed."""

    file: tyro.conf.Positional[LocalPath]
    """TOML file of the stages; docs/pipeline.md describes it."""
    out: LocalPath
    """Directory of the run."""
    scheduler: str = LOCAL
    """Scheduler of TorchX: local_cwd, slurm, kubernetes, ..."""
    scheduler_args: str = ""
    """Options of the scheduler, key=value,key=value; those of .torchxconfig stand below them."""
    jobs: Count | None = None
    """Stages side by side; by default one on local_cwd, all that can run elsewhere."""
    parameters: Parameters = ()
    """Parameters of the file with other values."""
    stages: tuple[str, ...] = ()
    """Stages to run, with all that they wait for; by default all."""
    mlflow: str | None = None
    """Tracking URI of MLflow that gets parameters, metrics and artifacts, such as sqlite:///mlflow.db."""
    experiment: str | None = None
    """Experiment of MLflow; by default the name of the pipeline."""

    def run(self) -> None:
        """Run it and print the states."""
        pipeline = load(self.file, _given(self.parameters))
        options = RunOptions(scheduler=self.scheduler, scheduler_args=self.scheduler_args, jobs=self.jobs,
                             only=self.stages, mlflow=self.mlflow, experiment=self.experiment)  # fmt: skip
        try:
            run(pipeline, self.out, options)
        finally:
            records = Records(self.out)
            if records.report.exists():
                print(f"\n{table(overview.states(self.out))}\n\nreport in {records.report}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what a run would do and why; nothing is written."""

    file: tyro.conf.Positional[LocalPath]
    """TOML file of the stages."""
    out: LocalPath
    """Directory of the run; it need not exist."""
    scheduler: str = LOCAL
    """Scheduler of TorchX."""
    scheduler_args: str = ""
    """Options of the scheduler."""
    parameters: Parameters = ()
    """Parameters of the file with other values."""
    stages: tuple[str, ...] = ()
    """Stages to run, with all that they wait for; by default all."""

    def run(self) -> None:
        """Print the plan."""
        pipeline = load(self.file, _given(self.parameters))
        print(plan(pipeline, self.out, self.scheduler, self.scheduler_args, self.stages))


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show the states of the stages of a run."""

    out: tyro.conf.Positional[LocalPath]
    """Directory of the run."""

    def run(self) -> None:
        """Print them."""
        found = overview.states(self.out)
        print(table(found))
        for result in found:
            if result.why:
                print(result.why)


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """End a run and cancel its jobs, those of a run that was killed too."""

    out: tyro.conf.Positional[LocalPath]
    """Directory of the run."""

    def run(self) -> None:
        """Cancel it."""
        left = overview.cancel(self.out)
        print(f"cancelled {', '.join(left)}" if left else "no job runs")


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Cancel, tyro.conf.subcommand("cancel")]
)


def plan(pipeline: Pipeline, root: Path, scheduler: str, options: str, only: Sequence[str] = ()) -> str:
    """What a run would do with each stage, as a table and the command lines.

    Raises:
        OptionError: a component, or the scheduler, does not take what it is given.
    """
    records = Records(root)
    resolver = Resolver(pipeline, records.root)
    planner = Planner(resolver, records)
    rows, lines = [["stage", "what", "why"]], []
    with Submitter(scheduler, options, records.jobs) as submitter:
        for name in pipeline.closure(list(only or pipeline.stages)):
            stage = resolver.stage(name, foresee=True)
            submitter.request(name, build(name, stage), "plan")
            step = planner.step(name)
            rows.append([name, step.action, step.why])
            lines.append(f"{name}: {shown(stage)}")
    return "\n".join([columns(rows), "", *lines])


def _given(words: Sequence[str]) -> dict[str, str | int | float | bool]:
    found: dict[str, str | int | float | bool] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise OptionError(f"--set {word}: write NAME=VALUE")
        found[name] = value
    return found


def main(argv: list[str] | None = None) -> None:
    """Run ``mim pipeline`` with the arguments ``argv`` (``None``: those of the process)."""
    command = tyro.cli(Command, args=argv, prog="mim pipeline", description=__doc__)
    check_domains(command)
    command.run()


if __name__ == "__main__":
    program.run(main)
