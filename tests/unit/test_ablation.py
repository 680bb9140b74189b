"""`mim ablate`: the stages of a grid, what it refuses, and what cheap metrics say of the gain."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from mim_torchrec.pipeline.ablation import encoders_of, points_of, rates_of, report_of, shown
from mim_torchrec.pipeline.ablation_grid import Grid, load_grid, pipeline_of
from mim_torchrec.pipeline.reporting import StageResult
from mim_torchrec.pipeline.spec import PipelineError

TWO = {"plain": {"plain": "plain:a+b"}, "mim": {"csft": {"epochs": 3}}}


def grid(**changes) -> Grid:
    return Grid.model_validate({"name": "g", "seeds": [0, 7], "encoders": TWO, **changes})


def test_every_encoder_has_a_search_and_a_table_and_a_probe_of_each_seed():
    pipeline = pipeline_of(grid(), Path("/data"))
    assert list(pipeline.stages) == [
        "base.0", "base.7", "search.plain.-", "table.plain.-", "ctr.plain.0", "ctr.plain.7",
        "csft.mim.0", "search.mim.0", "table.mim.0", "csft.mim.7", "search.mim.7", "table.mim.7",
        "ctr.mim.0", "ctr.mim.7",
    ]  # fmt: skip
    assert pipeline.dependencies["ctr.mim.7"] == ["table.mim.7"]
    assert pipeline.dependencies["ctr.plain.7"] == ["table.plain.-"]
    assert pipeline.dependencies["search.mim.7"] == ["csft.mim.7"]


def test_what_is_held_out_of_training_is_what_is_searched():
    stages = pipeline_of(grid(held_out=0.2), Path("/data")).stages
    assert (
        stages["csft.mim.7"].flags["validation-fraction"] == 0.2 and stages["csft.mim.7"].flags["seed"] == 7
    )
    assert {s.flags["held-out-fraction"] for name, s in stages.items() if name.startswith("search")} == {0.2}


def test_flags_of_an_encoder_stand_over_those_of_all_and_probes_are_the_same():
    stages = pipeline_of(grid(csft={"epochs": 9, "lr": 0.1}, ctr={"lr": 0.5}), Path("/data")).stages
    assert {key: stages["csft.mim.0"].flags[key] for key in ("epochs", "lr")} == {"epochs": 3, "lr": 0.1}
    assert {stages[name].flags["lr"] for name in ("base.0", "ctr.plain.0", "ctr.mim.0")} == {0.5}
    assert (stages["base.0"].flags["mim"], stages["ctr.mim.0"].flags["mim"]) == ("off", "on")
    assert all(stage.files == ["/data/dataset.json"] for stage in stages.values())


def test_an_export_in_another_precision_takes_no_features_of_float32():
    encoders = {
        "full": {"plain": "plain:a+b", "export": {"precision": "fp32"}},
        "low": {"plain": "plain:a+b"},
    }
    stages = pipeline_of(grid(export={"precision": "bf16"}, encoders=encoders), Path("/data")).stages
    kept = [name for name, stage in stages.items() if "feature-cache" in stage.flags]
    assert kept == ["search.full.-", "table.full.-", "search.low.-"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [1, 1]\n[encoders.a]", "seeds: .1, 1. has one twice"),
        ("csft = { seed = 3 }\n[encoders.a]", "csft.seed: the grid sets it"),
        ("[encoders.a.csft]\nvalidation_fraction = 0.5", "encoders.a.csft.validation_fraction: the grid"),
        ("[encoders.a]\nplain = 'plain:x+y'\ncsft = { lr = 1 }", "encoders.a: plain towers are not trained"),
        ("[encoders.a]\nscft = { lr = 1 }", "encoders.a.scft: unknown key; did you mean 'csft'"),
        ("sedes = [1]\n[encoders.a]", "sedes: unknown key; did you mean 'seeds'"),
        ("held_out = 1.0\n[encoders.a]", "held_out: Input should be less than 1"),
        ("seeds = [1]", "encoders: missing"),
        ("= 1", "not TOML"),
    ],
)  # fmt: skip
def test_a_grid_that_is_wrong_is_refused_by_its_place(tmp_path, text, message):
    file = tmp_path / "grid.toml"
    file.write_text(f'name = "g"\n{text}\n')
    with pytest.raises(PipelineError, match=f"{file}: .*{message}"):
        load_grid(file)


def result(folder: Path, name: str, **files) -> tuple[str, StageResult]:
    (folder / name).mkdir()
    for file, content in files.items():
        (folder / name / f"{file}.json").write_text(json.dumps(content))
    return name, StageResult(name=name, state="done", out=folder / name)


def found(log_rank: float) -> dict[str, float]:
    return {"log_rank": log_rank, "mrr": 1 / log_rank, "recall_at_10": 0.2, "mean_rank": log_rank * 9,
            "recall_at_100": 1 - log_rank / 10, "held_out_from": 50}  # fmt: skip


def finished(folder: Path) -> dict[str, StageResult]:
    return dict([
        *(result(folder, f"base.{seed}", metrics={"auc": 0.5 + seed / 100, "ne": 1.0}) for seed in (0, 7)),
        result(folder, "search.plain.-", retrieval=found(5.0)),
        *(result(folder, f"ctr.plain.{seed}", metrics={"auc": 0.6, "ne": 0.9}) for seed in (0, 7)),
        *(result(folder, f"search.mim.{seed}", retrieval=found(3.0 - seed / 10)) for seed in (0, 7)),
        *(result(folder, f"csft.mim.{seed}", metrics={"loss": 2.0 + seed, "trained_until": 50 + seed})
          for seed in (0, 7)),
        *(result(folder, f"ctr.mim.{seed}", metrics={"auc": 0.7, "ne": 0.8}) for seed in (0, 7)),
    ])  # fmt: skip


def test_gains_are_over_the_base_of_the_same_seed(tmp_path):
    points = points_of(grid(), finished(tmp_path))
    assert [(p["encoder"], p["seed"], round(p["gain"], 4), p["loss"]) for p in points] == [
        ("plain", 0, 0.1, None), ("plain", 7, 0.03, None), ("mim", 0, 0.2, 2.0), ("mim", 7, 0.13, 9.0),
    ]  # fmt: skip
    best, worst = encoders_of(points)
    assert (best["encoder"], worst["encoder"]) == ("mim", "plain")
    assert best["gain"] == pytest.approx(0.165) and best["gain_deviation"] == pytest.approx(0.07 / 2**0.5)


def test_plain_towers_are_shown_and_tell_nothing_of_the_rate(tmp_path):
    report = report_of(grid(), finished(tmp_path))
    assert report["base"] == pytest.approx({"0": 0.5, "7": 0.57})
    assert {rate["n"] for rate in report["metrics"].values()} == {2}
    assert report["watch"] is None and "none of these metrics" in shown(report)
    assert "plain" in shown(report)


def test_encoders_that_were_trained_on_what_is_searched_are_named(tmp_path):
    report = report_of(grid(), finished(tmp_path))
    assert [(p["encoder"], p["seed"]) for p in report["points"] if p["overlaps"]] == [("mim", 7)]
    assert "Trained on pairs later than the first that is searched: mim." in shown(report)


def with_others(folder: Path, searches: list[dict[str, float]], aucs: list[float]) -> dict[str, Any]:
    """The report of three trained encoders, two of which have these searches and AUCs."""
    results = finished(folder)
    for k, (search, auc) in enumerate(zip(searches, aucs, strict=True)):
        results |= dict([result(folder, f"search.other{k}.0", retrieval=search),
                         result(folder, f"csft.other{k}.0", metrics={"loss": 1.0, "trained_until": 49}),
                         result(folder, f"ctr.other{k}.0", metrics={"auc": auc, "ne": 1.0})])  # fmt: skip
    return report_of(grid(seeds=[0], encoders=TWO | {"other0": {}, "other1": {}}), results)


def test_a_metric_that_orders_encoders_the_other_way_round_is_not_watched(tmp_path):
    report = with_others(tmp_path, [found(4.0), found(4.5)], [0.75, 0.8])
    assert report["metrics"]["log_rank"]["spearman"] == pytest.approx(-1, abs=1e-4)
    assert report["watch"] is None and "none of these metrics" in shown(report)


def test_the_report_names_the_metric_that_orders_encoders_as_their_gain_does(tmp_path):
    same = found(3.0) | {"mrr": 0.5}
    searches = [same | {"log_rank": 4.0, "mean_rank": 1.0}, same | {"log_rank": 4.5, "mean_rank": 2.0}]
    report = with_others(tmp_path, searches, [0.65, 0.64])
    assert report["watch"] == "log_rank" and report["metrics"]["log_rank"]["spearman"] == pytest.approx(
        1, abs=1e-4
    )
    assert report["metrics"]["recall_at_10"]["spearman"] is None
    printed = shown(report)
    assert "Watch log_rank: over 3 runs" in printed and printed.index("mim ") < printed.index("plain ")


POINTS = [(5.0, 0.01), (3.0, 0.03), (4.0, 0.03), (2.0, 0.02), (1.0, 0.05)]


def test_correlations_are_those_of_scipy_with_less_turned_into_more():
    points = [dict.fromkeys(("mrr", "recall_at_10", "recall_at_100", "mean_rank", "loss"), 0.5) |
              {"log_rank": x, "gain": y, "trained": True} for x, y in POINTS]  # fmt: skip
    rate = rates_of(points)["log_rank"]
    x, y = [-a for a, _ in POINTS], [b for _, b in POINTS]
    assert rate["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-4)
    line = stats.linregress(x, y)
    assert rate["pearson"] == pytest.approx(line.rvalue)
    deviation = (sum((a - sum(x) / 5) ** 2 for a in x) / 4) ** 0.5
    assert rate["auc_per_deviation"] == pytest.approx(line.slope * deviation)
    assert rates_of(points[:2])["log_rank"]["spearman"] is None


def test_runs_that_do_not_differ_name_no_metric(tmp_path):
    alone = finished(tmp_path)
    report = report_of(grid(seeds=[0], encoders={"mim": {}}), alone)
    assert report["watch"] is None and "none of these metrics" in shown(report)
