"""Table 2, the ablation of CiUBM and Figure 6 through their `main`, on a shop of a few hundred items."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mim_torchrec.benchmarks.paper import ablation_ciubm, abtest, coldstart, daily, table2, value
from mim_torchrec.ctr.vocabularies import load_vocabularies
from mim_torchrec.data.id_scan import count_ids
from mim_torchrec.data.schema import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]


SHOP = ["--shop.items", "300", "--shop.users", "100", "--shop.requests", "600", "--shop.searches", "200",
        "--shop.csft-epochs", "1", "--shop.csft-batch-size", "64", "--shop.ctr-epochs", "1",
        "--shop.nproc", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")  # one for all: shop and table are made once


def report(main, out: Path, *more: str) -> dict:
    main(["--out", str(out), "--seeds", "0", *SHOP, *more])
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    return json.loads((out / "report.json").read_text())


def auc(out: Path, name: str) -> float:
    return json.loads((out / "ctr" / f"shop-{name}-0" / "metrics.json").read_text())["auc"]


def test_table2_holds_what_the_runs_have_scored(out):
    found = report(table2.main, out, "--models", "avg_pooling")
    row = found["models"]["avg_pooling"]
    assert row["base_auc"] == pytest.approx(auc(out, "avg_pooling-base"))
    assert row["mim_auc"] == pytest.approx(auc(out, "avg_pooling-mim"))
    assert row["delta"] == pytest.approx(row["mim_auc"] - row["base_auc"])
    assert row["delta_std"] is None
    assert row["paper_delta"] == 0.0066
    assert [t["met"] for t in found["targets"]] == [row["delta"] > 0]


def test_the_ablation_of_ciubm_has_a_row_for_every_switch(out, monkeypatch):
    monkeypatch.setattr(ablation_ciubm, "TABLE5", ablation_ciubm.TABLE5[:2])
    monkeypatch.setattr(ablation_ciubm, "BEYOND", ablation_ciubm.BEYOND[1:2])
    found = report(ablation_ciubm.main, out, "--ubm", "avg_pooling")
    mim, without = found["table5"]
    assert (mim["version"], mim["delta"]) == ("MIM", 0)
    assert without["delta"] == pytest.approx(auc(out, "w-o-id-interest") - auc(out, "mim"))
    assert [row["version"] for row in found["beyond"]] == ["+ similarity interest"]


def test_figure6_divides_the_impressions_by_the_age_of_their_item(out):
    found = report(coldstart.main, out, "--ubm", "avg_pooling")
    sets = found["sets"]
    assert [entry["set"] for entry in sets] == [f"S{k}" for k in range(1, 11)]
    metrics = json.loads((out / "ctr" / "shop-base-0" / "metrics.json").read_text())
    assert sum(entry["n"] for entry in sets) == metrics["n"]
    for entry, part in zip(sets, metrics["by_age"], strict=True):
        assert entry["base_auc"] == part["auc"]
        if entry["gain"] is not None:
            assert entry["gain"] == pytest.approx(entry["mim_auc"] - entry["base_auc"])


def test_a_model_of_every_day_begins_from_the_day_before(out):
    found = report(daily.main, out, "--ubm", "avg_pooling", "--days", "2", "--kept", "0.2")
    runs = [out / "ctr" / f"shop-base-bounded-0-day-{day}" for day in range(2)]
    scored = [json.loads((run / "metrics.json").read_text())["auc"] for run in runs]
    assert found["auc"]["base-bounded"] == pytest.approx(scored)
    assert found["rows"]["mim"][1] > found["rows"]["mim"][0] >= found["rows"]["mim-bounded"][0]
    users = count_ids(Dataset(out / "shop" / "data").requests("train"))["user_id"].ids
    assert found["rows"]["mim-bounded"] == [1 + 60 + 1 + len(users) // 5] * 2
    days = [Dataset(out / "shop-days" / f"day-{day}") for day in range(2)]
    first, second = (pq.read_table(day.requests("train")[0])["ts"].to_numpy() for day in days)
    tested = pq.read_table(days[0].requests("test")[0])["ts"].to_numpy()
    assert first.max() <= second.min() and second.min() <= tested.min() and tested.max() == second.max()
    config = json.loads((out / "ctr" / "shop-mim-0-day-1" / "config.json").read_text())
    assert config["warm_start"].endswith("shop-mim-0-day-0")
    assert len(load_vocabularies(out / "ctr" / "shop-mim-bounded-0-day-1")["item_id"].ids) == 60


def test_value_holds_what_the_models_and_the_regression_have_scored(out, monkeypatch):
    monkeypatch.setitem(value.OPTIONS, "shop", {**value.MODEL, "epochs": 1})
    part = ("--ubm", "avg_pooling", "--share", "0.5", "--only", "shop")
    found = report(value.main, out, *part)
    (cell,) = found["cells"]
    assert (cell["data"], cell["share"], cell["ubm"]) == ("shop", 0.5, "avg_pooling")
    scored = {"base": "avg_pooling-base", "mim": "avg_pooling-mim", "content_only": "content-only"}
    for row, name in scored.items():
        assert cell["auc"][row] == {"0": auc(out, f"0.5-{name}")}
    fitted = json.loads((out / "regression" / "shop-0.5" / "metrics.json").read_text())
    assert cell["auc"]["regression"] == {"0": fitted["auc"]}
    known = load_vocabularies(out / "ctr" / "shop-0.5-content-only-0")
    assert {name: len(own.ids) for name, own in known.items()} == dict.fromkeys(known, 0)
    trained = [path.stat().st_mtime_ns for path in sorted(out.glob("ctr/shop-0.5-*/metrics.json"))]
    assert report(value.main, out, *part)["cells"] == found["cells"]
    kept = [path.stat().st_mtime_ns for path in sorted(out.glob("ctr/shop-0.5-*/metrics.json"))]
    assert len(trained) == 3 and kept == trained


def test_a_tuning_seed_is_not_reported(out):
    with pytest.raises(ValueError, match="seed 1000 is for tuning"):
        report(table2.main, out, "--seeds", "1000")


def test_the_simulated_online_test_ranks_the_test_requests_of_the_shop(tmp_path_factory):
    out = tmp_path_factory.mktemp("abtest")
    found = report(abtest.main, out, "--ubm", "avg_pooling", "--draws", "20", "--repeats", "2",
                   "--shop.candidates", "8", "--slots", "3")  # fmt: skip
    assert found["requests"] == 60
    assert found["auc_gain"] == pytest.approx(auc(out, "mim") - auc(out, "base"))
    assert found["ctr_lift_ci"][0] <= found["ctr_lift"] <= found["ctr_lift_ci"][1]
    assert len(found["relation"]["points"]) == 1 + len(abtest.VARIANTS)
    assert found["relation"]["points"][0]["ctr_lift"] == pytest.approx(found["ctr_lift"])
    assert len(found["by_category"]) == 12
