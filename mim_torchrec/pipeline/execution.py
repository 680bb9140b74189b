"""One run of a pipeline: submits stages when those before them are done, ends their jobs on every way out."""

import sys
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torchx.specs as specs
from torchx.specs.api import AppState

from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.errors import ExpectedError, SetupError
from mim_torchrec.extras import require
from mim_torchrec.pipeline import local_processes, submission
from mim_torchrec.pipeline.outputs import is_there, remove_output
from mim_torchrec.pipeline.planning import KEEP, RESUME, Planner, Step
from mim_torchrec.pipeline.records import CANCELLED, DONE, FAILED, RUNNING, SUBMITTED, Record, Records
from mim_torchrec.pipeline.reporting import StageResult, end_of_log, write_report
from mim_torchrec.pipeline.resolving import Resolver
from mim_torchrec.pipeline.signals import RunInterrupted, Signals
from mim_torchrec.pipeline.spec import Pipeline
from mim_torchrec.pipeline.submission import LOCAL, JobStatus, Submitter

if TYPE_CHECKING:
    from mim_torchrec.pipeline.tracking import Tracker

PAUSE = {LOCAL: 0.2}
OTHER_PAUSE = 5.0
"""Seconds between two looks at the jobs, by scheduler."""
LOOK_SHARE = 0.01
"""Of the time that local jobs have run, the time until the next look."""
UNANSWERED = 120
"""Questions that a scheduler may leave without an answer, one after the other."""


class StageError(ExpectedError, RuntimeError):
    """A stage ended with an error; the end of its log is on standard error."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a pipeline is run.

    Args:
        scheduler: of TorchX.
        scheduler_args: its options, `key=value,key=value`.
        jobs: stages that run side by side; by default one on local_cwd, and as many as can elsewhere.
        only: stages to run, with all before them; by default all.
        verbose: print a line when a stage starts and when it ends.
        unmentioned: stages that are not mentioned where they are kept.
        mlflow: tracking URI of MLflow that gets the results; by default none does.
        experiment: of MLflow; by default the name of the pipeline.
    """

    scheduler: str = LOCAL
    scheduler_args: str = ""
    jobs: int | None = None
    only: Sequence[str] = ()
    verbose: bool = True
    unmentioned: Collection[str] = ()
    mlflow: str | None = None
    experiment: str | None = None


@dataclass(kw_only=True)
class _Job:
    """A stage that has been submitted."""

    record: Record
    handle: str
    app: specs.AppDef
    began: float | None  # None until it runs
    before: float  # seconds of earlier attempts


