"""The demo's pipeline on a real Slurm of two nodes, under faults: `make cluster`, as root.

A rank dies, a job is preempted, a node is lost and a time limit is reached.

`mim pipeline run` submits the stages (stages.toml) twice: undisturbed with two ranks on one node, and with a
rank on each of two nodes under the faults. The predictions of both must be the same bytes. The exit status is
3 if a job did not resume, hung, or lost its store to another job, or if a result differs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.cluster.jobs import (
    COMPONENTS,
    HungJob,
    Job,
    lose_node,
    preempt,
    reach_time_limit,
    wait_until_paused,
)
from mim_torchrec.benchmarks.cluster.nodes import wait_until
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster
from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import SetupError, Status
from mim_torchrec.pipeline.records import Records

STAGES = Path(__file__).with_name("stages.toml")
NAMES = ("encoder", "table", "base", "mim", "evaluation")
PATIENCE = 900.0
"""Seconds until a job is submitted, or a pipeline has ended, many times what it takes on an idle machine."""
FAULTS = 4
"""How many are done to jobs."""
CLASH = ("the nodes of this job do not meet", "Address already in use")
"""What a job says that met the store of another one, or found its port taken; a job to which nothing was done
and that was started again counts too."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Run the demo's stages on a Slurm of two nodes with faults."""

    out: Path = Path("runs/cluster")
    """Directory of the report; what an earlier run has left there is removed."""
    items: int = 600
    """Items of the shop."""
    users: int = 300
    """Users of the shop."""
    requests: int = 3000
    """Requests of the shop."""
    searches: int = 1500
    """Image searches that C-SFT learns from."""
    epochs: int = 2
    """Passes of C-SFT and of the CTR models."""
    seed: int = 0
    """Seed of the shop and of all training."""


@dataclass
class Outcome:
    """What became of a job to which something was done."""

    job: str
    fault: str
    state: str
    restarts: int
    seconds: float
    resumed: bool


