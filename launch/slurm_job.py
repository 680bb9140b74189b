"""The batch script of a job on Slurm: one role, a task on every node, started again after an interruption.

TorchX's own script makes a heterogeneous job with a part for every node. This one makes one job of equal
nodes, which can be preempted, requeued and charged as a whole. Tasks tell apart why they ended, because Slurm
keeps only the largest status of all tasks, and a task that was ended for another's error must not win:

    interrupted (143)        100
    failed, worth a retry    150 and above: signals (lost memory); 180 and above: lost peers, bugs
    failed for good          220 and above: options, data, versions, states, no such program
"""

import shlex
from dataclasses import dataclass, field

from torchx.specs import macros

from mim_torchrec.errors import Status
from mim_torchrec.version import __version__

FIRST_NODE = "MIM_FIRST_NODE"
"""The variable of a job that has the name of its first node."""
FINAL = (Status.USAGE, Status.DATA, Status.VERSION, Status.STATE)
"""Statuses that another attempt would end with too."""
OTHERS = 10
"""Seconds that tasks have after one of them has failed, as for an error of their own."""

TASK = """\
    trap asked=1 TERM  # the command gets the signal too, and this shell waits for its status
{exports}    {command} </dev/null
    status=$?
    [ $status -eq 0 ] || sleep {others}  # Slurm then ends the other tasks, which may have something to say
    case $status in
        0) exit {done} ;;
        143) exit 100 ;;
        {final}) exit $((220 + status)) ;;
        126|127) exit $((100 + status)) ;;
        129|13?|14?|15[0-7]) exit $((150 + status - 128)) ;;
        ?|1?) exit $((180 + status)) ;;
        *) exit 149 ;;
    esac
"""

BATCH = """\
#!/bin/bash
# Written by mim-torchrec {version}; submitted by: {submission}
{options}
export PYTHONUNBUFFERED=1
{first_node}=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export {first_node}

task() {{
{task}}}

srun {srun} bash -c "$(declare -f task); task"
status=$?
if [ $status -ge 226 ] && [ $status -le 227 ]; then
    status=$((status - 100)) verdict="failed"
elif [ $status -ge 221 ] && [ $status -le 225 ]; then
    status=$((status - 220)) verdict="failed"
elif [ $status -ge 200 ] || [ $status -eq 149 ]; then  # of srun itself, such as for a node that is lost
    status=1 verdict="failed, may be tried again"
elif [ $status -eq 100 ] || [ $status -eq 143 ]; then
    status=143 verdict="was interrupted"
elif [ $status -ge 180 ]; then
    status=$((status - 180)) verdict="failed, may be tried again"
elif [ $status -ge 150 ]; then
    status=$((status - 150 + 128)) verdict="failed, may be tried again"
elif [ $status -ne 0 ]; then
    verdict="failed, may be tried again"
else
    exit 0
fi
log="slurm-$SLURM_JOB_ID.out"
if [ "$verdict" = "was interrupted" ] && [ $SECONDS -lt {shortest} ]; then
    verdict="was interrupted within {shortest} s, may be tried again"  # counted: a loop would have no end
fi
echo "attempt ${{SLURM_RESTART_COUNT:-0}} $verdict, status $status"
counted=$(grep -c "may be tried again" "$log")
counted=${{counted:-$((${{SLURM_RESTART_COUNT:-0}} + 1))}}  # where SBATCH_OUTPUT names another log
if [ {retries} -gt 0 ] && [ "$verdict" != "failed" ] && [ "$counted" -le {retries} ]; then
    echo "the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


@dataclass
class Container:
    """How tasks run in a container image.

    Attributes:
        kind: `pyxis`, which adds options to srun, or `apptainer`, a program that starts the task.
        image: that either of them understands.
        mounts: `source:target` or `source:target:ro`.
    """

    kind: str
    image: str
    mounts: list[str]

    def srun(self) -> list[str]:
        """Options of srun."""
        if self.kind != "pyxis":
            return []
        mounts = [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        return [f"--container-image={self.image}", *mounts]

    def command(self) -> list[str]:
        """Words before the command of a task."""
        if self.kind != "apptainer":
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *binds, self.image]


@dataclass
class SlurmRequest:
    """A job as sbatch takes it.

    Attributes:
        name: of the job.
        nodes: how many; each runs one task.
        options: of sbatch, by name; None for those without a value.
        resources: of a task, which sbatch and srun both take.
        command: of a task. `${app_id}` and `${replica_id}` are filled in where it runs.
        env: variables of a task, with the same.
        max_retries: failures after which the job is queued again; 0 keeps it from being queued again at all.
        is_endless: whether a task that ended well, because it was asked to, was interrupted.
        shortest: seconds after which an interruption is no failure.
        job_dir: where the job runs; None for the folder of submission.
        workspace: what is copied there.
        container: of the tasks.
    """

    name: str
    nodes: int
    options: dict[str, str | None]
    resources: dict[str, str]
    command: list[str]
    env: dict[str, str]
    max_retries: int
    is_endless: bool = False
    shortest: int = 60
    job_dir: str | None = None
    workspace: str | None = None
    container: Container | None = None
    cmd: list[str] = field(default_factory=lambda: ["sbatch", "--parsable"])

    def script(self) -> str:
        """The batch script."""
        options: dict[str, str | None] = {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": "1",
            **self.resources,
            "output": "slurm-%j.out",
            "open-mode": "append",
            "requeue" if self.max_retries else "no-requeue": None,
            **self.options,
        }
        container = self.container.srun() if self.container is not None else []
        srun = [
            "--output=slurm-%j-%t.out",
            "--open-mode=append",
            "--unbuffered",
            "--wait=0",
            "--kill-on-bad-exit=1",
            *_flags(self.resources),
            *container,
        ]
        return BATCH.format(
            version=__version__,
            submission=shlex.join(self.cmd),
            options="\n".join(f"#SBATCH {shlex.quote(flag)}" for flag in _flags(options)),
            first_node=FIRST_NODE,
            srun=shlex.join(srun),
            task=self._task(),
            shortest=self.shortest,
            retries=self.max_retries,
        )

    def _task(self) -> str:
        prefix = self.container.command() if self.container is not None else []
        return TASK.format(
            exports="".join(f"    export {name}={_filled(value)}\n" for name, value in self.env.items()),
            command=" ".join(map(_filled, [*prefix, *self.command])),
            others=OTHERS,
            done="$((${asked:-0} * 100))" if self.is_endless else "0",
            final="|".join(str(int(status)) for status in FINAL),
        )

    def __repr__(self) -> str:
        return f"{shlex.join(self.cmd)} SCRIPT\n\n{self.script()}"


def _flags(options: dict[str, str] | dict[str, str | None]) -> list[str]:
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]


def _filled(text: str) -> str:
    """A word of bash that has the job's id and the number of the task where the macros of TorchX stand."""
    parts = text.split(macros.app_id)
    numbered = ['"$SLURM_PROCID"'.join(map(shlex.quote, part.split(macros.replica_id))) for part in parts]
    return '"$SLURM_JOB_ID"'.join(numbered)
