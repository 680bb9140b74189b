"""`torchx run -s slurm`: TorchX's scheduler for Slurm, where it drops nothing that was asked for.

TorchX's own drops images, mounts, numbers of nodes that may shrink and several options of a site without a
word, divides a job into parts that are preempted one by one, needs accounting for `torchx status`, and makes
folders in a dry run. This one does what it is asked, or refuses it before anything is submitted.
"""

import csv
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from torchx.schedulers.api import (
    AppDryRunInfo,
    DescribeAppResponse,
    ListAppResponse,
    Stream,
    filter_regex,
    split_lines_iterator,
)
from torchx.schedulers.local_scheduler import LogIterator
from torchx.schedulers.slurm_scheduler import SLURM_STATES
from torchx.schedulers.slurm_scheduler import SlurmScheduler as OfTorchX
from torchx.specs import AppDef, AppState, BindMount, ReplicaStatus, Role, RoleStatus, macros, runopts
from torchx.version import TORCHX_IMAGE
from torchx.workspace.dir_workspace import _copy_to_dir

from mim_torchrec.errors import OptionError, SetupError
from mim_torchrec.launch.jobs import ENDLESS
from mim_torchrec.launch.refusals import refusals
from mim_torchrec.launch.slurm_job import FIRST_NODE, Container, SlurmRequest

OPTIONS = {
    "account": "account that pays for the job",
    "qos": "quality of service",
    "reservation": "reservation to run in",
    "exclude": "nodes not to run on",
    "dependency": "jobs to wait for, such as afterok:123; the job is cancelled where they fail",
}
"""Further options of sbatch that are run options."""
OF_TORCHX = ("partition", "time", "comment", "constraint", "mail-user", "mail-type")
CONTAINERS = ("pyxis", "apptainer")
CONTAINER = "how --image runs: pyxis (options of srun) or apptainer (a program on the nodes)"
WARNING = (
    "seconds before the time limit at which the job is told to checkpoint and is queued again; Slurm may be "
    "60 s early; 0: never"
)
STATES = {state: SLURM_STATES.get(state, AppState.UNKNOWN) for state in SLURM_STATES} | {
    "COMPLETING": AppState.RUNNING,
    "CONFIGURING": AppState.PENDING,
    "REQUEUE_HOLD": AppState.PENDING,
    "SIGNALING": AppState.RUNNING,
    "STAGE_OUT": AppState.RUNNING,
    "STOPPED": AppState.RUNNING,
}


