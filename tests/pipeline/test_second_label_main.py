"""`mim ctr --second-label` through training, evaluation, bundle and server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sklearn.metrics import roc_auc_score

from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.data.errors import DataError
from mim_torchrec.training.history import read_history
from tests.pipeline.test_ctr_main import write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.serving import INFER, application, deployment, messages, output, trained_bundle

FLAGS = ["--second-label", "purchase", "--epochs", "4"]
OUTPUTS = ("score", "second_score", "second_score_given_click")


def write_purchases(root: Path) -> None:
    """The tiny data set; users buy what they click if it is of the first half of the items."""
    write_dataset(root)
    for split in ("train", "validation", "test"):
        (file,) = (root / "requests" / split).iterdir()
        table = pq.read_table(file)
        bought = [
            [int(label and item < 1200) for label, item in zip(labels, items, strict=True)]
            for labels, items in zip(
                table["labels"].to_pylist(), table["candidate_item_ids"].to_pylist(), strict=True
            )
        ]
        table = table.append_column("labels_purchase", pa.array(bought, pa.list_(pa.int8())))
        pq.write_table(table, file, row_group_size=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("second")
    write_purchases(root / "data")
    write_table(root / "table", "styles")
    return root


@pytest.fixture(scope="module")
def run(folder) -> Path:
    return trained_bundle(folder, "run", *FLAGS)


def stage(root: Path, name: str, *words: str) -> dict[str, Any]:
    return metrics(trained_bundle(root, name, *words))


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def test_the_report_is_that_of_the_predictions(run):
    second, table = metrics(run)["second"], pq.read_table(run / "predictions.parquet")
    label, click, both, given_click = (
        table[name].to_numpy()
        for name in ("second_label", "score", "second_score", "second_score_given_click")
    )
    clicked = table["label"].to_numpy() == 1
    assert second["auc"] == pytest.approx(roc_auc_score(label, both))
    assert second["auc_given_click"] == pytest.approx(roc_auc_score(label[clicked], given_click[clicked]))
    assert second["positives"] == label.sum() > 0
    np.testing.assert_allclose(both, click * given_click, rtol=1e-5)


def test_purchases_are_learned(run):
    assert metrics(run)["second"]["auc"] > 0.75
    assert metrics(run)["second"]["auc_given_click"] > 0.75


def test_epochs_report_both_and_steps_the_loss(run):
    history = read_history(run / "history.jsonl")
    assert all({"auc", "second_auc", "second_auc_given_click"} <= epoch.keys() for epoch in history.epochs)
    assert history.steps[0]["second_loss"] > 0


def test_the_server_scores_as_the_evaluation_does(folder, run, tmp_path):
    evaluate(["--model", str(run), "--out", str(tmp_path), "--draws", "20"])
    assert metrics(tmp_path)["second"]["auc"] == pytest.approx(metrics(run)["second"]["auc"])
    assert metrics(tmp_path)["second"]["ci"]["auc"] is not None
    expected = pq.read_table(tmp_path / "predictions.parquet")
    app, _ = application(deployment(folder))
    with TestClient(app) as http:
        asked = [{"name": name} for name in OUTPUTS]
        answers = [http.post(INFER, json=one | {"outputs": asked}).json() for one in messages(folder)]
        usual = http.post(INFER, json=messages(folder)[0]).json()
        about = http.get("/v2/models/mim").json()
    for name in OUTPUTS:
        found = [value for answer in answers for value in output(answer, name)]
        np.testing.assert_allclose(found, expected[name].to_numpy(), rtol=0, atol=1e-5)
    assert [one["name"] for one in usual["outputs"]] == ["score", "second_score"]
    assert {one["name"] for one in about["outputs"]} == {*OUTPUTS, "content_contribution"}
    assert about["parameters"]["second_label"] == "purchase"


def test_a_model_without_it_has_no_such_output(folder):
    trained_bundle(folder, "plain", "--epochs", "1")
    assert "second" not in metrics(folder / "plain")
    app, _ = application(deployment(folder, bundle=folder / "plain" / "bundle"))
    with TestClient(app) as http:
        answer = http.post(INFER, json=messages(folder)[0] | {"outputs": [{"name": "second_score"}]})
    assert answer.status_code == 400
    assert "no output 'second_score'; it has score, content_contribution" in answer.json()["error"]


def test_a_column_that_is_not_there_stops_before_training(folder):
    with pytest.raises(DataError, match="labels_order: the column is missing; add it"):
        stage(folder, "bad", "--second-label", "order")
    assert not (folder / "bad" / "vocabulary").exists()
