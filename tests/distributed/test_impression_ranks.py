"""Exact metrics, predictions and vocabularies of two gloo ranks are those of one."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mim_torchrec.ctr.predictions import PredictionFile, collect
from mim_torchrec.ctr.report import COLUMNS, summarize
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.impressions import Impressions
from mim_torchrec.training.row_exchange import exchange_rows, owners_by_id, owners_by_range
from tests.datasets import item_rows, write_items
from tests.ranks import run_ranks

COUNT, ITEMS = 3000, 40
SPLITS = {"even": 0.5, "uneven": 0.9, "all on the second": 0.0}
KINDS = ("spread", "ties", "one score")


def rows(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(kind))
    scores = {"spread": rng.random(COUNT), "ties": rng.integers(1, 20, COUNT) / 20,
              "one score": np.full(COUNT, 0.25)}[kind].astype(np.float32)  # fmt: skip
    labels = (rng.random(COUNT) < scores).astype(np.float32)
    return {"request_id": np.arange(COUNT) // 4, "user_id": rng.integers(-90, 90, COUNT) * 2**50,
            "query_id": rng.integers(0, 25, COUNT), "item_id": 100 + rng.integers(ITEMS, size=COUNT),
            "label": labels, "score": scores, "second_label": labels * (rng.random(COUNT) < 0.3),
            "second_score": scores / 3, "second_score_given_click": scores[::-1].copy()}  # fmt: skip


def share(columns: dict[str, np.ndarray], split: str, context: DistributedContext) -> dict[str, np.ndarray]:
    cut = round(COUNT * SPLITS[split]) if context.world_size == 2 else COUNT
    mine = slice(0, cut) if context.rank == 0 else slice(cut, COUNT)
    return {name: values[mine] for name, values in columns.items()}


def measure(root: Path) -> dict:
    with distributed(0) as context:
        items = (
            ItemStore.read(Dataset(root), ("item_id", "category", "listed_at")) if context.is_main else None
        )
        found = {}
        for kind in KINDS:
            for split in SPLITS:
                mine = share(rows(kind), split, context)
                found[kind, split] = summarize(mine, items, context, draws=20)
        return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, list[dict]]:
    root = tmp_path_factory.mktemp("reports")
    write_items(root / "items" / "part-0.parquet", item_rows(ITEMS))
    return {ranks: run_ranks(measure, ranks, root) for ranks in (1, 2)}


def same(one: object, two: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == (two if isinstance(two, str | None) else pytest.approx(two, abs=1e-12))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_report_of_two_ranks_is_that_of_one_on_both(reports, kind, split):
    expected = reports[1][0][kind, split]
    for found in reports[2]:
        assert same(expected, found[kind, split])


@pytest.mark.parametrize("kind", KINDS)
def test_auc_and_entropy_of_two_ranks_are_those_of_scikit_learn(reports, kind):
    found, columns = reports[2][0][kind, "uneven"], rows(kind)
    labels, scores = columns["label"], columns["score"].astype(np.float64)
    entropy = log_loss(labels, np.full(COUNT, labels.mean(dtype=np.float64)))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert found["logloss"] == pytest.approx(log_loss(labels, scores), abs=1e-9)
    assert found["ne"] == pytest.approx(log_loss(labels, scores) / entropy, abs=1e-9)
    assert (found["n"], found["positives"]) == (COUNT, labels.sum())


def test_groups_and_parts_of_two_ranks_are_those_of_a_loop(reports):
    found, columns = reports[2][1]["ties", "uneven"], rows("ties")

    def auc(mine: np.ndarray) -> float:
        return roc_auc_score(columns["label"][mine], columns["score"][mine])

    values, sizes = [], []
    for user in np.unique(columns["user_id"]):
        mine = columns["user_id"] == user
        if 0 < columns["label"][mine].sum() < mine.sum():
            values.append(auc(mine))
            sizes.append(mine.sum())
    assert found["gauc"] == pytest.approx(np.average(values, weights=sizes))
    for part in found["by_category"].items():
        name, facts = part
        mine = np.isin(columns["item_id"], [r["item_id"] for r in item_rows(ITEMS) if r["category"] == name])
        assert facts["n"] == mine.sum()
        assert facts["auc"] == pytest.approx(auc(mine))


def moved() -> tuple:
    with distributed(0) as context:
        rng = np.random.default_rng(context.rank)
        columns = {"number": rng.integers(0, 50, 300 - 200 * context.rank).astype(np.float32)}
        columns["from"] = np.full(len(columns["number"]), context.rank)
        by_range = exchange_rows(columns, owners_by_range(columns["number"], context), context)
        ids = columns["number"].astype(np.int64)
        by_id = exchange_rows(columns, owners_by_id(ids, context.world_size), context)
        return columns, by_range, by_id


def test_rows_reach_one_owner_each_in_the_order_they_had():
    (first, low, one), (second, high, other) = run_ranks(moved, 2)
    everything = {name: np.concatenate([first[name], second[name]]) for name in first}
    assert low["number"].max() < high["number"].min()
    assert set(one["number"]).isdisjoint(other["number"])
    for parts in ((low, high), (one, other)):
        for part in parts:
            mine = np.isin(everything["number"], part["number"])
            for name, values in everything.items():
                np.testing.assert_array_equal(part[name], values[mine])
    assert 100 < len(low["number"]) < 300  # about half of 400, though one rank had 300


def nothing() -> str:
    with distributed(0) as context:
        with pytest.raises(DataError, match="there is nothing to predict"):
            collect(iter([]), ("score",), context)
        return "refused"


def test_no_prediction_on_any_rank_is_an_error_on_both():
    assert run_ranks(nothing, 2) == ["refused", "refused"]


def write_file(folder: Path) -> tuple[dict, bytes | None]:
    with distributed(0) as context:
        mine = share(rows("spread"), "all on the second", context)
        size = len(mine["score"])
        batches = [{name: values[at : at + 70] for name, values in mine.items()} for at in range(0, size, 70)]
        file = PredictionFile(folder / f"{context.world_size}.parquet", context)
        columns = collect(file.written(batches), COLUMNS, context)
        joined = file.joined()
        return columns, None if joined is None else joined.read_bytes()


def test_the_file_of_two_ranks_is_that_of_one_and_each_keeps_its_columns(tmp_path):
    ((whole, one),) = run_ranks(write_file, 1, tmp_path)
    (first, two), (second, nothing) = run_ranks(write_file, 2, tmp_path)
    assert nothing is None and one == two
    table = pq.read_table(tmp_path / "1.parquet.partial" / "1.parquet")
    for name, values in rows("spread").items():
        np.testing.assert_array_equal(table[name].to_numpy(), values)
    assert first.keys() == second.keys() == whole.keys() == set(COLUMNS) - {"weight"}
    for name in whole:
        assert len(first[name]) == 0 and first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(second[name], whole[name])


def diverged() -> str:
    with distributed(0) as context:
        scores = np.full(5, np.nan if context.rank else 0.5, np.float32)
        try:
            Impressions(np.ones(5), scores, context, parts={}, groups={})
        except FloatingPointError as error:
            return str(error)
        return "no error"


def test_a_score_that_is_nan_is_an_error_on_both():
    assert all("predicts NaN" in said for said in run_ranks(diverged, 2))