class PipelineRun:
    """`mim pipeline run` of the stages on Slurm, in a process of its own.

    Args:
        slurm: where it runs.
        folder: gets the logs of the jobs; the results are in `folder / "run"`.
        parameters: of stages.toml.
    """

    def __init__(self, slurm: SlurmCluster, folder: Path, parameters: dict[str, object]) -> None:
        folder.mkdir(parents=True)
        self._slurm, self._folder = slurm, folder
        self.root = folder / "run"
        self._records = Records(self.root)
        words = ["-m", "mim_torchrec.cli", "pipeline", "run", str(STAGES), "--out", str(self.root)]
        words += ["--scheduler", "slurm", "--set", *(f"{name}={value}" for name, value in parameters.items())]
        self._log = folder / "pipeline.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **slurm.environment, "MIM_PYTHON": sys.executable},
            )  # fmt: skip

    def job(self, stage: str) -> Job:
        """The job of a stage, as soon as it is submitted.

        Raises:
            SetupError: the pipeline ended before, or does not submit it.
        """
        wait_until(lambda: self._handle(stage) or self._process.poll() is not None, patience=PATIENCE)
        handle = self._handle(stage)
        if handle is None:
            raise SetupError(f"the pipeline ended before it submitted {stage}: {self.said()[-3000:]}")
        return Job(handle.rpartition("/")[2], self._folder, self._slurm)

    def jobs(self) -> dict[str, Job]:
        """The jobs that were submitted, by stage."""
        handles = {name: self._handle(name) for name in NAMES}
        return {name: self.job(name) for name, handle in handles.items() if handle is not None}

    def end(self) -> None:
        """Wait until the pipeline has ended.

        Raises:
            HungJob: it does not.
            SetupError: one of its stages failed.
        """
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise HungJob(f"the pipeline in {self._folder} does not end: {self.said()[-3000:]}") from None
        if status:
            raise SetupError(f"the pipeline in {self._folder} ended with {status}: {self.said()[-3000:]}")

    def cancel(self) -> None:
        """End the pipeline, which cancels its jobs, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def said(self) -> str:
        """What the pipeline has printed."""
        return self._log.read_text(errors="replace")

    def _handle(self, stage: str) -> str | None:
        record = self._records.read(stage)
        return None if record is None else record.handle


class Faults:
    """Faults in the middle of stages, and what becomes of their jobs.

    Args:
        run: of the pipeline whose csft and ctr wait for a fault.
        say: prints a line.
    """

    def __init__(self, run: PipelineRun, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._hits: dict[str, tuple[str, float]] = {}
        self.outcomes: list[Outcome] = []

    def inject(self) -> None:
        """Do all of them, and wait for the jobs.

        Raises:
            HungJob: a job did not end.
            SetupError: a job did not come back.
        """
        self._hit("encoder", "preempted", preempt)
        self._finish("encoder")
        self._finish("table")
        self._pause("mim")  # on the same nodes at the same time
        self._hit("base", "time limit", reach_time_limit)
        self._hit("mim", "rank killed", lambda job: job.signal_rank(1, signal.SIGKILL))
        self._finish("base")
        self._finish("mim")
        job = self._run.job("evaluation")
        job.wait(lambda: job.has_rank(1))
        self._hit("evaluation", "node lost", lose_node, is_paused=False)
        self._finish("evaluation")

    def _pause(self, name: str) -> Job:
        job = self._run.job(name)
        wait_until_paused(job, self._run.root / name)
        return job

    def _hit(self, name: str, fault: str, act: Callable[[Job], None], is_paused: bool = True) -> None:
        job = self._pause(name) if is_paused else self._run.job(name)
        self._say(f"{name}: {fault}")
        self._hits[name] = fault, time.monotonic()
        act(job)

    def _finish(self, name: str) -> None:
        job = self._run.job(name)
        state = job.end()
        if name in self._hits:
            fault, since = self._hits[name]
            restarts, seconds = int(job.field("Restarts")), round(time.monotonic() - since, 1)
            resumed = state == "COMPLETED" and restarts > 0
            self.outcomes.append(Outcome(name, fault, state, restarts, seconds, resumed))
        self._say(f"{name}: {state}")
        if state != "COMPLETED":
            raise SetupError(f"job {name} ended as {state}: {job.log()[-3000:]}")


def identical(one: Path, two: Path) -> dict[str, bool]:
    """Which predictions of two nodes have the bytes of those of one."""
    names = [f"{stage}/predictions.parquet" for stage in ("base", "mim", "evaluation")]
    pairs = {name: (one / name, two / name) for name in names}
    return {
        name: all(file.exists() for file in pair) and pair[0].read_bytes() == pair[1].read_bytes()
        for name, pair in pairs.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.cluster.main`.

    Raises:
        SetupError: this machine can run no Slurm, or a job did not come back.
    """
    config = tyro.cli(ClusterConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    root = config.out.resolve()
    if root.exists():
        shutil.rmtree(root)
    one, two = root / "one-node", root / "two-nodes"
    root.mkdir(parents=True)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {line}", flush=True)

    sizes = {"items": config.items, "users": config.users, "requests": config.requests,
             "searches": config.searches, "seed": config.seed, "browsing": 3 * config.requests}  # fmt: skip
    make_shop(["--out", str(root / "shop"), *(w for k, v in sizes.items() for w in (f"--{k}", str(v)))])
    common = {"shop": root / "shop", "epochs": config.epochs, "seed": config.seed}
    paused = {name: f"{COMPONENTS}:{name}" for name in ("csft", "ctr")}
    hung = 0
    with SlurmCluster(root / "slurm") as slurm:
        say(f"Slurm with {', '.join(slurm.nodes)}")
        runs = [
            PipelineRun(slurm, one, common | {"ranks": "1x2"}),
            PipelineRun(slurm, two, common | {"ranks": "2x1"} | paused),
        ]
        faults = Faults(runs[1], say)
        try:
            runs[0].end()
            say("one node: all stages done")
            faults.inject()
            runs[1].end()
        except HungJob as error:
            say(str(error))
            hung = 1
        finally:
            for run in runs:
                run.cancel()
        jobs = [job for run in runs for job in run.jobs().values()]
        logs = "".join(job.log() for job in jobs)
        restarts = [job.field("Restarts") for job in runs[0].jobs().values()]
    same = identical(runs[0].root, runs[1].root)
    report = {
        "jobs": len(jobs),
        "faults": len(faults.outcomes),
        "resumed": sum(outcome.resumed for outcome in faults.outcomes),
        "identical": all(same.values()),
        "outcomes": [asdict(outcome) for outcome in faults.outcomes],
        "predictions": same,
        "hung": hung,
        "clashes": sum(logs.count(words) for words in CLASH) + sum(count != "0" for count in restarts),
        "seconds": round(time.monotonic() - began),
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }
    write_json(root / "report.json", report)
    print_table(report)
    if report["resumed"] < FAULTS or not report["identical"] or hung or report["clashes"]:
        raise SystemExit(Status.DATA)


def print_table(report: dict[str, Any]) -> None:
    """Every fault and what became of its job."""
    print(f"\n{'job':<10}{'fault':<14}{'state':<12}{'restarts':>8}{'seconds':>9}")
    for fault in report["outcomes"]:
        print(f"{fault['job']:<10}{fault['fault']:<14}{fault['state']:<12}{fault['restarts']:>8}"
              f"{fault['seconds']:>9}")  # fmt: skip
    print(f"\n{report['jobs']} jobs, {report['faults']} faults, {report['resumed']} resumed, "
          f"predictions {'identical' if report['identical'] else 'DIFFERENT'}, {report['hung']} hung, "
          f"{report['clashes']} clashes, {report['seconds']} s")  # fmt: skip


if __name__ == "__main__":
    program.run(main)
