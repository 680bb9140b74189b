"""Table 2, the ablation of CiUBM and Figure 6 through their `main`, on a shop of a few hundred items."""

import json
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.paper import ablation_ciubm, abtest, coldstart, table2

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
