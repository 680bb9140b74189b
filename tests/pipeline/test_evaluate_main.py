"""`mim evaluate` through its `main`: any checkpoint and split of a run, with intervals."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mim_torchrec.ctr.evaluation import main
from mim_torchrec.ctr.main import main as train
from mim_torchrec.embeddings.table.format import TableWriter, VersionMismatch
from mim_torchrec.training.history import read_history
from tests.pipeline.test_ctr_main import NUM_ITEMS, SMALL, STYLES, item_id, write_dataset
from tests.ranks import run_ranks


def write_table(path: Path, version: str) -> None:
    writer = TableWriter(path, table_version=version, dim=8, dtype="float16", encoder={})
    writer.write_shard(torch.tensor([item_id(k) for k in range(NUM_ITEMS)]),
                       torch.eye(8)[torch.arange(NUM_ITEMS) % STYLES])  # fmt: skip
    writer.finish(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    train(["--data", str(root / "data"), "--table", str(root / "table"), "--out", str(root / "run"), *SMALL])
    return root


def evaluate(folder: Path, out: Path, *words: str) -> dict:
    main(["--model", str(folder / "run"), "--out", str(out), "--draws", "50", *words])
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory) -> tuple[dict, dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("test-split")
    report = evaluate(folder, out)
    table = pq.read_table(out / "predictions.parquet")
    return report, {name: table[name].to_numpy() for name in table.column_names}


def test_the_best_checkpoint_on_test_gives_what_training_reported(folder, found):
    trained = json.loads((folder / "run" / "metrics.json").read_text())
    for name in ("auc", "gauc", "gauc_by_query", "ne", "logloss", "n", "positives"):
        assert found[0][name] == pytest.approx(trained[name]), name
    for name in ("ratio", "ece"):
        assert found[0]["calibration"][name] == pytest.approx(trained["calibration"][name]), name


def test_the_results_of_a_training_run_are_not_replaced(folder):
    before = (folder / "run" / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="is the directory of a training run"):
        evaluate(folder, folder / "run")
    assert (folder / "run" / "metrics.json").read_bytes() == before


def groups_auc(rows: dict[str, np.ndarray], ids: np.ndarray) -> float:
    values, weights = [], []
    for g in np.unique(ids):
        mine = ids == g
        if 0 < rows["label"][mine].sum() < mine.sum():
            values.append(roc_auc_score(rows["label"][mine], rows["score"][mine]))
            weights.append(mine.sum())
    return np.average(values, weights=weights)


@pytest.mark.parametrize(("name", "column"), [("gauc", "user_id"), ("gauc_by_query", "query_id")])
def test_grouped_auc_is_by_user_and_by_query(found, name, column):
    report, rows = found
    assert report[name] == pytest.approx(groups_auc(rows, rows[column]))


def test_intervals_resample_users(found):
    report, rows = found
    rng = np.random.default_rng(0)
    users = np.unique(rows["user_id"])
    draws = []
    for _ in range(50):
        chosen = np.concatenate(
            [np.flatnonzero(rows["user_id"] == users[k]) for k in rng.integers(len(users), size=len(users))]
        )
        draws.append(roc_auc_score(rows["label"][chosen], rows["score"][chosen]))
    assert report["ci"]["auc"] == pytest.approx(list(np.quantile(draws, [0.025, 0.975])))
    assert set(report["ci"]) == {"auc", "gauc", "gauc_by_query", "ne", "logloss", "calibration_ratio"}
    for low, high in report["ci"].values():
        assert low < high


def test_ages_and_categories_have_their_own_auc_and_interval(found):
    report, rows = found
    category = np.array([f"c{(i - 1000) // 7 % 4}" for i in rows["item_id"]])
    assert set(report["by_category"]) == set(category)
    for name, part in report["by_category"].items():
        mine = category == name
        assert part["auc"] == pytest.approx(roc_auc_score(rows["label"][mine], rows["score"][mine]))
        assert part["ci"][0] <= part["auc"] <= part["ci"][1]
    assert [part["set"] for part in report["by_age"]] == [f"S{k}" for k in range(1, 11)]
    assert sum(part["n"] for part in report["by_age"]) == report["n"]


@pytest.mark.parametrize(("split", "n"), [("train", 960), ("validation", 240)])
def test_every_split_is_scored_whole(folder, tmp_path, split, n):
    assert evaluate(folder, tmp_path, "--split", split)["n"] == n


def test_a_checkpoint_of_the_loop_is_evaluated_by_its_name(folder, tmp_path, found):
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    best = asdict(read_history(folder / "run" / "history.jsonl"))["best_epoch"]
    last = evaluate(folder, tmp_path, "--checkpoint", names[-1])
    first = evaluate(folder, tmp_path, "--checkpoint", names[0])
    of_epoch = [first, last]
    assert of_epoch[best]["auc"] == pytest.approx(found[0]["auc"])
    assert of_epoch[1 - best]["auc"] != pytest.approx(found[0]["auc"], abs=1e-9)


def two_ranks(folder: str, out: str) -> None:
    main(["--model", folder, "--out", out, "--draws", "0"])


def test_two_ranks_score_as_one(folder, tmp_path, found):
    run_ranks(two_ranks, 2, str(folder / "run"), str(tmp_path))
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["world_size"] == 2
    assert report["auc"] == pytest.approx(found[0]["auc"], abs=1e-6)
    assert report["logloss"] == pytest.approx(found[0]["logloss"], abs=1e-5)


def test_another_days_data_is_scored_with_the_vocabularies_of_the_run(folder, tmp_path):
    write_dataset(tmp_path / "tomorrow")
    report = evaluate(folder, tmp_path / "out", "--data", str(tmp_path / "tomorrow"))
    assert report["data"] == str(tmp_path / "tomorrow")
    assert report["n"] == 240


def test_a_table_of_another_version_is_refused(folder, tmp_path):
    write_table(tmp_path / "other", "another")
    with pytest.raises(VersionMismatch, match="styles"):
        evaluate(folder, tmp_path / "out", "--table", str(tmp_path / "other"))


def test_an_unknown_checkpoint_is_an_error_that_names_those_there_are(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint 'newest'; it has best, epoch-"):
        evaluate(folder, tmp_path, "--checkpoint", "newest")


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is no run: it has no config.json"):
        main(["--model", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_configuration_of_another_format_is_an_error(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"ubm": "lstm"}))
    with pytest.raises(ValueError, match="not a configuration of this version"):
        main(["--model", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
