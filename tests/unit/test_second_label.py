"""A second label after the click: read, refused where it cannot be, predicted and learned as ESMM says."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.esmm import joint_logits, second_scores
from mim_torchrec.ctr.report import summarize_second
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.ctr.task import CTRTask
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.validate.main import main as validate
from tests.datasets import request_rows, write_items

FEATURES = Features(second_label="purchase")
ONE = DistributedContext(0, 1, torch.device("cpu"))


def rows(count: int = 12) -> list[dict]:
    """Requests of which every second click is followed by a purchase."""
    made = request_rows(count)
    for k, row in enumerate(made):
        row["labels_purchase"] = [int(label and (k + c) % 4 == 1) for c, label in enumerate(row["labels"])]
    return made


def write(path: Path, made: list[dict], kind: pa.DataType | None = None) -> Path:
    first = pa.list_(pa.int8()) if kind is None or pa.types.is_list(kind) else kind
    table = pa.Table.from_pylist(made, pa.schema([*REQUESTS, pa.field("labels_purchase", first)]))
    place = table.column_names.index("labels_purchase")
    table = table.set_column(place, "labels_purchase", table["labels_purchase"].cast(kind or first))
    pq.write_table(table, path, row_group_size=4)
    return path


def read(file: Path, features: Features = FEATURES, **options) -> list[RequestBatch]:
    return list(RequestReader([file], batch_size=5, features=features, **options))


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.list_(pa.bool_()), pa.list_(pa.float64())], ids=str)
@pytest.mark.parametrize("shuffle", [False, True])
def test_candidates_keep_their_second_label(tmp_path, shuffle, kind):
    made = {row["request_id"]: row for row in rows()}
    batches = read(write(tmp_path / "a.parquet", list(made.values()), kind), shuffle=shuffle)
    assert sum(batch.num_requests for batch in batches) == len(made)
    for batch in batches:
        wanted = [made[request]["labels_purchase"] for request in batch.request_ids.tolist()]
        assert batch.second_labels.tolist() == sum(wanted, [])
        assert batch.to(torch.device("cpu")).second_labels.tolist() == sum(wanted, [])


def test_it_is_read_only_where_it_is_asked_for(tmp_path):
    assert all(b.second_labels is None for b in read(write(tmp_path / "a.parquet", rows()), Features()))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1, 0, 0], "is 1 where labels is 0; it counts after a click only"),
        ([0, 2, 0], "a label is neither 0 nor 1"),
        ([0, None, 0], "a value in the list is null"),
        ([0, 0], "its length is not that of candidate_item_ids"),
        (None, "is null"),
    ],
)
def test_a_wrong_second_label_is_an_error_that_names_it_or_skipped(tmp_path, value, problem):
    made = rows()
    made[8]["labels_purchase"] = value
    assert made[8]["labels"] == [0, 1, 0]
    file = write(tmp_path / "a.parquet", made)
    with pytest.raises(DataError, match=f"row group 2, row 0, column labels_purchase: {problem}"):
        read(file)
    assert sum(batch.num_requests for batch in read(file, on_bad_row="skip")) == len(made) - 1


def test_a_column_that_is_missing_or_of_another_form_is_an_error(tmp_path):
    file = write(tmp_path / "a.parquet", rows())
    with pytest.raises(DataError, match="column labels_order: the column is missing; add it"):
        read(file, Features(second_label="order"))
    flat = write(tmp_path / "b.parquet", [row | {"labels_purchase": 0} for row in rows()], pa.int8())
    with pytest.raises(
        DataError, match="labels_purchase: expected a list of numbers, one a candidate; found int8"
    ):
        read(flat)


def test_a_second_label_is_no_feature():
    with pytest.raises(OptionError, match="labels_purchase: requests have it anyway"):
        Features(dense=("labels_purchase",), second_label="purchase")


def test_scores_are_the_product_of_both_probabilities():
    a, b = torch.tensor([0.3, -2.0, 5.0, 0.0]), torch.tensor([1.0, 0.5, -4.0, 0.0])
    both, given_click = second_scores(a, b)
    for k in range(4):
        click, conversion = (1 / (1 + math.exp(-float(x[k]))) for x in (a, b))
        assert float(both[k]) == pytest.approx(click * conversion, rel=1e-6)
        assert float(given_click[k]) == pytest.approx(conversion, rel=1e-6)
    far = torch.tensor([200.0, -200.0])
    assert torch.isfinite(joint_logits(far, far)).all()


def model_and_batch(folder: Path, second_label: str | None = "purchase", **words):
    file = write(folder / "a.parquet", rows())
    found = scan_ids([file], FEATURES)
    vocabularies = {name: Vocabulary.build(ids) for name, ids in found.items()}
    (batch,) = RequestReader([file], batch_size=1000, features=FEATURES)
    config = CTRConfig(
        data=folder, out=folder, mim="off", embedding_dim=4, tower=(8,), second_label=second_label, **words
    )
    sizes = {name: vocabulary.num_embeddings for name, vocabulary in vocabularies.items()}
    model = build_model(config, sizes, None, torch.device("cpu"))
    return model, IdMapper(vocabularies, None, 1.0)(batch)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_a_loop_over_impressions(tmp_path, weighted):
    model, batch = model_and_batch(tmp_path)
    if weighted:
        batch.weights = torch.arange(1.0, 1 + batch.num_candidates)
    task = CTRTask(model, None, None, None, None, ONE, second_weight=0.3)
    with torch.no_grad():
        logits, _, conversions = model(batch)
    first = second = total = 0.0
    for k in range(batch.num_candidates):
        click, conversion = (1 / (1 + math.exp(-float(x[k]))) for x in (logits, conversions))
        weight = float(batch.weights[k]) if weighted else 1.0
        clicked, converted = float(batch.labels[k]), float(batch.second_labels[k])
        both = click * conversion
        first -= weight * (clicked * math.log(click) + (1 - clicked) * math.log(1 - click))
        second -= weight * (converted * math.log(both) + (1 - converted) * math.log(1 - both))
        total += weight
    loss, report = task.training_forward(batch)
    assert report["second_loss"].item() == pytest.approx(second / total, rel=1e-5)
    assert loss.item() == pytest.approx((first + 0.3 * second) / total, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.second_tower.parameters())


def test_without_it_a_model_is_as_it_was(tmp_path):
    known, plain = (
        dict(model_and_batch(tmp_path, name)[0].named_parameters()) for name in ("purchase", None)
    )
    assert {name.split(".")[0] for name in known.keys() - plain.keys()} == {"second_tower"}
    dense = [name for name in plain if "embeddings" not in name]
    assert dense and all(torch.equal(known[name], plain[name]) for name in dense)
    model, batch = model_and_batch(tmp_path, None)
    assert model(batch).conversion_logits is None
    assert CTRTask(model, None, None, None, None, ONE).training_forward(batch)[1] == {}


def predictions(count: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    label = (rng.random(count) < 0.5).astype(np.float32)
    return {
        "user_id": rng.integers(30, size=count), "label": label,
        "second_label": label * (rng.random(count) < 0.4),
        "second_score": rng.uniform(0.01, 0.99, count).round(2),
        "second_score_given_click": rng.random(count).round(2),
    }  # fmt: skip


def test_metrics_of_a_second_label_are_those_of_scikit_learn():
    sample = predictions()
    found = summarize_second(sample, ONE, draws=20)
    clicked = sample["label"] == 1
    label = sample["second_label"]
    assert found["auc"] == pytest.approx(roc_auc_score(label, sample["second_score"]))
    assert found["logloss"] == pytest.approx(log_loss(label, sample["second_score"]))
    given = roc_auc_score(label[clicked], sample["second_score_given_click"][clicked])
    assert found["auc_given_click"] == pytest.approx(given)
    assert found["positives"] == label.sum()
    assert found["ci"]["auc"][0] < found["auc"] < found["ci"]["auc"][1]


def test_metrics_without_a_conversion_are_undefined():
    sample = predictions()
    sample["second_label"] = np.zeros(400, np.float32)
    found = summarize_second(sample, ONE)
    assert found["auc"] is None and found["auc_given_click"] is None and found["positives"] == 0
    sample["label"] = np.zeros(400, np.float32)
    assert summarize_second(sample, ONE)["auc_given_click"] is None
    assert summarize_second({"label": sample["label"]}, ONE) is None


def test_validate_checks_it(tmp_path, capsys):
    made = rows()
    made[8]["labels_purchase"] = [1, 0, 0]
    write_items(tmp_path / "items" / "part-0.parquet")
    for split in ("train", "validation", "test"):
        (tmp_path / "requests" / split).mkdir(parents=True)
        write(tmp_path / "requests" / split / "part-0.parquet", made)
    validate([str(tmp_path)])
    with pytest.raises(DataError, match="see above"):
        validate([str(tmp_path), "--second-label", "purchase"])
    assert "requests/train: 1 row: is 1 where labels is 0" in capsys.readouterr().out
