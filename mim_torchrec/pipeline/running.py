"""Runs a pipeline in a directory, which one process may do at a time."""

from pathlib import Path

from mim_torchrec.errors import OptionError
from mim_torchrec.pipeline.execution import Execution, RunOptions
from mim_torchrec.pipeline.records import Records
from mim_torchrec.pipeline.reporting import StageResult
from mim_torchrec.pipeline.signals import Signals
from mim_torchrec.pipeline.spec import Pipeline
from mim_torchrec.pipeline.submission import Submitter


def run(pipeline: Pipeline, root: Path, options: RunOptions | None = None) -> dict[str, StageResult]:
    """Run a pipeline in a directory, keep what is done and unchanged, and write a report.

    Args:
        pipeline: the stages.
        root: directory of the run; one that was interrupted there is resumed.
        options: how; by default on local_cwd, one stage at a time.

    Returns:
        Results by stage.

    Raises:
        StageError: a stage failed; those that ran have ended, others did not start.
        RunInterrupted: by SIGTERM, SIGHUP or `mim pipeline cancel`; KeyboardInterrupt by SIGINT. Its jobs
            have ended.
        LeaseError: another process runs a pipeline there, or has taken this one's place because it gave no
            sign of life for too long.
    """
    options = options or RunOptions()
    if options.jobs is not None and options.jobs < 1:
        raise OptionError(f"--jobs is {options.jobs}; it must be at least 1")
    names = pipeline.closure(list(options.only or pipeline.stages))
    records = Records(root)
    with records.writing(), Signals() as signals:
        records.begin(pipeline)
        records.cancel_request.unlink(missing_ok=True)
        with Submitter(options.scheduler, options.scheduler_args, records.jobs) as submitter:
            signals.take()
            return Execution(pipeline, records, options, names, signals, submitter).run()
