"""The demo's stages on a real Slurm of two nodes, while a rank dies, a job is preempted, a node is lost and a
time limit is reached: `make cluster`, as root.

Every stage runs twice: undisturbed with two ranks on one node, in a chain of dependent jobs, and with a rank
on each of two nodes under the faults. The predictions of both must be the same bytes. The exit status is 1 if
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
    PATIENCE,
    Job,
    lose_node,
    preempt,
    reach_time_limit,
    submit,
    submit_paused,
    wait_for,
)
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster
from mim_torchrec.benchmarks.paper.shop import CTR, ENCODER
from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import SetupError

RESOURCES = ("--cpu", "1", "--memMB", "3072")
CLASH = ("DistStoreError", "DistNetworkError", "RendezvousError", "do not meet", "Address already in use")
"""What a job says that met the store of another one, or found its port taken."""


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


def disturbed(
    config: ClusterConfig, slurm: SlurmCluster, shop: Path, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Job], list[Outcome]]:
    """Run all stages on two nodes, each fault in the middle of one."""
    planned = stages(config, shop)
    jobs: dict[str, Job] = {}
    outcomes: list[Outcome] = []
    faults: dict[str, list[tuple[str, Callable[[Job], None]]]] = {}

    def start(name: str) -> None:
        own, flags = planned[name]
        component = COMPONENT.get(name, name)
        jobs[name] = submit(slurm, folder, f"mim.{component}", *own, "-j", "2x1", *RESOURCES, "--", *flags)

    def start_paused(name: str) -> None:
        own, flags = planned[name]
        stage = COMPONENT.get(name, name)
        words = [word for word in own if word not in ("--out", name)] + flags
        jobs[name] = submit_paused(slurm, folder, folder / name, words, stage=stage, own=RESOURCES)

    def hit(name: str, fault: str, act: Callable[[Job], None]) -> None:
        say(f"{name}: {fault}")
        faults.setdefault(name, []).append((fault, act))
        began[name] = time.monotonic()
        act(jobs[name])

    def finish(name: str) -> None:
        state = jobs[name].end()
        for fault, _ in faults.get(name, []):
            restarts = int(jobs[name].field("Restarts"))
            resumed = state == "COMPLETED" and restarts > 0
            outcomes.append(
                Outcome(name, fault, state, restarts, round(time.monotonic() - began[name], 1), resumed)
            )
        if state != "COMPLETED":
            raise SetupError(f"job {name} ended as {state}: {jobs[name].log()[-3000:]}")

    began: dict[str, float] = {}
    start_paused("csft")
    hit("csft", "preempted", preempt)
    finish("csft")
    start("export")
    finish("export")
    start_paused("base")
    start_paused("mim")  # on the same nodes at the same time
    hit("base", "time limit", reach_time_limit)
    hit("mim", "rank killed", lambda job: job.signal_rank(1, signal.SIGKILL))
    finish("base")
    finish("mim")
    start("evaluate")
    wait_for(jobs["evaluate"], "RUNNING")
    hit("evaluate", "node lost", lose_node)
    finish("evaluate")
    return jobs, outcomes


def identical(one: Path, two: Path) -> dict[str, bool]:
    """Which predictions of two nodes have the bytes of those of one."""
    names = [f"{stage}/predictions.parquet" for stage in ("base", "mim", "evaluation")]
    return {name: (one / name).read_bytes() == (two / name).read_bytes() for name in names}


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
    with SlurmCluster(root / "slurm") as slurm:
        say(f"Slurm with {', '.join(slurm.nodes)}")
        alone = undisturbed(config, slurm, root / "shop", one)
        ends = {name: job.end() for name, job in alone.items()}
        say(f"one node: {', '.join(f'{name} {state}' for name, state in ends.items())}")
        jobs, outcomes = disturbed(config, slurm, root / "shop", two, say)
        logs = "".join(job.log() for job in [*alone.values(), *jobs.values()])
    same = identical(one, two)
    report = {
        "jobs": len(alone) + len(jobs),
        "faults": [asdict(outcome) for outcome in outcomes],
        "resumed": sum(outcome.resumed for outcome in outcomes),
        "identical": all(same.values()),
        "predictions": same,
        "hung": sum(outcome.seconds > PATIENCE for outcome in outcomes),
        "clashes": sum(logs.count(words) for words in CLASH),
        "seconds": round(time.monotonic() - began),
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }
    write_json(root / "report.json", report)
    print_table(report)
    good = report["resumed"] == len(outcomes) and report["identical"]
    if not good or report["hung"] or report["clashes"]:
        raise SystemExit(1)


def print_table(report: dict[str, Any]) -> None:
    """The faults and what became of them."""
    print(f"\n{'job':<10}{'fault':<14}{'state':<12}{'restarts':>8}{'seconds':>9}")
    for fault in report["faults"]:
        print(f"{fault['job']:<10}{fault['fault']:<14}{fault['state']:<12}{fault['restarts']:>8}"
              f"{fault['seconds']:>9}")  # fmt: skip
    print(f"\n{report['jobs']} jobs, {len(report['faults'])} faults, {report['resumed']} resumed, "
          f"predictions {'identical' if report['identical'] else 'DIFFERENT'}, {report['hung']} hung, "
          f"{report['clashes']} clashes, {report['seconds']} s")  # fmt: skip


if __name__ == "__main__":
    program.run(main)
