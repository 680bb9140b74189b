"""What is known of a run from outside: the states of its stages, and how to cancel it."""

import sys
import time
from dataclasses import replace
from pathlib import Path

from torchx.runner import Runner, get_runner

from mim_torchrec.embeddings.holder import EXPIRY, LeaseError
from mim_torchrec.pipeline import local_processes, submission
from mim_torchrec.pipeline.records import CANCELLED, Record, Records
from mim_torchrec.pipeline.reporting import StageResult
from mim_torchrec.pipeline.resolving import Resolver

PATIENCE = EXPIRY + 2 * local_processes.GRACE
"""Seconds in which a run that was asked to end has ended, or has given no sign of life for so long."""


def states(root: Path) -> list[StageResult]:
    """The states of the stages of a run, in the order of its pipeline.

    Raises:
        RecordError: no pipeline was run there.
    """
    records = Records(root)
    pipeline = records.pipeline()
    resolver = Resolver(pipeline, records.root)
    with get_runner() as runner:
        found = []
        for name in pipeline.stages:
            record = records.read(name)
            if record is None:
                found.append(StageResult(name=name, state="waiting"))
                continue
            out = resolver.output(name) if record.state == "done" else None
            found.append(
                StageResult(name=name, state=_state(runner, record), seconds=record.seconds, why=record.why,
                            handle=record.handle, command=record.command, out=out)
            )  # fmt: skip
    return found


def _state(runner: Runner, record: Record) -> str:
    """What the scheduler says of a job that may run; the record's own word of any other."""
    if not record.is_active:
        return record.state
    if record.scheduler == submission.LOCAL:
        if not record.is_of_this_machine:
            return f"{record.state} on {record.host}"
        return "running" if local_processes.processes_of([record.mark]) else "interrupted"
    if record.handle is None:
        return "interrupted"
    status = runner.status(record.handle)
    return "interrupted" if status is None else str(status.state).lower()


def cancel(root: Path) -> list[str]:
    """Cancel the jobs of a run, and end the process that runs it.

    Args:
        root: directory of the run.

    Returns:
        Stages whose jobs were cancelled here: those of a process that had been killed.

    Raises:
        RecordError: no pipeline was run there.
        LeaseError: the process that runs it does not end.
        SetupError: a job is one of another machine, or does not end.
    """
    records = Records(root)
    records.pipeline()
    records.cancel_request.touch()
    until, said = time.monotonic() + PATIENCE, False
    try:
        while True:
            try:
                with records.writing():
                    return _cancel_left(records)
            except LeaseError as error:
                if time.monotonic() > until:
                    raise
                if not said:
                    print(f"waiting for its process to end: {error}", file=sys.stderr, flush=True)
                    said = True
                time.sleep(0.2)
    finally:  # not before: the process may be busy with a scheduler when it is asked to end
        records.cancel_request.unlink(missing_ok=True)


def _cancel_left(records: Records) -> list[str]:
    records.check_lease()
    left = {name: record for name, record in records.all().items() if record.is_active}
    with get_runner() as runner:
        submission.cancel(runner, left.values())
    for name, record in left.items():
        records.write(name, replace(record, state=CANCELLED))
    return list(left)
