"""`behavior_<name>` columns through training, evaluation, bundle and server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.data.errors import DataError
from mim_torchrec.serving.bundle import Bundle
from tests.pipeline.test_ctr_main import write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.serving import INFER, application, changed, deployment, message, output, trained_bundle, without

FLAGS = ["--sparse-features", "behavior_action", "--dense-features", "behavior_price",
         "--bucket-features", "behavior_dwell", "2,10", "--max-behaviors", "4"]  # fmt: skip
MODELS = {
    "avg_pooling": ["--ubm", "avg_pooling", "--mim", "off"],
    "din": ["--ubm", "din", "--content-pooling", "mean"],
    "dien": ["--ubm", "dien", "--mim", "off"],
    "bst": ["--ubm", "bst", "--max-positions", "3", "--mim", "off"],
    "sim": ["--ubm", "sim", "--top-k", "2"],
    "twin": ["--ubm", "twin", "--top-k", "2", "--content-temperature", "0.1"],
}
KINDS = {
    "behavior_action": pa.list_(pa.string()), "behavior_price": pa.list_(pa.float64()),
    "behavior_dwell": pa.list_(pa.int64()),
}  # fmt: skip
DATATYPES = {"behavior_action": "BYTES", "behavior_price": "FP64", "behavior_dwell": "INT64"}


def write_behaviors(root: Path) -> None:
    """The tiny data set, of whose requests those are clicked whose last behavior was a purchase."""
    write_dataset(root)
    rng = np.random.default_rng(4)
    for split in ("train", "validation", "test"):
        (file,) = (root / "requests" / split).iterdir()
        table = pq.read_table(file)
        rows = table.to_pylist()
        for row in rows:
            count = len(row["behavior_item_ids"])
            actions = [("view", "buy")[k] for k in rng.integers(2, size=count)]
            clicked = int("buy" in actions[-1:])
            row |= {
                "behavior_action": actions, "behavior_price": rng.lognormal(3, 2, count).tolist(),
                "behavior_dwell": rng.integers(20, size=count).tolist(),
                "labels": [clicked if rng.random() < 0.9 else 1 - clicked for _ in row["labels"]],
            }  # fmt: skip
        schema = pa.schema([*table.schema, *KINDS.items()])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("behaviors")
    write_behaviors(root / "data")
    write_table(root / "table", "styles")
    return root


def stage(root: Path, name: str, *words: str) -> dict[str, Any]:
    run = trained_bundle(root, name, *words)
    return json.loads((run / "metrics.json").read_text())


def sent(folder: Path) -> list[dict[str, Any]]:
    """The test requests as clients send them."""
    found = []
    for row in pq.read_table(folder / "data" / "requests" / "test").to_pylist():
        request = message(row)
        for name, datatype in DATATYPES.items():
            tensor = {"name": name, "shape": [len(row[name])], "datatype": datatype, "data": row[name]}
            request["inputs"].append(tensor)
        found.append(request)
    return found


@pytest.fixture(scope="module", params=MODELS)
def run(request, folder) -> Path:
    return trained_bundle(folder, request.param, *FLAGS, *MODELS[request.param])


def client(folder: Path, run: Path) -> TestClient:
    store = str(folder / "table") if Bundle.open(run / "bundle").table_version else None
    app, _ = application(deployment(folder, bundle=run / "bundle", store=store))
    return TestClient(app)


def test_the_server_scores_as_the_evaluation_does(folder, run, tmp_path):
    evaluate(["--model", str(run), "--out", str(tmp_path), "--draws", "0"])
    expected = pq.read_table(tmp_path / "predictions.parquet")["score"].to_numpy()
    with client(folder, run) as http:
        for _ in range(2):  # the second time from matrices that were kept
            answers = [http.post(INFER, json=one) for one in sent(folder)]
            assert {answer.status_code for answer in answers} == {200}
            found = [score for answer in answers for score in output(answer.json())]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        counted = answers[0].json()["parameters"]
        assert counted["unknown_behavior_action"] == counted["unknown_behavior_dwell"] == 0


@pytest.fixture(scope="module")
def din(folder) -> Path:
    return trained_bundle(folder, "one", *FLAGS)


def test_what_users_did_raises_the_auc(folder):
    words = ("--mim", "off", "--ubm", "din", "--epochs", "6")
    known, plain = stage(folder, "known", *FLAGS, *words), stage(folder, "plain", *words)
    assert known["auc"] > plain["auc"] + 0.05


def test_the_history_that_is_kept_is_one_with_its_side_information(folder, din):
    one = next(m for m in sent(folder) if len(m["inputs"][-1]["data"]) > 1)
    prices = next(given["data"] for given in one["inputs"] if given["name"] == "behavior_price")
    other = changed(one, "behavior_price", data=[100 * (1 + price) for price in prices])
    with client(folder, din) as http:
        first, second, again = (output(http.post(INFER, json=m).json()) for m in (one, other, one))
    with client(folder, din) as http:
        alone = output(http.post(INFER, json=other).json())
    assert first == again != second == alone


def test_the_server_says_what_it_needs(folder, din):
    one = sent(folder)[0]
    count = len(one["inputs"][-1]["data"])
    surplus = changed(one, "behavior_price", shape=[count + 1], data=[1.0] * (count + 1))
    cases = {
        "needs the feature behavior_action": without(one, "behavior_action"),
        "needs the feature behavior_price": without(one, "behavior_price"),
        f"behavior_price has {count + 1} values, expected {count}": surplus,
        "behavior_action is FP32, expected": changed(one, "behavior_action", datatype="FP32"),
    }
    with client(folder, din) as http:
        for problem, request in cases.items():
            answer = http.post(INFER, json=request)
            assert (answer.status_code, problem in answer.json()["error"]) == (400, True), answer.json()
        about = http.get("/v2/models/mim").json()
    known = {given["name"]: given["datatype"] for given in about["inputs"]}
    assert known["behavior_price"] == known["behavior_dwell"] == "FP32"
    assert known["behavior_action"] in ("INT64", "BYTES")


def test_a_column_that_is_not_there_stops_before_training(folder):
    with pytest.raises(DataError, match="behavior_actions: the column is missing; add it"):
        stage(folder, "bad", "--sparse-features", "behavior_actions")
    assert not (folder / "bad" / "vocabulary").exists()
