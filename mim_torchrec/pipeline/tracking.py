"""Results of a run in MLflow: a run for the pipeline, and below it one for every stage that is done.

A stage's run has its flags as parameters, the numbers of metrics.json and of every epoch as metrics, and its
small files and its log as artifacts. A result that is in the store already is not written again.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import SetupError
from mim_torchrec.extras import needs
from mim_torchrec.pipeline.outputs import local_files
from mim_torchrec.pipeline.records import Records
from mim_torchrec.pipeline.reporting import StageResult, read_json
from mim_torchrec.pipeline.resolving import Resolver
from mim_torchrec.training.history import read_history

with needs("mlflow"):
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

ARTIFACTS = ("metrics.json", "config.json", "history.jsonl", "manifest.json", "retrieval.json")
MOST_PARAMETERS, MOST_METRICS = 100, 1000  # of one call, by MLflow


class Tracker:
    """Writes results to an MLflow tracking store.

    Args:
        uri: of the store, such as `sqlite:///mlflow.db` or `https://mlflow.example`.
        experiment: its name; made where it is missing.
        resolver: of the run.
        records: of the run; they note what the store has.

    Raises:
        SetupError: the store cannot be reached.
    """

    def __init__(self, uri: str, experiment: str, resolver: Resolver, records: Records) -> None:
        self._uri, self._resolver, self._records = uri, resolver, records
        self._late: list[StageResult] = []
        self._said = False
        with self._errors():
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)
            self._parent = self._find_parent()

    def finished(self, result: StageResult) -> None:
        """Write a result; one that cannot be written now is tried again at the end."""
        try:
            self._write(result)
        except SetupError as error:
            self._late.append(result)
            if not self._said:
                print(f"{error}; trying again at the end")
                self._said = True

    def close(self, state: str) -> None:
        """Write what is left, and the state of the run.

        Raises:
            SetupError: the store cannot be reached.
        """
        late, self._late = self._late, []
        for result in late:
            self._write(result)
        self._records.check_lease()
        with self._errors():
            if self._records.report.exists():
                self._client.log_artifact(self._parent, str(self._records.report))
            status = {"done": "FINISHED", "cancelled": "KILLED"}.get(state, "FAILED")
            self._client.set_terminated(self._parent, status)

    def _find_parent(self) -> str:
        """The run of the pipeline in this directory; the next run there goes on with it."""
        self._records.check_lease()
        file = self._records.mlflow
        known: dict[str, str] = read_json(file) if file.exists() else {}
        if self._uri in known:
            self._client.update_run(known[self._uri], status="RUNNING")
            return known[self._uri]
        name = self._resolver.pipeline.name
        tags = {"mlflow.runName": name, "mim.directory": str(self._records.root)}
        made: str = self._client.create_run(self._experiment, tags=tags).info.run_id
        write_json(file, {**known, self._uri: made})
        return made

    def _write(self, result: StageResult) -> None:
        record = self._records.read(result.name)
        assert record is not None  # it is done
        if self._uri in record.mlflow:
            return
        stage = self._resolver.stage(result.name)
        tags = {"mlflow.runName": result.name, "mlflow.parentRunId": self._parent,
                "mim.command": record.command, "mim.handle": record.handle or "",
                "mim.fingerprint": record.digest}  # fmt: skip
        parameters = {**stage.flags, "program": stage.component or stage.command, "ranks": stage.job.j}
        self._records.check_lease()
        with self._errors():
            run = self._client.create_run(self._experiment, tags=tags).info.run_id
            self._log_parameters(run, parameters)
            self._log_metrics(run, result)
            for file in self._artifacts(result):
                self._client.log_artifact(run, str(file))
            self._client.set_terminated(run, "FINISHED")
        self._records.write(result.name, replace(record, mlflow={**record.mlflow, self._uri: run}))

    def _log_parameters(self, run: str, parameters: Mapping[str, Any]) -> None:
        found = [Param(key, str(value)) for key, value in parameters.items() if value is not None]
        for start in range(0, len(found), MOST_PARAMETERS):
            self._client.log_batch(run, params=found[start : start + MOST_PARAMETERS])

    def _log_metrics(self, run: str, result: StageResult) -> None:
        now = int(time.time() * 1000)
        found = [Metric(key, value, now, 0) for key, value in result.metrics().items()]
        found.append(Metric("seconds", result.seconds, now, 0))
        folder = None if result.out is None else local_files(result.out, "history.jsonl")
        history = None if folder is None else folder / "history.jsonl"
        if history is not None and history.is_file():
            for epoch in read_history(history).epochs:  # by its number: a crash may have lost earlier lines
                number = int(epoch["epoch"])
                found += [Metric(f"epoch/{key}", value, now, number) for key, value in _numbers(epoch)]
        for start in range(0, len(found), MOST_METRICS):
            self._client.log_batch(run, metrics=found[start : start + MOST_METRICS])

    def _artifacts(self, result: StageResult) -> list[Path]:
        found = [self._records.log(result.name)]
        folder = None if result.out is None else local_files(result.out, *ARTIFACTS)
        if folder is not None:
            found += [folder / name for name in ARTIFACTS]
        return [file for file in found if file.is_file()]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, OSError) as error:
            raise SetupError(f"MLflow at {self._uri}: {error}") from error


def _numbers(epoch: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in epoch.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "epoch":
            yield key, float(value)