class Execution:
    """One run of a pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        records: Records,
        options: RunOptions,
        names: Sequence[str],
        signals: Signals,
        submitter: Submitter,
    ) -> None:
        self.pipeline, self.records, self.options = pipeline, records, options
        self.signals, self.submitter = signals, submitter
        self.resolver = Resolver(pipeline, records.root)
        self.planner = Planner(self.resolver, records)
        self.tracker = _tracker(options, self.resolver, records)
        self.waiting = list(names)
        self.running: dict[str, _Job] = {}
        self.results = {name: StageResult(name=name, state="waiting") for name in names}
        self.failed: list[StageError] = []
        self.began = time.time()
        self.unanswered = 0
        unlimited = len(names) or 1
        self.jobs = options.jobs or (1 if submitter.is_local else unlimited)
        self.pause = PAUSE.get(options.scheduler, OTHER_PAUSE)

    def run(self) -> dict[str, StageResult]:
        """Until nothing is left to do."""
        for name in self.waiting:  # what would be refused is refused before anything runs
            stage = self.resolver.stage(name, foresee=True)
            self.submitter.request(f"{self.pipeline.name}-{name}", submission.build(name, stage), "check")
        try:
            self._recover()
            while True:
                self._submit_ready()
                self._check_orders()
                if not self.running:
                    break
                self._wait()
                self._check_orders()
                for name in list(self.running):
                    if name in self.running:  # not cancelled because of one before it
                        self._look_at(name)
        except BaseException:
            self._check_before_cancelling()
            self._cancel_all()
            with suppress(SetupError):  # MLflow is away, which is no news now
                self._report()
            raise
        self._report()
        if self.failed:
            raise self.failed[0]
        return self.results

    def _report(self) -> None:
        report = write_report(self.records, self.pipeline, self.options.scheduler, self.began, self.results)
        if self.tracker is not None:
            self.tracker.close(report["state"])

    def _recover(self) -> None:
        """Find jobs that a killed run has left: wait for those of a server, cancel local, outdated ones."""
        left = {name: record for name, record in self.records.all().items() if record.is_active}
        for name, record in list(left.items()):
            if self._can_adopt(name, record):
                assert record.handle is not None
                stage = self.resolver.stage(name)
                app = submission.build(name, stage)
                self.waiting.remove(name)
                self.running[name] = _Job(record=record, handle=record.handle, app=app, began=None,
                                          before=record.seconds)  # fmt: skip
                self._say(f"{name}: still there, {record.handle}")
                del left[name]
        if count := submission.cancel(self.submitter.runner, left.values()):
            self._say(f"cancelled {count} jobs that an earlier run had left")
        for name, record in left.items():
            self.records.write(name, replace(record, state=CANCELLED))

    def _can_adopt(self, name: str, record: Record) -> bool:
        if name not in self.waiting or record.scheduler != self.options.scheduler or record.handle is None:
            return False
        if record.scheduler == LOCAL or self.submitter.status(record.handle).state is None:
            return False
        step = self.planner.step(name)
        return step.digest == record.digest

    def _submit_ready(self) -> None:
        """Submit every stage that need wait no more, in the order of the pipeline."""
        progress = True
        while progress and not self.failed:
            progress = False
            for name in list(self.waiting):
                if self._must_end():
                    return
                if self._is_ready(name):
                    progress |= self._start(name)

    def _is_ready(self, name: str) -> bool:
        before = self.pipeline.dependencies[name]
        waits = [other for other in before if self.results[other].state not in ("done", "kept")]
        if not waits:
            return True
        if not self.submitter.waits_for_jobs or not all(other in self.running for other in waits):
            return False
        return None not in self.resolver.values(name).values()

    def _start(self, name: str) -> bool:
        """Submit a stage, or keep what is there; whether there was room for it."""
        step = self.planner.step(name)
        if step.action == KEEP:
            assert step.record is not None
            self.waiting.remove(name)
            self._done(name, step.record, "kept")
            if name not in self.options.unmentioned:
                self._say(f"{name}: {step.why}")
            return True
        if len(self.running) >= self.jobs:
            return False
        self.waiting.remove(name)
        self._submit(name, step)
        return True

    def _submit(self, name: str, step: Step) -> None:
        stage = self.resolver.stage(name)
        app = submission.build(name, stage)
        mark = uuid.uuid4().hex
        before = [other for other in self.pipeline.dependencies[name] if other in self.running]
        handles = [self.running[other].handle for other in before]
        info = self.submitter.request(f"{self.pipeline.name}-{name}", app, mark, handles)
        out = self.resolver.output(name)
        resumed = step.action == RESUME
        self.records.check_lease()
        if out is not None:
            if not resumed:
                remove_output(out)
            if isinstance(out, Path):
                out.parent.mkdir(parents=True, exist_ok=True)
        record = Record(
            digest=step.digest,
            fingerprint=step.fingerprint,
            state=SUBMITTED,
            scheduler=self.options.scheduler,
            mark=mark,
            command=submission.shown(stage),
            seconds=step.record.seconds if resumed and step.record else 0.0,
        ).submitted_here()
        self.records.write(name, record)  # first: whatever happens now, the job is found by its mark
        began = time.monotonic() if self.submitter.is_local else None
        handle = self.submitter.submit(info)
        self.running[name] = _Job(record=record, handle=handle, app=app, began=began, before=record.seconds)
        state = RUNNING if self.submitter.is_local else SUBMITTED
        self._write(name, state=state, handle=handle)
        log = self.records.log(name)
        log.unlink(missing_ok=True)
        if running_log := self.submitter.log_of(info):
            log.symlink_to(running_log)
        what = "resumed" if resumed else "started" if self.submitter.is_local else "submitted"
        where = f"log in {log}" if self.submitter.is_local else handle
        self._say(f"{name}: {what}, {where}")
        self.results[name] = replace(self.results[name], state=state, handle=handle, command=record.command)

    def _write(self, name: str, **changes: object) -> Record:
        job = self.running[name]
        job.record = replace(job.record, **changes)  # type: ignore[arg-type]
        self.records.write(name, job.record)
        return job.record

    def _look_at(self, name: str) -> None:
        """Ask for the state of a job; a scheduler may be away for some minutes."""
        job = self.running[name]
        try:
            status = self.submitter.status(job.handle)
            self.unanswered = 0
        except SetupError as error:
            self.unanswered += 1
            if self.unanswered == 1:
                print(f"{error}; asking again", file=sys.stderr, flush=True)
            if self.unanswered > UNANSWERED:
                raise
            return
        if status.state == AppState.RUNNING and job.began is None:
            job.began = time.monotonic()
            self._write(name, state=RUNNING)
            self.results[name] = replace(self.results[name], state=RUNNING)
            self._say(f"{name}: runs")
        if status.has_ended:
            self._finish(name, job, status)

    def _finish(self, name: str, job: _Job, status: JobStatus) -> None:
        """A job has ended."""
        self.records.check_lease()
        seconds = job.before + (0.0 if job.began is None else time.monotonic() - job.began)
        log, out = self.records.log(name), self.resolver.output(name)
        self.submitter.write_log(job.handle, job.app, log)
        error = None
        if status.state != AppState.SUCCEEDED:
            error = f"stage {name} failed {status.why}; see {log}"
            print(f"end of {log}:\n{end_of_log(log.read_text(errors='replace').splitlines())}",
                  file=sys.stderr, flush=True)  # fmt: skip
        elif out is not None and not is_there(out):
            error = f"stage {name} ended without an error but made no {out}; log: {log}"
        if error is None:
            record = self._write(name, state=DONE, seconds=seconds)
            del self.running[name]
            self._done(name, record, "done")
            self._say(f"{name}: done in {record.seconds:.0f} s")
            return
        self._write(name, state=FAILED, seconds=seconds, why=error)
        del self.running[name]
        self.results[name] = replace(self.results[name], state=FAILED, seconds=seconds, why=error)
        self.failed.append(StageError(error))
        self._mark_dependents(name)

    def _mark_dependents(self, name: str) -> None:
        """What depends on a failed stage does not run; jobs that wait for it are cancelled."""
        gone = [name]
        for other, before in self._in_order():
            if other in self.results and not set(gone).isdisjoint(before):
                gone.append(other)
                if other in self.running:
                    self._cancel([other])
                self.results[other] = replace(
                    self.results[other], state="blocked", why=f"stage {name} failed"
                )

    def _in_order(self) -> list[tuple[str, list[str]]]:
        """Every stage behind those that it waits for, which it has."""
        found: list[tuple[str, list[str]]] = []
        left = dict(self.pipeline.dependencies)
        while left:
            for name in [n for n, before in left.items() if left.keys().isdisjoint(before)]:
                found.append((name, left.pop(name)))
        return found

    def _done(self, name: str, record: Record, state: str) -> None:
        self.results[name] = StageResult(
            name=name, state=state, seconds=record.seconds, handle=record.handle, command=record.command,
            out=self.resolver.output(name),
        )  # fmt: skip
        if self.tracker is not None:
            self.tracker.finished(self.results[name])

    def _must_end(self) -> bool:
        return self.signals.received is not None or self.records.cancel_request.exists()

    def _wait(self) -> None:
        pause = self.pause
        if self.submitter.is_local:  # a look costs milliseconds of the machine that computes
            youngest = max(job.began or 0.0 for job in self.running.values())
            pause = min(max(pause, LOOK_SHARE * (time.monotonic() - youngest)), OTHER_PAUSE)
        until = time.monotonic() + pause
        while not self._must_end() and time.monotonic() < until:
            time.sleep(min(0.1, self.pause))

    def _check_orders(self) -> None:
        """End where that was ordered.

        Raises:
            RunInterrupted: it was.
        """
        received = self.signals.received
        if received is not None and received.name == "SIGINT":
            raise KeyboardInterrupt
        if self._must_end():
            by = "`mim pipeline cancel`" if received is None else received.name
            raise RunInterrupted(f"interrupted by {by}; run again with the same --out to resume")

    def _check_before_cancelling(self) -> None:
        """Where another process has taken over, records and jobs of servers are its own; local ones end.

        Raises:
            LeaseError: it has.
        """
        try:
            self.records.check_lease()
        except LeaseError:
            if self.submitter.is_local:
                local_processes.end([job.record.mark for job in self.running.values()])
            raise

    def _cancel_all(self) -> None:
        """Cancel every job, those of which no answer came too."""
        names = [name for name in self.results if name in self.running or self._was_submitted(name)]
        if names:
            self._say(f"cancelling {', '.join(names)}")
            self._cancel(names)

    def _was_submitted(self, name: str) -> bool:
        if name in self.waiting or self.results[name].state != "waiting":
            return False
        record = self.records.read(name)
        return record is not None and record.is_active

    def _cancel(self, names: Collection[str]) -> None:
        found = {name: self.records.read(name) for name in names}
        active = {name: record for name, record in found.items() if record is not None}
        submission.cancel(self.submitter.runner, active.values())
        for name, record in active.items():
            job = self.running.pop(name, None)
            if job is not None and job.began is not None:
                record = replace(record, seconds=job.before + time.monotonic() - job.began)
            if job is not None and self.submitter.is_local:
                self.submitter.write_log(job.handle, job.app, self.records.log(name))
            self.records.write(name, replace(record, state=CANCELLED))
            self.results[name] = replace(self.results[name], state=CANCELLED, seconds=record.seconds)

    def _say(self, line: str) -> None:
        if self.options.verbose:
            print(line, flush=True)


def _tracker(options: RunOptions, resolver: Resolver, records: Records) -> "Tracker | None":
    if options.mlflow is None:
        return None
    require("mlflow")
    from mim_torchrec.pipeline.tracking import Tracker

    experiment = options.experiment or resolver.pipeline.name
    return Tracker(options.mlflow, experiment, resolver, records)
