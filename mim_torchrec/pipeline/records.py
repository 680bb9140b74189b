"""What a run directory knows of its stages: one record a stage, written before it is submitted.

    <run>/stages/<name>.json   `Record`: fingerprint, state, seconds, and the job that runs the stage
    <run>/stages/<name>.log    what its processes have said
    <run>/pipeline/            the pipeline as it was run last, lease, logs of jobs that run, report.json

A run that was killed left records of jobs that may still run. `mim pipeline cancel` and the next run find
them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mim_torchrec.embeddings.files import write_json, write_text
from mim_torchrec.embeddings.holder import Holder
from mim_torchrec.errors import ExpectedError, Status
from mim_torchrec.pipeline.spec import Pipeline
from mim_torchrec.training.lease import Lease, leased

SUBMITTED, RUNNING, DONE, FAILED, CANCELLED = "submitted", "running", "done", "failed", "cancelled"
ACTIVE = (SUBMITTED, RUNNING)


class RecordError(ExpectedError, ValueError):
    """A run directory holds no pipeline, or a record that cannot be read."""

    status = Status.STATE


@dataclass(frozen=True, kw_only=True)
class Record:
    """The last attempt at a stage.

    Args:
        digest: of the fingerprint.
        fingerprint: what the result depends on.
        state: submitted, running, done, failed or cancelled.
        scheduler: of TorchX.
        mark: of the job's processes, see `local_processes.py`.
        handle: of the job, as TorchX writes it; None until the scheduler has answered.
        host: machine that submitted it.
        machine: the same, told apart from others of its name, see `Holder`.
        command: what was run, for people.
        seconds: that the stage took, all attempts with this digest together.
        why: of a failure.
        mlflow: runs of MLflow that hold the result, by tracking URI.
    """

    digest: str
    fingerprint: dict[str, Any]
    state: str
    scheduler: str
    mark: str
    handle: str | None = None
    host: str = ""
    machine: str = ""
    command: str = ""
    seconds: float = 0.0
    why: str = ""
    mlflow: dict[str, str] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        """Whether the job may run."""
        return self.state in ACTIVE

    def submitted_here(self) -> "Record":
        """The record with this machine as the one that submits the job."""
        me = Holder.this()
        return replace(self, state=SUBMITTED, host=me.host, machine=me.machine)

    @property
    def is_of_this_machine(self) -> bool:
        """Whether processes of the job would be here, if it is one of local_cwd."""
        return self.machine == Holder.this().machine


class Records:
    """The records of a run directory.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._stages, self._own = self.root / "stages", self.root / "pipeline"
        self._lease: Lease | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only process that writes here, for a block.

        Raises:
            LeaseError: another process writes; the message names it.
        """
        with leased(self._own / "lease.json") as self._lease:
            try:
                yield
            finally:
                self._lease = None

    def check_lease(self) -> None:
        """See that no other process has taken the directory over, before a write that counts.

        Raises:
            LeaseError: one has, because this one gave no sign of life for too long.
        """
        if self._lease is not None:
            self._lease.check()

    @property
    def cancel_request(self) -> Path:
        """File whose presence asks that process to cancel its jobs and end."""
        return self._own / "cancel"

    @property
    def jobs(self) -> Path:
        """Folder of the logs of jobs of local_cwd."""
        return self._own / "jobs"

    @property
    def report(self) -> Path:
        """File of the report."""
        return self._own / "report.json"

    @property
    def mlflow(self) -> Path:
        """File of the runs of MLflow that stand for this one, by tracking URI."""
        return self._own / "mlflow.json"

    def log(self, name: str) -> Path:
        """File of what the processes of a stage have said."""
        return self._stages / f"{name}.log"

    def record_file(self, name: str) -> Path:
        """File of a record."""
        return self._stages / f"{name}.json"

    def begin(self, pipeline: Pipeline) -> None:
        """Make the folders and write down the pipeline."""
        self._stages.mkdir(parents=True, exist_ok=True)
        self._own.mkdir(exist_ok=True)
        write_text(self._own / "pipeline.json", pipeline.model_dump_json(indent=2, exclude_defaults=True))

    def pipeline(self) -> Pipeline:
        """The pipeline that was run last.

        Raises:
            RecordError: there is none.
        """
        file = self._own / "pipeline.json"
        try:
            return Pipeline.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise RecordError(f"{self.root} is no directory of a pipeline: it has no {file.name}") from None
        except ValueError as error:
            raise RecordError(f"{file} cannot be read: {error}") from None

    def read(self, name: str) -> Record | None:
        """The record of a stage; None where it never ran.

        Raises:
            RecordError: the file is damaged.
        """
        file = self.record_file(name)
        try:
            return Record(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except TypeError:  # of an earlier version, which knew less
            return None
        except ValueError as error:
            raise RecordError(f"{file} is damaged ({error}); remove it to run the stage again") from None

    def all(self) -> dict[str, Record]:
        """Every record that there is, also of stages that the pipeline no longer has."""
        found = {file.stem: self.read(file.stem) for file in sorted(self._stages.glob("*.json"))}
        return {name: record for name, record in found.items() if record is not None}

    def write(self, name: str, record: Record) -> None:
        """Replace a record.

        Raises:
            LeaseError: as `check_lease`.
        """
        self.check_lease()
        write_json(self.record_file(name), asdict(record))
