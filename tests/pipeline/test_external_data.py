"""A data set as another company writes it goes through training, evaluation, a bundle and the server.

Users are UUIDs, items, queries and requests are text, times are epoch milliseconds, folders are partitions by
day with hidden files and an empty part, and vectors come with the text of the items.
"""

import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient

from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import TIME
from mim_torchrec.embeddings.table.main import main as table
from mim_torchrec.serving.bundling import write_bundle
from tests.pipeline.test_ctr_main import NUM_ITEMS, SMALL, STYLES, item_id, write_dataset
from tests.serving import INFER, application, deployment, output

USERS = uuid.UUID("12345678-1234-5678-1234-567800000000").int


def user(number: int) -> uuid.UUID:
    return uuid.UUID(int=USERS + number)


def item(number: int) -> str:
    return f"sku-{number}"


def texts(column: pa.ChunkedArray, name) -> pa.Array:
    return pa.array([None if v is None else [name(i) for i in v] for v in column.to_pylist()])


def milliseconds(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_list(column.type):
        return pa.array([[pa.scalar(t, TIME).value // 1000 for t in row] for row in column.to_pylist()],
                        pa.list_view(pa.int64()))  # fmt: skip
    return pa.array([pa.scalar(t, TIME).value // 1000 for t in column.to_pylist()])


def as_others_write(rows: pa.Table) -> pa.Table:
    """The requests with other types; those without behaviors have null histories."""
    ids = pa.array([user(u).bytes for u in rows["user_id"].to_pylist()], pa.binary(16))
    made = {
        "request_id": pa.array([f"req-{r}" for r in rows["request_id"].to_pylist()]),
        "user_id": pa.ExtensionArray.from_storage(pa.uuid(), ids),
        "query_id": pa.array([f"q{q}" for q in rows["query_id"].to_pylist()], pa.string_view()),
        "behavior_item_ids": texts(rows["behavior_item_ids"], item),
        "candidate_item_ids": texts(rows["candidate_item_ids"], item).cast(pa.list_(pa.string(), 4)),
        "ts": milliseconds(rows["ts"]),
        "behavior_ts": milliseconds(rows["behavior_ts"]),
    }
    for name, column in made.items():
        rows = rows.set_column(rows.column_names.index(name), name, column)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("external")
    write_dataset(root / "plain")
    data = root / "data"
    items = pq.read_table(root / "plain" / "items").drop_columns("image")
    (data / "items" / "shop=eu").mkdir(parents=True)
    named = pa.array([item(i) for i in items["item_id"].to_pylist()])
    pq.write_table(items.set_column(0, "item_id", named), data / "items" / "shop=eu" / "a.parquet")
    for split in ("train", "validation", "test"):
        rows = as_others_write(pq.read_table(root / "plain" / "requests" / split))
        for day, part in enumerate((rows.slice(0, len(rows) // 2), rows.slice(len(rows) // 2)), 1):
            place = data / "requests" / f"split={split}" / f"dt=2024-02-0{day}"
            place.mkdir(parents=True)
            pq.write_table(part, place / "part-0.parquet", row_group_size=50, write_page_checksum=True)
            pq.write_table(part.slice(0, 0), place / "part-1.parquet")
            (place / ".part-2.parquet").write_bytes(b"half a file")
        (data / "requests" / f"split={split}" / "_SUCCESS").write_bytes(b"")
    (data / "dataset.json").write_text('{"time_unit": "ms"}')
    vectors = torch.eye(8)[torch.arange(NUM_ITEMS) % STYLES].numpy()
    made = {f"v{k}": vectors[:, k] for k in range(8)}
    skus = pa.array([item(item_id(k)) for k in range(NUM_ITEMS)])
    pq.write_table(pa.table({"sku": skus, **made}), root / "vectors.parquet")
    table(["import", str(root / "vectors.parquet"), "--id-column", "sku", "--vector-column", "v*",
           "--table-version", "styles", "--out", str(root / "table")])  # fmt: skip
    return root


def words(folder: Path, *more: str) -> list[str]:
    return ["--data", str(folder / "data"), "--table", str(folder / "table"), *SMALL, *more]


@pytest.fixture(scope="module")
def run(folder) -> Path:
    train(words(folder, "--out", str(folder / "run")))
    return folder / "run"


def test_all_ids_of_the_test_requests_are_found_and_content_tells_the_click(run):
    report = json.loads((run / "metrics.json").read_text())
    assert report["auc"] > 0.6 and report["table"]["rows"] == NUM_ITEMS
    assert report["unknown_ids"]["mm"] == 0 and report["unknown_ids"]["item_id"] < 0.05
    assert report["by_category"].keys() == {"c0", "c1", "c2", "c3"} and len(report["by_age"]) == 10


def test_predictions_have_the_ids_that_people_know(folder, run):
    found = pq.read_table(run / "predictions.parquet")
    rows = pq.read_table(folder / "plain" / "requests" / "test").to_pylist()
    candidates = [(row, candidate) for row in rows for candidate in row["candidate_item_ids"]]
    expected = {
        "request_id_original": [f"req-{row['request_id']}" for row, _ in candidates],
        "user_id_original": [str(user(row["user_id"])) for row, _ in candidates],
        "query_id_original": [f"q{row['query_id']}" for row, _ in candidates],
        "item_id_original": [item(candidate) for _, candidate in candidates],
    }
    assert found["label"].to_pylist() == [label for row in rows for label in row["labels"]]
    for name, ids in expected.items():
        assert found[name].to_pylist() == ids
        assert found[name.removesuffix("_original")].to_pylist() == stable_ids(pa.array(ids)).to_pylist()


def test_days_choose_what_is_trained_on_and_scored(folder, run, tmp_path):
    train(words(folder, "--out", str(tmp_path / "one"), "--train-days", "2024-02-01", "--epochs", "1"))
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["train_days"] == "2024-02-01"
    evaluate(["--model", str(run), "--out", str(tmp_path / "day"), "--days", "2024-02-02", "--draws", "0"])
    whole = pq.read_table(run / "predictions.parquet")
    second = pq.read_table(tmp_path / "day" / "predictions.parquet")
    np.testing.assert_allclose(
        second["score"].to_numpy(), whole["score"].to_numpy()[len(whole) // 2 :], atol=1e-6
    )
    with pytest.raises(
        DataError, match="no file of the days 2025-01-01..2025-01-01; there are 2024-02-01 to"
    ):
        evaluate(["--model", str(run), "--out", str(tmp_path / "no"), "--days", "2025-01-01"])


def message(row: dict) -> dict:
    """The request as a client of this company sends it."""
    tensors = {
        "user_id": ("BYTES", [str(user(row["user_id"]))]), "query_id": ("BYTES", [f"q{row['query_id']}"]),
        "candidate_item_id": ("BYTES", [item(i) for i in row["candidate_item_ids"]]),
        "behavior_item_id": ("BYTES", [item(i) for i in row["behavior_item_ids"]]),
        "candidate_category": ("BYTES", row["candidate_categories"]),
        "behavior_category": ("BYTES", row["behavior_categories"]),
    }  # fmt: skip
    inputs = [{"name": n, "shape": [len(d)], "datatype": k, "data": d} for n, (k, d) in tensors.items()]
    return {"inputs": inputs}


def test_the_server_takes_the_ids_of_the_log(folder, run):
    write_bundle(run, run / "bundle")
    rows = pq.read_table(folder / "plain" / "requests" / "test").to_pylist()[:20]
    expected = pq.read_table(run / "predictions.parquet")["score"].to_numpy()
    app, _ = application(deployment(folder))
    with TestClient(app) as client:
        answers = [client.post(INFER, json=message(row)).json() for row in rows]
        scores = [score for answer in answers for score in output(answer)]
        np.testing.assert_allclose(scores, expected[: len(scores)], atol=1e-5)
        assert all(answer["parameters"]["unknown_vector"] == 0 for answer in answers)
        strange = message(rows[0] | {"user_id": 10**6, "query_id": 77})
        strange["inputs"][2]["data"][0] = "sku-of-nobody"
        counted = client.post(INFER, json=strange).json()["parameters"]
        assert counted["unknown_user"] == counted["unknown_query"] == counted["unknown_vector"] == 1
        assert 'mim_unknown_ids_total{kind="query"}' in client.get("/metrics").text