class SlurmScheduler(OfTorchX):
    """Jobs of equal nodes on Slurm, one role each."""

    def _run_opts(self) -> runopts:
        options = super()._run_opts()
        for name, text in OPTIONS.items():
            options.add(name, type_=str, default=None, help=text)
        options.add("container", type_=str, default=None, help=CONTAINER)
        options.add("warning", type_=int, default=300, help=WARNING)
        return options

    def build_workspace_and_update_role(self, role: Role, workspace: str, cfg: Mapping[str, Any]) -> None:
        """Remember what is to be copied into `job_dir`, which `schedule` makes."""
        if cfg.get("job_dir"):
            role.metadata["workspace"] = workspace

    @refusals()
    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo[SlurmRequest]:
        role = _only_role(app)
        job_dir = cfg.get("job_dir")
        if job_dir and os.path.exists(job_dir):
            raise OptionError(f"job_dir {job_dir} exists; name a new one")
        options = {name: str(cfg[name]) for name in (*OF_TORCHX, *OPTIONS) if cfg.get(name) is not None}
        if "dependency" in options:
            options["kill-on-invalid-dep"] = "yes"
        warning = cfg["warning"]
        if role.max_retries and warning:
            limit = _seconds(options["time"]) if "time" in options else None
            if limit is not None and limit <= warning + 60:
                raise OptionError(
                    f"time {options['time']} leaves no time before the warning at the end: give more than "
                    f"{warning + 60} s, or a smaller warning (now {warning} s)"
                )
            options["signal"] = f"TERM@{warning}"
        image_root = os.path.abspath(job_dir) if job_dir else ""
        filled = macros.Values(
            img_root=image_root, app_id=macros.app_id, replica_id=macros.replica_id, rank0_env=FIRST_NODE
        ).apply(role)
        request = SlurmRequest(
            name=app.name,
            nodes=role.num_replicas,
            options=dict(options),
            resources=_resources(role, cfg.get("partition")),
            command=[filled.entrypoint, *filled.args],
            env=dict(filled.env),
            max_retries=role.max_retries,
            is_endless=role.max_retries >= ENDLESS,
            job_dir=os.path.abspath(job_dir) if job_dir else None,
            workspace=role.metadata.get("workspace"),
            container=_container(role, cfg.get("container")),
        )
        if request.job_dir is not None:
            request.cmd.append(f"--chdir={request.job_dir}")
        return AppDryRunInfo(request, repr)

    @refusals()
    def schedule(self, dryrun_info: AppDryRunInfo[SlurmRequest]) -> str:
        """Submit a job.

        Returns:
            Its id.

        Raises:
            OptionError: sbatch refuses it or is not there; the message is Slurm's.
        """
        request = dryrun_info.request
        if request.job_dir is not None:
            os.mkdir(request.job_dir)
            if request.workspace is not None:
                _copy_to_dir(request.workspace, request.job_dir)
        try:
            return _slurm(*request.cmd, script=request.script()).strip().partition(";")[0]
        except SetupError as error:
            raise OptionError(str(error)) from None

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """State, nodes and restarts of a job, by the controller, or by accounting later."""
        job = _of_controller(app_id) or _of_accounting(app_id)
        if job is None:
            return None
        state = STATES.get(job["JobState"], AppState.UNKNOWN)
        name, count = job["JobName"], int(job["NumNodes"].partition("-")[0] or 1)
        replicas = [ReplicaStatus(id=number, role=name, state=state, hostname="") for number in range(count)]
        reason = job.get("Reason", "None")
        return DescribeAppResponse(
            app_id=app_id,
            state=state,
            num_restarts=int(job.get("Restarts") or 0),
            msg=job["JobState"] + (f" ({reason})" if reason not in ("None", "") else ""),
            roles=[Role(name=name, image="", num_replicas=count)],
            roles_statuses=[RoleStatus(name, replicas)],
        )

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Lines of the k-th node, of all attempts: output and errors are in one file, in their order."""
        if since or until:
            raise OptionError("logs on Slurm have no times to choose by; leave --since and --until out")
        if streams not in (None, Stream.COMBINED):
            raise OptionError("logs on Slurm hold output and errors in one file; leave --streams out")
        job = _of_controller(app_id) or _of_accounting(app_id) or {}
        file = os.path.join(job.get("WorkDir", ""), f"slurm-{app_id}-{k}.out")
        lines: Iterable[str] = split_lines_iterator(LogIterator(app_id, file, self, should_tail=should_tail))
        return filter_regex(regex, lines) if regex else lines

    def list(self) -> list[ListAppResponse]:
        """The user's own jobs: those that the controller knows, and those of a month that accounting has."""
        text = _slurm("squeue", "--me", "--states=all", "--noheader", "--format=%A|%T")
        known = dict(line.split("|") for line in text.split())
        known = {str(row["JobID"]): row["State"] for row in _accounted("-S", "now-30days")} | known
        return [
            ListAppResponse(app_id=job, state=STATES.get(state.split()[0], AppState.UNKNOWN))
            for job, state in sorted(known.items(), key=lambda item: int(item[0]))
        ]

    def _cancel_existing(self, app_id: str) -> None:
        _slurm("scancel", app_id)


def create_scheduler(session_name: str, **_: Any) -> SlurmScheduler:
    """What TorchX calls for `-s slurm`."""
    return SlurmScheduler(session_name)


def _only_role(app: AppDef) -> Role:
    """The role of a job.

    Raises:
        OptionError: a job of another kind, or something of it that Slurm does not have.
    """
    if len(app.roles) != 1:
        raise OptionError(f"{app.name} has {len(app.roles)} roles; on Slurm submit a job for each")
    role = app.roles[0]
    if role.min_replicas is not None and role.min_replicas != role.num_replicas:
        raise OptionError(
            f"-j {role.min_replicas}:{role.num_replicas}x…: jobs on Slurm keep their nodes; give one number. "
            "A job that loses a node is queued again and resumes (--max_retries)"
        )
    return role


