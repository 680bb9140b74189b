"""Results of a run in a store of MLflow, of SQLite."""

import json

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mim_torchrec import extras
from mim_torchrec.errors import SetupError
from mim_torchrec.pipeline.execution import StageError
from mim_torchrec.pipeline.main import main
from tests.pipeline_steps import Steps

TWO = """
[stages.first]
step = true
flags = { lr = 0.5, say = "hello" }
[stages.second]
step = true
flags.reads = "${first}/words"
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow keeps the artifacts of a store of SQLite in ./mlruns
    return Steps(tmp_path)


def runs(steps: Steps, uri: str, experiment: str = "steps") -> dict[str, Run]:
    """The runs of an experiment by name."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    listed = client.search_runs([found.experiment_id])
    assert len({run.info.run_name for run in listed}) == len(listed)
    return {run.info.run_name: run for run in listed}


def test_a_run_is_one_of_mlflow_with_one_below_it_for_every_stage(steps):
    uri = f"sqlite:///{steps.folder}/mlflow.db"
    main([*steps.write(TWO), "--mlflow", uri])
    found = runs(steps, uri)
    assert found.keys() == {"steps", "first", "second"}
    first = found["first"]
    assert first.data.params == {"lr": "0.5", "say": "hello", "out": str(steps.out / "first"),
                                 "program": f"{steps.component}:step"}  # fmt: skip
    assert first.data.metrics["auc"] == 0.75 and first.data.metrics["seconds"] > 0
    assert first.data.tags["mlflow.parentRunId"] == found["steps"].info.run_id
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    names = {file.path for file in MlflowClient(uri).list_artifacts(first.info.run_id)}
    assert names == {"metrics.json", "first.log"}


def test_what_is_kept_is_written_once(steps):
    uri = f"sqlite:///{steps.folder}/mlflow.db"
    run = steps.write(TWO)
    main(run)
    for _ in range(2):
        main([*run, "--mlflow", uri, "--experiment", "films"])
    found = runs(steps, uri, "films")
    assert found.keys() == {"steps", "first", "second"}
    assert steps.times_run("first") == 1


def test_a_failed_run_says_so(steps):
    uri = f"sqlite:///{steps.folder}/mlflow.db"
    with pytest.raises(StageError):
        main([*steps.write("[stages.a]\nstep = true\nflags.fail = 1\n"), "--mlflow", uri])
    found = runs(steps, uri)
    assert {name: run.info.status for name, run in found.items()} == {"steps": "FAILED"}


def test_a_store_that_cannot_be_reached_is_an_error_before_anything_runs(steps):
    with pytest.raises(SetupError, match="MLflow at sqlite:"):
        main([*steps.write(TWO), "--mlflow", "sqlite:////proc/no/such/mlflow.db"])
    assert steps.times_run("first") == 0


def test_without_the_client_the_extra_is_named(steps, monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "mlflow", ("no_such_module",))
    with pytest.raises(extras.MissingExtra, match=r"mim-torchrec\[mlflow\]"):
        main([*steps.write(TWO), "--mlflow", "sqlite:///mlflow.db"])
    assert steps.times_run("first") == 0


def test_an_epoch_has_its_own_number_where_a_crash_has_lost_earlier_ones(steps):
    uri = f"sqlite:///{steps.folder}/mlflow.db"
    run = steps.write("[stages.a]\nstep = true\n")
    main(run)
    entries = [{"epoch": number, "auc": 0.5 + number / 100, "is_best": number == 4} for number in (2, 3, 4)]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (steps.out / "a" / "history.jsonl").write_text(lines)
    main([*run, "--mlflow", uri])
    found = MlflowClient(uri).get_metric_history(runs(steps, uri)["a"].info.run_id, "epoch/auc")
    assert {metric.step: metric.value for metric in found} == {2: 0.52, 3: 0.53, 4: 0.54}
