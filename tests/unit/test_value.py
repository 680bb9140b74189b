"""The comparison with what is simpler: the regression's statistics, shares of requests, and the report."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.paper import alpha_regression, subsets, value
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.writer import TableWriter
from mim_torchrec.errors import OptionError
from tests.pipeline.test_ctr_main import NUM_ITEMS, STYLES, item_id, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("value") / "data"
    write_dataset(out)
    return out


@pytest.fixture(scope="module")
def table(data) -> Table:
    writer = TableWriter(data.parent / "table", table_version="t", dim=8, dtype="float32", encoder={})
    ids = torch.tensor([item_id(k) for k in range(1, NUM_ITEMS)])  # the first item has no vector
    vectors = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(0))
    vectors += 4 * torch.eye(8)[torch.arange(1, NUM_ITEMS) % STYLES]
    writer.write_shard(ids, vectors)
    writer.finish(None)
    return Table.open(data.parent / "table")


def naive_statistics(candidate: int, behaviors: list[int], table: Table) -> list[float]:
    def vector(item: int) -> np.ndarray:
        return table.read_float(torch.tensor([item]))[0].numpy().astype(float)

    def cosine(item: int) -> float:
        length = np.linalg.norm(vector(candidate)) * np.linalg.norm(vector(item))
        return float(vector(candidate) @ vector(item) / length) if length else 0.0

    found: list[float] = []
    alphas = [(cosine(item), later) for later, item in enumerate(reversed(behaviors))]
    for span in (alphas[:5], alphas):
        seen = [(alpha, 1 / (1 + later)) for alpha, later in span if alpha]
        if not seen:
            found += [0.0, 0.0, 0.0]
            continue
        weights = sum(weight for _, weight in seen)
        found += [math.log1p(len(seen)), max(seen)[0], sum(a * w for a, w in seen) / weights]
    known = [alpha for alpha, _ in alphas if alpha]
    return [*found, sum(known) / len(known) if known else 0.0]


def test_the_statistics_are_those_of_a_loop(data, table):
    found = alpha_regression.read_split(data, "test", table, max_behaviors=50)
    rows = pq.read_table(Dataset(data).requests("test")).to_pylist()
    expected = [
        (row["request_id"], row["user_id"], item, label,
         naive_statistics(item, row["behavior_item_ids"], table))
        for row in rows
        for item, label in zip(row["candidate_item_ids"], row["labels"], strict=True)
    ]  # fmt: skip
    for name, column in zip(("request_id", "user_id", "item_id", "label"), zip(*expected, strict=True),
                            strict=False):  # fmt: skip
        assert found[name].tolist() == list(column)
    assert found["statistics"].shape[1] == alpha_regression.NUM_STATISTICS
    np.testing.assert_allclose(found["statistics"], [one[-1] for one in expected], atol=1e-6)


def test_the_regression_finds_what_users_click_and_is_kept(data, table, tmp_path, monkeypatch):
    out = alpha_regression.fit(data, table, tmp_path / "fit")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["auc"] > 0.7 and metrics["validation_auc"] > 0.7
    labels, (scores,) = comparison.scores([out])
    assert metrics["auc"] == roc_auc_score(labels, scores)
    (out / "kept").touch()
    assert (alpha_regression.fit(data, table, out) / "kept").exists()
    monkeypatch.setattr(alpha_regression, "source", lambda: "other code")
    assert not (alpha_regression.fit(data, table, out) / "kept").exists()
    (out / "kept").touch()
    assert not (alpha_regression.fit(data, table, out, max_behaviors=2) / "kept").exists()


def test_a_share_has_as_many_training_requests_whole_and_everything_else(data, tmp_path):
    out = subsets.write_share(data, 0.25, tmp_path / "share")
    whole, part = (
        {split: pq.read_table(Dataset(of).requests(split)).to_pylist() for split in SPLITS}
        for of in (data, out)
    )
    assert part["validation"] == whole["validation"] and part["test"] == whole["test"]
    assert len(part["train"]) == 60
    places = [whole["train"].index(row) for row in part["train"]]
    assert places == sorted(set(places)) and places != list(range(60))
    written = Dataset(out).requests("train")[0].stat().st_mtime_ns
    subsets.write_share(data, 0.25, out)
    assert Dataset(out).requests("train")[0].stat().st_mtime_ns == written
    subsets.write_share(data, 0.5, out)
    assert pq.read_metadata(Dataset(out).requests("train")[0]).num_rows == 120


def cell(seed: int, share: float = 1.0, source: str = "now", **aucs: float) -> value.Cell:
    scores = dict.fromkeys(value.ROWS, 0.6) | aucs
    return value.Cell(data="shop", share=share, ubm="din", seed=seed, made_of={"source": source}, auc=scores,
                      validation_auc=scores, validation_fall=0.001)  # fmt: skip


@pytest.mark.parametrize(("worst", "never_loses"), [(0.5985, True), (0.5975, False)])
def test_one_seed_that_loses_is_a_loss(worst, never_loses):
    wanted = {("shop", 1.0, "din", seed) for seed in (0, 1)}
    report = value.build_report([cell(0, mim=0.7), cell(1, mim=worst, ensemble=0.7)], [], wanted)
    (line,) = report["cells"]
    assert line["auc"]["mim"] == {"0": 0.7, "1": worst}
    assert report["never_loses"] == never_loses
    assert report["worst_margin"] == pytest.approx(worst - 0.6)
    assert report["worst_gap_to_ensemble"] == pytest.approx(worst - 0.7)
    assert [one["met"] for one in report["targets"]] == [never_loses, False, True]


def test_nothing_is_claimed_while_results_are_missing():
    won, lost = cell(0, mim=0.7), cell(1, mim=0.5)
    assert len(value.whole()) == 2 * 2 * 6 * 3
    report = value.build_report([won], [], value.whole())
    assert (report["never_loses"], report["missing"]) == (None, 71)
    assert "71 results are missing" in value.sections(report)[0].text[-1]
    assert value.build_report([won, lost], [], value.whole())["never_loses"] is False


def test_results_of_other_code_are_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(alpha_regression, "source", lambda: "now")
    (tmp_path / "cells").mkdir()
    films, old = (dataclasses.replace(cell(2, source=code), data="films") for code in ("now", "before"))
    for one in (films, dataclasses.replace(old, seed=3), cell(0), cell(1, source="before")):
        write_json(one.file(tmp_path), dataclasses.asdict(one))
    cells, outdated = value.read_cells(tmp_path, {"shop": {"source": "now"}})  # films are not run
    assert (cells, outdated) == ([films, cell(0)], ["films-1-din-3", "shop-1-din-1"])
    assert "shop-1-din-1" in value.sections(value.build_report(cells, outdated, set()))[0].text[-1]


def test_an_ensemble_is_the_mean_of_log_odds(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    scores = [rng.random(50).astype(np.float32) for _ in range(2)]
    for name, own in zip("ab", scores, strict=True):
        (tmp_path / name).mkdir()
        columns = {"request_id": np.arange(50), "user_id": np.arange(50), "item_id": np.arange(50)}
        table = pa.table({**columns, "label": labels, "score": own})
        pq.write_table(table, tmp_path / name / "predictions.parquet")
    odds = [np.log(own / (1 - own)) for own in scores]
    found = value.ensemble_auc([tmp_path / "a", tmp_path / "b"])
    assert found == pytest.approx(roc_auc_score(labels, odds[0] + odds[1]), abs=1e-12)


def test_films_need_their_folder(tmp_path):
    with pytest.raises(OptionError, match="films are read from the folder that --data names"):
        value.main(["--out", str(tmp_path), "--only", "films"])