def _resources(role: Role, partition: str | None) -> dict[str, str]:
    found = {}
    resource = role.resource
    if resource.cpu > 0:
        found["cpus-per-task"] = str(resource.cpu)
    if resource.gpu > 0:
        found["gpus-per-task"] = str(resource.gpu)
    if resource.memMB > 0 and _has_memory(partition):
        found["mem"] = str(resource.memMB)
    return found


def _container(role: Role, kind: str | None) -> Container | None:
    if kind is None:
        image = role.image if role.image != TORCHX_IMAGE else ""  # the default of TorchX's own components
        for flag, value in (("--image", image), ("--mounts", role.mounts)):
            if value:
                raise OptionError(
                    f"{flag} has no effect on Slurm without containers: leave it out to use the nodes' own "
                    f"environment (MIM_PYTHON), or name them: -cfg container={'|'.join(CONTAINERS)}"
                )
        return None
    if kind not in CONTAINERS:
        raise OptionError(f"container {kind} is unknown; it is one of {', '.join(CONTAINERS)}")
    if not role.image:
        raise OptionError(f"container={kind} needs an --image")
    mounts = []
    for mount in role.mounts:
        if not isinstance(mount, BindMount):
            raise OptionError(f"--mounts {mount}: containers on Slurm have bind mounts only (type=bind)")
        mounts.append(f"{mount.src_path}:{mount.dst_path}" + (":ro" if mount.read_only else ""))
    return Container(kind, role.image, mounts)


def _seconds(limit: str) -> int | None:
    """Seconds of `[days-]hours:minutes:seconds`, `minutes[:seconds]` or `days-hours`; None for no limit."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        raise OptionError(f"time {limit} is none of minutes, hours:minutes:seconds and days-hours:minutes")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def _has_memory(partition: str | None) -> bool:
    """Whether nodes of a partition have memory to give; some clusters do not configure any."""
    try:
        lines = _slurm("sinfo", "--noheader", "--noconvert", "--format=%P|%m").split()
    except SetupError:
        return True  # a dry run far from the cluster
    known = dict(line.rsplit("|", 1) for line in lines)
    default = next((name.rstrip("*") for name in known if name.endswith("*")), None)
    memory = {name.rstrip("*"): int(size.rstrip("+M")) for name, size in known.items()}
    return memory.get(partition or default or "", 1 << 30) > 1000


def _slurm(*words: str, script: str | None = None) -> str:
    """What a program of Slurm prints.

    Raises:
        SetupError: it ends with an error, or is not there.
    """
    try:
        done = subprocess.run(words, input=script or "", capture_output=True, text=True)
    except FileNotFoundError:
        raise SetupError(
            f"{words[0]} is not installed; submit from a machine with Slurm's programs"
        ) from None
    if done.returncode:
        raise SetupError(f"{words[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _of_controller(app_id: str) -> dict[str, str] | None:
    """The fields of `scontrol show job`; None where the controller does not know the job any more."""
    try:
        text = _slurm("scontrol", "show", "job", "--oneliner", app_id)
    except SetupError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def _of_accounting(app_id: str) -> dict[str, str] | None:
    for row in _accounted("-j", app_id):
        names = {"JobName": row["JobName"], "NumNodes": row["NNodes"], "WorkDir": row["WorkDir"]}
        return {"JobState": row["State"].split()[0], **names}  # "CANCELLED by 0"
    return None


def _accounted(*words: str) -> list[dict[str, str]]:
    """Jobs that accounting knows; none where a cluster has no accounting."""
    fields = "JobID,JobName,State,NNodes,WorkDir"
    try:
        text = _slurm("sacct", "--allocations", "--parsable2", f"--format={fields}", *words)
    except SetupError as error:
        if "accounting" in str(error).lower():  # "Slurm accounting storage is disabled"
            return []
        raise
    return [row for row in csv.DictReader(text.splitlines(), delimiter="|") if row["JobID"].isdigit()]
