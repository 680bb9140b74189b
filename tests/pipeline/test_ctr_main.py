"""The CTR stage through its `main`, on a few hundred requests."""

import datetime as dt
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss, roc_auc_score
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.ctr.config import parse
from mim_torchrec.ctr.main import main
from mim_torchrec.ctr.task import CTRTask
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import ITEMS, REQUESTS, Dataset
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.embeddings.table.format import TableWriter, VersionMismatch
from mim_torchrec.training.distributed import distributed
from mim_torchrec.training.history import read_history
from tests.click_metrics import grouped_auc, normalized_entropy
from tests.ranks import run_ranks

NUM_ITEMS, NUM_USERS, STYLES = 60, 20, 3
EPOCH = dt.datetime(2024, 1, 1)
SMALL = ["--epochs", "2", "--batch-size", "64", "--embedding-dim", "4", "--tower", "16"]


def item_id(k: int) -> int:
    return 1000 + 7 * k


def write_dataset(root: Path) -> None:
    """Users who click items of one style; items are listed one an hour."""
    rng = np.random.default_rng(0)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    items = [
        {"item_id": item_id(k), "title": f"item {k}", "image": image.getvalue(), "category": f"c{k % 4}",
         "listed_at": EPOCH + dt.timedelta(hours=k)}
        for k in range(NUM_ITEMS)
    ]  # fmt: skip
    (root / "items").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), root / "items" / "part-00000.parquet")
    sizes = {"train": 240, "validation": 60, "test": 60}
    now = EPOCH + dt.timedelta(days=30)
    for split, count in sizes.items():
        rows = []
        for _ in range(count):
            now += dt.timedelta(minutes=5)
            user = int(rng.integers(NUM_USERS))
            taste = user % STYLES
            behaviors = rng.choice(np.arange(taste, NUM_ITEMS, STYLES), rng.integers(0, 6), replace=False)
            candidates = rng.choice(NUM_ITEMS, 4, replace=False)
            clicks = (candidates % STYLES == taste) & (rng.random(4) < 0.9)
            rows.append({
                "request_id": len(rows) + 10_000 * list(sizes).index(split), "user_id": 500 + user,
                "query_id": int(rng.integers(5)), "ts": now,
                "behavior_item_ids": [item_id(int(k)) for k in behaviors],
                "behavior_categories": [f"c{k % 4}" for k in behaviors],
                "behavior_ts": [now - dt.timedelta(minutes=1)] * len(behaviors),
                "candidate_item_ids": [item_id(int(k)) for k in candidates],
                "candidate_categories": [f"c{k % 4}" for k in candidates],
                "labels": clicks.astype(int).tolist(),
            })  # fmt: skip
        folder = root / "requests" / split
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist(rows, schema=REQUESTS)
        pq.write_table(table, folder / "part-00000.parquet", row_group_size=50)
    (root / "dataset.json").write_text(json.dumps({"name": "tiny", "source": "test", "counts": sizes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ctr")
    write_dataset(root / "data")
    writer = TableWriter(root / "table", table_version="styles", dim=8, dtype="float16", encoder={})
    ids = torch.tensor([item_id(k) for k in range(NUM_ITEMS)])
    style = torch.eye(8)[torch.arange(NUM_ITEMS) % STYLES]
    noise = torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    writer.write_shard(ids, style + noise)
    writer.finish(None)
    return root


@pytest.fixture(scope="module")
def base(folder) -> Path:
    main(["--data", str(folder / "data"), "--mim", "off", "--out", str(folder / "base"), *SMALL])
    return folder / "base"


@pytest.fixture(scope="module")
def mim(folder) -> Path:
    main(["--data", str(folder / "data"), "--table", str(folder / "table"), "--table-version", "styles",
          "--out", str(folder / "mim"), *SMALL])  # fmt: skip
    return folder / "mim"


def report(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_base_trains_without_a_table(base):
    assert report(base)["table"] is None
    assert report(base)["mim"] == "off"


def test_mim_reports_its_table_and_that_training_left_it_unchanged(mim):
    table = report(mim)["table"]
    assert (table["rows"], table["dim"], table["dtype"]) == (NUM_ITEMS, 8, "float16")
    assert table["table_version"] == "styles"
    assert table["digest_before"] == table["digest_after"]


def test_content_that_tells_the_click_is_learned(mim):
    assert report(mim)["auc"] > 0.6


@pytest.mark.parametrize("run", ["base", "mim"])
def test_metrics_are_those_of_the_predictions_file(run, request):
    out = request.getfixturevalue(run)
    rows = pq.read_table(out / "predictions.parquet").to_pydict()
    assert list(rows) == ["request_id", "user_id", "query_id", "item_id", "label", "score"]
    labels, scores = np.array(rows["label"]), np.array(rows["score"])
    found = report(out)
    assert found["n"] == len(labels) == 240
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["gauc"] == pytest.approx(grouped_auc(labels, scores, np.array(rows["user_id"])))
    assert found["logloss"] == pytest.approx(log_loss(labels, scores))
    assert found["ne"] == pytest.approx(normalized_entropy(labels, scores))


def test_predictions_keep_the_original_ids(base):
    rows = pq.read_table(base / "predictions.parquet").to_pydict()
    assert set(rows["user_id"]) <= set(range(500, 500 + NUM_USERS))
    assert set(rows["item_id"]) <= {item_id(k) for k in range(NUM_ITEMS)}


def test_age_sets_run_from_newest_to_oldest_and_cover_all_impressions(base):
    rows = pq.read_table(base / "predictions.parquet").to_pydict()
    sets = report(base)["by_age"]
    assert [s["set"] for s in sets] == [f"S{k}" for k in range(1, 11)]
    assert sum(s["n"] for s in sets) == 240
    newest = {item_id(k) for k in range(54, 60)}
    assert sets[0]["n"] == sum(i in newest for i in rows["item_id"])


def test_categories_cover_all_impressions(base):
    parts = report(base)["by_category"]
    assert set(parts) == {"c0", "c1", "c2", "c3"}
    assert sum(p["n"] for p in parts.values()) == 240


def test_the_resolved_config_and_history_are_written(base):
    assert json.loads((base / "config.json").read_text())["embedding_dim"] == 4
    history = asdict(read_history(base / "history.jsonl"))
    assert len(history["epochs"]) == 2
    assert {"auc", "gauc", "ne"} <= set(history["epochs"][0])


def test_a_run_is_repeated_exactly_by_its_seed(folder, base):
    again = folder / "again"
    main(["--data", str(folder / "data"), "--mim", "off", "--out", str(again), *SMALL])
    assert report(again)["auc"] == report(base)["auc"]


def test_mim_without_a_table_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--mim on needs --table"):
        main(["--data", str(folder / "data"), "--out", str(tmp_path)])


def test_a_table_of_another_version_is_refused(folder, tmp_path):
    with pytest.raises(VersionMismatch):
        main(["--data", str(folder / "data"), "--table", str(folder / "table"),
              "--expected-table-version", "other", "--out", str(tmp_path)])  # fmt: skip


def test_an_unknown_flag_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit):
        main(["--data", str(folder / "data"), "--out", str(tmp_path), "--no-such-flag", "1"])


def test_two_ranks_run_the_stage_as_one_does(folder):
    out = folder / "two"
    run_ranks(main, 2, ["--data", str(folder / "data"), "--table", str(folder / "table"), "--out", str(out),
                        *SMALL])  # fmt: skip
    found = report(out)
    assert (found["world_size"], found["n"]) == (2, 240)
    assert found["auc"] > 0.6


def test_unknown_ids_are_counted_and_alarmed(folder, tmp_path, caplog):
    main(["--data", str(folder / "data"), "--mim", "off", "--out", str(tmp_path), *SMALL, "--epochs", "1",
          "--max-unknown", "0", "--min-count", "20"])  # fmt: skip
    assert set(report(tmp_path)["unknown_ids"]) == {"user_id", "query_id", "item_id", "category"}
    assert "of the ids of item_id are unknown" in caplog.text


def test_requests_without_categories_and_queries_train(folder, tmp_path, caplog):
    for split in ("train", "validation", "test"):
        rows = pq.read_table(folder / "data" / "requests" / split)
        (tmp_path / "requests" / split).mkdir(parents=True)
        kept = rows.drop_columns(["query_id", "behavior_categories", "candidate_categories"])
        pq.write_table(kept, tmp_path / "requests" / split / "part-00000.parquet")
    items = pq.read_table(folder / "data" / "items").select(["item_id", "title"])
    (tmp_path / "items").mkdir()
    pq.write_table(items, tmp_path / "items" / "part-00000.parquet")
    out = tmp_path / "out"
    main(["--data", str(tmp_path), "--mim", "off", "--out", str(out), *SMALL])
    assert report(out)["auc"] is not None
    assert report(out)["by_age"] is report(out)["by_category"] is None
    assert "no results by age" in caplog.text


@pytest.mark.parametrize("ubm", ["din", "avg_pooling"])
@pytest.mark.parametrize("part", ["id", "content", "fusion"])
def test_every_ablation_trains(folder, tmp_path, ubm, part):
    main(["--data", str(folder / "data"), "--table", str(folder / "table"), "--out", str(tmp_path), *SMALL,
          "--epochs", "1", "--ubm", ubm, f"--{part}-interest", "False"])  # fmt: skip
    assert report(tmp_path)["auc"] is not None


UBM_FLAGS = {
    "dien": [],
    "bst": ["--heads", "2", "--max-positions", "3"],
    "sim": ["--heads", "2", "--top-k", "2"],
    "sim_hard": ["--ubm", "sim", "--search", "hard", "--heads", "2", "--top-k", "2"],
    "twin": ["--heads", "2", "--top-k", "2", "--dot-product-features", "True"],
}


@pytest.mark.parametrize("ubm", UBM_FLAGS)
@pytest.mark.parametrize("mim", ["on", "off"])
def test_every_user_behavior_model_trains_with_and_without_content(folder, tmp_path, ubm, mim):
    table = ["--table", str(folder / "table")] if mim == "on" else []
    main(["--data", str(folder / "data"), "--mim", mim, *table, "--out", str(tmp_path), *SMALL,
          "--epochs", "1", "--ubm", ubm.removesuffix("_hard"), *UBM_FLAGS[ubm]])  # fmt: skip
    assert report(tmp_path)["auc"] is not None
    assert report(tmp_path)["ubm"] == ubm.removesuffix("_hard")


@pytest.mark.parametrize(
    "ubm, weight, reported", [("dien", "1", True), ("dien", "0", False), ("din", "1", False)]
)
def test_an_auxiliary_loss_is_reported_where_there_is_one(folder, tmp_path, ubm, weight, reported):
    main(["--data", str(folder / "data"), "--mim", "off", "--out", str(tmp_path), *SMALL, "--epochs", "1",
          "--ubm", ubm, "--aux-weight", weight])  # fmt: skip
    first = asdict(read_history(tmp_path / "history.jsonl"))["steps"][0]
    assert ("auxiliary_loss" in first) == reported


def test_an_option_of_another_model_is_refused_by_name(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--data", str(folder / "data"), "--mim", "off", "--out", str(tmp_path), *SMALL,
              "--ubm", "dien", "--heads", "2"])  # fmt: skip
    assert "--heads is an option of --ubm bst, sim, twin, not of dien" in capsys.readouterr().err


def drop_columns(source: Path, target: Path, *columns: str) -> Path:
    """The dataset without some columns of its requests."""
    for split in ("train", "validation", "test"):
        (target / "requests" / split).mkdir(parents=True)
        rows = pq.read_table(source / "requests" / split).drop_columns(list(columns))
        pq.write_table(rows, target / "requests" / split / "part-00000.parquet")
    (target / "items").symlink_to(source / "items")
    return target


def test_without_times_gaps_are_refused_in_seconds_and_taken_in_behaviors(folder, tmp_path):
    data = drop_columns(folder / "data", tmp_path / "data", "behavior_ts")
    flags = ["--data", str(data), "--mim", "off", *SMALL, "--epochs", "1", "--ubm", "twin", "--heads", "2"]
    with pytest.raises(ValueError, match="--recency order"):
        main([*flags, "--out", str(tmp_path / "time")])
    main([*flags, "--out", str(tmp_path / "order"), "--recency", "order"])
    assert report(tmp_path / "order")["auc"] is not None


def test_a_hard_search_without_categories_is_refused(folder, tmp_path):
    data = drop_columns(folder / "data", tmp_path / "data", "behavior_categories", "candidate_categories")
    with pytest.raises(ValueError, match="categories of candidates and behaviors"):
        main(["--data", str(data), "--mim", "off", *SMALL, "--ubm", "sim", "--search", "hard", "--heads", "2",
              "--out", str(tmp_path / "out")])  # fmt: skip


def test_everything_beyond_the_paper_trains_through_main(folder):
    out = folder / "beyond"
    main(["--data", str(folder / "data"), "--table", str(folder / "table"), "--out", str(out), *SMALL,
          "--similarity-interest", "True", "--similarity-tiers", "8", "--similarity-spans", "2", "0",
          "--content-temperature", "0.5", "--content-dropout", "0.1", "--id-dropout", "0.3"])  # fmt: skip
    assert report(out)["auc"] > 0.6


def test_hidden_candidates_have_the_row_of_an_unknown_id_and_all_else_stays():
    batch = RequestBatch(
        sparse=KeyedJaggedTensor(
            keys=["user_id", "candidate_item_id", "behavior_item_id", "candidate_mm"],
            values=torch.tensor([9, 8, 1, 2, 3, 4, 5, 1, 2, 3]),
            lengths=torch.tensor([1, 1, 2, 1, 0, 2, 2, 1]),
        ),
        labels=torch.zeros(3),
        request_ids=torch.arange(2),
    )
    hidden = batch.with_hidden_candidates(torch.tensor([False, True, True]))
    assert hidden.sparse.values().tolist() == [9, 8, 1, 0, 0, 4, 5, 1, 2, 3]
    assert hidden.sparse.lengths().tolist() == batch.sparse.lengths().tolist()
    assert batch.sparse.values().tolist() == [9, 8, 1, 2, 3, 4, 5, 1, 2, 3]


def test_ids_are_hidden_at_the_rate_asked_for_and_the_same_from_the_middle_of_an_epoch(folder):
    files = Dataset(folder / "data").requests("train")
    vocabularies = {name: Vocabulary.build(ids) for name, ids in scan_ids(files).items()}
    reader = RequestReader(files, batch_size=64, shuffle=True)
    with distributed(0) as ranks:
        task = CTRTask(None, None, reader, reader, IdMapper(vocabularies, None, 1.0), ranks, id_dropout=0.25)
        whole = [batch.sparse["candidate_item_id"].values() for batch in task.batches(1)]
        later = [batch.sparse["candidate_item_id"].values() for batch in task.batches(1, 3)]
    rows = torch.cat(whole)
    assert float((rows == 0).double().mean()) == pytest.approx(0.25, abs=0.05)
    for one, two in zip(whole[3:], later, strict=True):
        assert torch.equal(one, two)


def test_a_preset_gives_defaults_and_flags_win():
    needed = ["--data", "data", "--out", "out"]
    plain = parse(needed)
    assert (plain.preset, plain.ubm, plain.lr, plain.batch_size) == ("default", "din", 0.005, 1024)
    assert (plain.content_pooling, plain.dot_product_features, plain.similarity_interest) == (
        "sum",
        False,
        False,
    )
    recommended = parse([*needed, "--preset", "recommended", "--lr", "0.01"])
    assert (recommended.similarity_interest, recommended.lr) == (True, 0.01)


def test_an_unknown_preset_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse(["--data", "data", "--out", "out", "--preset", "best"])
    assert "invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "problem"), [
    (["--sharding", "column_wise"], "row-wise Adagrad keeps a number for each row"),
    (["--sparse-optimizer", "adam"], "fused on GPUs only"),
    (["--index-dedup", "on"], "needs a GPU"),
    (["--sparse-memory", "uvm"], "--sparse-memory uvm needs a GPU"),
    (["--table-memory", "uvm_caching"], "--table-memory uvm_caching needs a GPU"),
    (["--load-factor", "0"], "above 0 and at most 1"),
    (["--id-dropout", "1"], "at least 0 and below 1"),
])  # fmt: skip
def test_what_cannot_be_trained_is_an_error_that_says_so(folder, tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        main(["--data", str(folder / "data"), "--mim", "off", "--out", str(tmp_path), *SMALL, *options])


def test_learning_rates_rise_in_a_line_to_their_values(folder, tmp_path, monkeypatch):
    rates = []
    plain = CTRTask.training_forward

    def forward(task, batch):
        rates.append([o.param_groups[0]["lr"] for _, o in task.optimizer.optimizers])
        return plain(task, batch)

    monkeypatch.setattr(CTRTask, "training_forward", forward)
    main(["--data", str(folder / "data"), "--mim", "off", "--out", str(tmp_path), *SMALL,
          "--warmup-steps", "4", "--lr", "0.01", "--sparse-lr", "0.1"])  # fmt: skip
    parts = [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1]
    assert [sparse for sparse, _ in rates[:6]] == pytest.approx([0.1 * part for part in parts])
    assert [dense for _, dense in rates[:6]] == pytest.approx([0.01 * part for part in parts])


def test_the_table_learns_by_the_rate_of_the_step(folder, tmp_path):
    losses = {}
    for rate, steps in (("1", "0"), ("1", "100000000"), ("1e-8", "0")):
        out = tmp_path / f"{rate}-{steps}"
        main(["--data", str(folder / "data"), "--mim", "off", "--out", str(out), *SMALL, "--lr", "1e-9",
              "--sparse-lr", rate, "--warmup-steps", steps])  # fmt: skip
        history = asdict(read_history(out / "history.jsonl"))
        losses[rate, steps] = [entry["loss"] for entry in history["steps"]]
    assert losses["1", "100000000"] == pytest.approx(losses["1e-8", "0"], abs=1e-4)
    assert losses["1", "0"][1:] != pytest.approx(losses["1e-8", "0"][1:], abs=1e-2)
