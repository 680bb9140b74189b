"""Jobs on a Slurm of this machine, submitted as a user does, and the faults that are done to them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mim_torchrec.benchmarks.cluster.nodes import wait_until
from mim_torchrec.benchmarks.cluster.slurm import ENDED, SlurmCluster
from mim_torchrec.errors import SetupError
from mim_torchrec.training.checkpoints import checkpoints_in

COMPONENTS = Path(__file__).with_name("components.py")
PATIENCE = 600.0
"""Seconds that anything of a job may take, many times what it takes on an idle machine."""
TORCHX = (sys.executable, "-m", "torchx.cli.main")
"""The command `torchx`."""
SMALL = ("-j", "2x1", "--cpu", "1", "--memMB", "2048")
"""A job of two nodes that leaves room for three more on them."""


class HungJob(SetupError):
    """A job neither ends nor comes to what was waited for."""


@dataclass(frozen=True)
class Job:
    """A job that was submitted.

    Attributes:
        id: its number.
        folder: it was submitted from there, and has its logs there.
        slurm: where it runs.
    """

    id: str
    folder: Path
    slurm: SlurmCluster

    @property
    def handle(self) -> str:
        """What `torchx status`, `log` and `cancel` take."""
        return f"slurm://torchx/{self.id}"

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        text = self.slurm.call("scontrol", "show", "job", "--oneliner", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", text))[name]

    def end(self) -> str:
        """Wait until the job has ended for good; returns its state.

        Raises:
            HungJob: it takes too long; the end of its logs is in the message.
        """
        self.wait(lambda: self.field("JobState") in ENDED)
        return self.field("JobState")

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait for something of the job.

        Raises:
            HungJob: it takes too long; the end of its logs is in the message.
        """
        try:
            wait_until(condition, patience=PATIENCE)
        except SetupError:
            raise HungJob(f"job {self.id} does not go on: {self.log()[-3000:]}") from None

    def log(self, node: int | None = None) -> str:
        """What a node said in all attempts; by default all of them and the batch script."""
        pattern = f"slurm-{self.id}-{node}.out" if node is not None else f"slurm-{self.id}*.out"
        files = sorted(self.folder.glob(pattern))
        return "".join(f"=== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def rank(self, rank: int) -> int:
        """The process of a rank, in the numbers of this machine."""
        wanted = {f"SLURM_CONF={self.slurm.configuration}", f"SLURM_JOB_ID={self.id}", f"RANK={rank}"}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted <= set(environment) and b"python" in os.path.basename(command[0]):
                return int(folder.name)
        raise SetupError(f"job {self.id} has no rank {rank} here")

    def has_rank(self, rank: int) -> bool:
        """Whether the process of a rank has started."""
        try:
            return self.rank(rank) > 0
        except SetupError:
            return False

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to the process of a rank."""
        os.kill(self.rank(rank), number)


def torchx(
    slurm: SlurmCluster, folder: Path, *words: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `torchx <words>` in a folder, with this interpreter for its jobs."""
    known = {**os.environ, **slurm.environment, "MIM_PYTHON": sys.executable, **(environment or {})}
    return subprocess.run(
        [*TORCHX, "--log_level", "WARNING", *words],
        cwd=folder, env=known, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def submit(
    slurm: SlurmCluster,
    folder: Path,
    component: str,
    *words: str,
    options: str = "",
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Submit a job by `torchx run -s slurm`.

    Args:
        slurm: where to.
        folder: from where.
        component: its name, or file:function.
        words: its arguments.
        options: of the run, `name=value,…`.
        environment: variables of the job, beyond those of this process.

    Raises:
        SetupError: it is refused.
    """
    start = ["run", "-s", "slurm", *(["-cfg", options] if options else [])]
    done = torchx(slurm, folder, *start, component, *words, environment=environment)
    found = re.search(r"^slurm://torchx/(\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise SetupError(f"torchx run {component} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return Job(found[1], folder, slurm)


def submit_paused(
    slurm: SlurmCluster,
    folder: Path,
    out: Path,
    words: list[str],
    *,
    own: Sequence[str] = SMALL,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Submit a CTR run whose last rank waits in a step, and wait until it waits behind a checkpoint.

    Args:
        slurm: where to.
        folder: from where.
        out: directory of the results.
        words: flags of the stage, which writes a checkpoint after every step.
        own: further arguments of the component.
        environment: variables of the job, beyond those of this process.
    """
    flags = [*own, "--out", str(out), "--", *words]
    job = submit(slurm, folder, f"{COMPONENTS}:ctr", *flags, environment=environment)
    wait_until_paused(job, out)
    return job


def wait_until_paused(job: Job, out: Path) -> None:
    """Wait until the last rank of a paused stage waits behind a checkpoint.

    Raises:
        SetupError: the job ended before.
    """
    file = out.with_name(out.name + ".waits")
    job.wait(lambda: file.exists() or job.field("JobState") in ENDED)
    if not file.exists():
        raise SetupError(f"job {job.id} ended before its fault: {job.log()[-3000:]}")
    job.wait(lambda: checkpoints_in(out / "checkpoints"))  # written in the background


def preempt(job: Job) -> None:
    """Let a job of more importance take all nodes for a moment."""
    slurm = job.slurm
    count = str(len(slurm.nodes))
    words = ["--partition=high", "--exclusive", f"--nodes={count}", "--output=/dev/null", "--wrap", "true"]
    slurm.call("sbatch", "--wait", *words)


def reach_time_limit(job: Job) -> None:
    """Let the time limit come near, and take it away for the next attempt."""
    hours, minutes, seconds = map(int, job.field("RunTime").split(":"))
    ran = (hours * 60 + minutes) * 60 + seconds
    job.slurm.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={ran // 60 + 2}")
    _wait_for_next_attempt(job)
    job.slurm.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")


RESENT = 75
"""Seconds after which Slurm has sent again (after 60) what a lost node did not answer."""


def lose_node(job: Job) -> None:
    """Cut the power of the node of the last rank, and give it back when Slurm has noticed.

    The order to end the first attempt, sent again, would end a second one that runs already. Slurm's own
    delay of a requeued job, two minutes, is longer than that; here it is shorter.
    """
    name = job.slurm.nodes[-1]
    job.slurm.lose(name)
    _wait_for_next_attempt(job)
    job.slurm.call("scontrol", "update", f"JobId={job.id}", f"StartTime=now+{RESENT}")
    job.slurm.restore(name)


def _wait_for_next_attempt(job: Job) -> None:
    job.wait(lambda: job.field("Restarts") != "0" or job.field("JobState") in ENDED)
    if job.field("JobState") in ENDED:
        raise SetupError(f"job {job.id} was not queued again: {job.field('JobState')}, {job.log()[-3000:]}")
