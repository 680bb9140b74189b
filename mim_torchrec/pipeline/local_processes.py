"""The processes of jobs on this machine, found by a variable in their environment.

A job of the scheduler local_cwd is a tree of processes in several sessions: bash or torchrun, and its ranks.
No server knows it. So every process carries the mark of its job, and is found and ended by it, also when the
process that started the job is dead.
"""

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from mim_torchrec.errors import SetupError

MARK = "MIM_PIPELINE_JOB"
GRACE = 150.0  # seconds from SIGTERM to SIGKILL: `launch/jobs.py` gives ranks 120
KILLED = 30.0  # seconds from SIGKILL to the end of a process that the kernel holds
PAUSE = 0.05


def processes_of(marks: Collection[str]) -> dict[int, int]:
    """Processes of jobs on this machine, each with its parent; those that have ended are left out.

    Args:
        marks: of the jobs.
    """
    wanted = {f"{MARK}={mark}".encode() for mark in marks}
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            if wanted.isdisjoint((entry / "environ").read_bytes().split(b"\0")):
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(entry.name)] = int(parent)
    return found


def end(marks: Collection[str], grace: float = GRACE) -> int:
    """End every process of jobs: SIGTERM to the first of each tree, and SIGKILL to all that stay.

    Args:
        marks: of the jobs.
        grace: seconds that they have to write a checkpoint.

    Returns:
        How many processes were signalled.

    Raises:
        SetupError: a process cannot be ended.
    """
    told: set[int] = set()
    until = time.monotonic() + grace
    while (found := processes_of(marks)) and time.monotonic() < until:
        # a rank is told by torchrun; where torchrun has died, it has become the first itself
        told |= _signal({pid for pid, parent in found.items() if parent not in found} - told, signal.SIGTERM)
        time.sleep(PAUSE)
    until = time.monotonic() + KILLED
    while found := processes_of(marks):  # a process may have started another meanwhile
        told |= _signal(set(found), signal.SIGKILL)
        if time.monotonic() > until:
            raise SetupError(f"processes {sorted(found)} do not end; stop them by hand")
        time.sleep(PAUSE)
    return len(told)


def _signal(processes: set[int], number: signal.Signals) -> set[int]:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return processes
