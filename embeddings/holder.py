"""A process that writes somewhere, as others read of it: who it is, and whether it still lives."""

import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from mim_torchrec.errors import ExpectedError, Status

HEARTBEAT = 10.0  # seconds between two signs of life
EXPIRY = 120.0  # seconds without one after which a lease may be taken over
JOBS = ("TORCHX_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


class LeaseError(ExpectedError, ValueError):
    """Another process writes into the directory."""

    status = Status.STATE


@dataclass(frozen=True)
class Holder:
    """A process that writes into a directory.

    Attributes:
        host: name of the machine.
        machine: its boot, and the process namespace; process ids of two of them are not comparable.
        pid: of the process.
        began: when the process began, in the machine's own count: process ids are used again.
        job: of a launcher, "" without one.
        since: when the lease was taken, for people.
        token: one for each lease.
    """

    host: str
    machine: str
    pid: int
    began: str
    job: str
    since: str
    token: str

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        job = next((name for name in map(os.environ.get, JOBS) if name not in (None, "", "none")), "")
        return cls(socket.gethostname(), _machine(), os.getpid(), _began(os.getpid()) or "", job,
                   time.strftime("%Y-%m-%d %H:%M:%S %z"), uuid.uuid4().hex)  # fmt: skip

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; of another machine nothing is known."""
        return self.machine == _machine() and _began(self.pid) != self.began


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _began(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine did; None where there is none, or a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
