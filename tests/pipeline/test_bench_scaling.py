"""The benchmark of how steps grow, through its `main`, at a small size; what is fast is not asked here."""

import json

import pytest

from mim_torchrec.benchmarks.speed.scaling import exponent, main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]


SMALL = ["--histories", "5", "10", "--batches", "8", "16", "--table-rows", "1000", "5000",
         "--batch-size", "8", "--max-behaviors", "5", "--dim", "8", "--mm-dim", "8", "--rounds", "2",
         "--simulated-items", "1000000", "1420000000", "--simulated-gpus", "4", "100"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("scaling")
    main(["--out", str(out), *SMALL])
    assert not (out / "tables").exists() and (out / "scaling.png").stat().st_size
    page = (out / "report.md").read_text()
    assert "Measured: longest history" in page and "Simulated: where a table would go" in page
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_steps_are_measured_on_one_rank_and_on_two(report, ranks):
    own = report["measured"][ranks]
    assert list(own["history"]) == ["5", "10"] and list(own["batch"]) == ["8", "16"]
    for by_model in (*own["history"].values(), *own["batch"].values()):
        for figure, ratio in by_model["mim_over_base"].items():
            assert ratio == pytest.approx(by_model["mim"][figure] / by_model["base"][figure])
    assert own["batch"]["16"]["mim"]["step_mb"] > own["batch"]["8"]["mim"]["step_mb"] > 0
    rows = {count: figures["mim"]["table_gb"] for count, figures in own["table_rows"].items()}
    assert rows["5000"] == pytest.approx(5 * rows["1000"])


def test_the_papers_scale_is_simulated(report):
    by_size = {(row["items"], row["gpus"]): row for row in report["simulated"]}
    small, large = by_size[1_000_000, 4], by_size[1_420_000_000, 100]
    assert small["fits"] and large["fits"]
    assert large["table_gib"] == pytest.approx(1_420_000_000 * 8 * 2 / 2**30)
    assert 100 * (large["hbm_gib"] + large["host_gib"]) >= large["table_gib"]


def test_the_power_of_growth_is_that_of_the_values():
    known = {str(x): {"mim": {"step_ms": 3.0 * x**1.5}} for x in (10, 20, 80)}
    assert exponent(known, "mim", "step_ms") == pytest.approx(1.5)
