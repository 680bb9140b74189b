"""The demo's stages on a real Slurm of two nodes, while a rank dies, a job is preempted, a node is lost and a
time limit is reached: `make cluster`, as root.

Every stage runs twice: undisturbed with two ranks on one node, in a chain of dependent jobs, and with a rank
on each of two nodes under the faults. The predictions of both must be the same bytes. The exit status is 3 if
a job did not resume, hung, or lost its store to another job, or if a result differs.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.cluster.jobs import (
    HungJob,
    Job,
    lose_node,
    preempt,
    reach_time_limit,
    submit,
    submit_paused,
)
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster
from mim_torchrec.benchmarks.paper.shop import CTR, ENCODER
from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import SetupError, Status

RESOURCES = ("--cpu", "1", "--memMB", "3072", "--env", "OMP_NUM_THREADS=1")  # sums depend on the threads
TWO_NODES = ("-j", "2x1", *RESOURCES)
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


def _flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def stages(config: ClusterConfig, shop: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Arguments of the components and flags of the stages, in their order; paths are relative."""
    csft = {"epochs": config.epochs, "batch-size": 128, "seed": config.seed, **ENCODER}
    ctr = {"epochs": config.epochs, "batch-size": 256, "seed": config.seed, **CTR}
    every = {"checkpoint.every": 1}
    data = ["--data", str(shop)]
    return {
        "csft": ([*data, "--out", "csft"], _flags(csft | every)),
        "export": ([*data, "--encoder", "csft/encoder", "--out", "table"], []),
        "base": ([*data, "--out", "base"], _flags(ctr | every | {"mim": "off"})),
        "mim": ([*data, "--out", "mim", "--table", "table"], _flags(ctr | every)),
        "evaluate": (["--model", "mim", "--out", "evaluation"], []),
    }


COMPONENT = {"base": "ctr", "mim": "ctr"}
AFTER = {"export": ("csft",), "mim": ("export",), "evaluate": ("mim",)}


def undisturbed(config: ClusterConfig, slurm: SlurmCluster, shop: Path, folder: Path) -> dict[str, Job]:
    """Submit all stages at once, on one node each; those that need others wait for them."""
    jobs: dict[str, Job] = {}
    for name, (own, flags) in stages(config, shop).items():
        before = [jobs[other].id for other in AFTER.get(name, ())]
        jobs[name] = submit(
            slurm, folder, f"mim.{COMPONENT.get(name, name)}", *own, "-j", "1x2", *RESOURCES, "--", *flags,
            options=f"dependency=afterok:{':'.join(before)}" if before else "",
        )  # fmt: skip
    return jobs


class Disturbed:
    """All stages on two nodes, each fault in the middle of one.

    Args:
        config: of the run.
        slurm: where it runs.
        shop: the data.
        folder: gets the results.
        say: prints a line.
    """

    def __init__(
        self, config: ClusterConfig, slurm: SlurmCluster, shop: Path, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._slurm, self._folder, self._say = slurm, folder, say
        self._planned = stages(config, shop)
        self._hits: dict[str, tuple[str, float]] = {}
        self.jobs: dict[str, Job] = {}
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Run everything.

        Raises:
            HungJob: a job did not end.
            SetupError: a job did not come back.
        """
        self._start("csft", paused=True)
        self._hit("csft", "preempted", preempt)
        self._finish("csft")
        self._start("export")
        self._finish("export")
        self._start("base", paused=True)
        self._start("mim", paused=True)  # on the same nodes at the same time
        self._hit("base", "time limit", reach_time_limit)
        self._hit("mim", "rank killed", lambda job: job.signal_rank(1, signal.SIGKILL))
        self._finish("base")
        self._finish("mim")
        job = self._start("evaluate")
        job.wait(lambda: job.has_rank(1))
        self._hit("evaluate", "node lost", lose_node)
        self._finish("evaluate")

    def _start(self, name: str, paused: bool = False) -> Job:
        own, flags = self._planned[name]
        stage = COMPONENT.get(name, name)
        if paused:
            rest = [*own, *flags]
            at = rest.index("--out")
            rest[at : at + 2] = []  # an argument of the component of its own
            self.jobs[name] = submit_paused(
                self._slurm, self._folder, self._folder / name, rest, stage=stage, own=TWO_NODES
            )
        else:
            words = [*own, *TWO_NODES, "--", *flags]
            self.jobs[name] = submit(self._slurm, self._folder, f"mim.{stage}", *words)
        return self.jobs[name]

    def _hit(self, name: str, fault: str, act: Callable[[Job], None]) -> None:
        self._say(f"{name}: {fault}")
        self._hits[name] = fault, time.monotonic()
        act(self.jobs[name])

    def _finish(self, name: str) -> None:
        job = self.jobs[name]
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
    for folder in (one, two):
        folder.mkdir(parents=True)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {line}", flush=True)

    sizes = {"items": config.items, "users": config.users, "requests": config.requests,
             "searches": config.searches, "seed": config.seed, "browsing": 3 * config.requests}  # fmt: skip
    make_shop(["--out", str(root / "shop"), *_flags(sizes)])
    hung = 0
    with SlurmCluster(root / "slurm") as slurm:
        say(f"Slurm with {', '.join(slurm.nodes)}")
        two_nodes = Disturbed(config, slurm, root / "shop", two, say)
        alone = undisturbed(config, slurm, root / "shop", one)
        try:
            ends = {name: job.end() for name, job in alone.items()}
            say(f"one node: {', '.join(f'{name} {state}' for name, state in ends.items())}")
            two_nodes.run()
        except HungJob as error:
            say(str(error))
            hung = 1
        logs = "".join(job.log() for job in [*alone.values(), *two_nodes.jobs.values()])
        restarts = [job.field("Restarts") for job in alone.values()]
    same = identical(one, two)
    report = {
        "jobs": len(alone) + len(two_nodes.jobs),
        "faults": len(two_nodes.outcomes),
        "resumed": sum(outcome.resumed for outcome in two_nodes.outcomes),
        "identical": all(same.values()),
        "outcomes": [asdict(outcome) for outcome in two_nodes.outcomes],
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
