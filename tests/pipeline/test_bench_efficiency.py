"""Table 6 through its `main`, at a tiny size; what it costs is not asked here."""

import json

import pytest

from mim_torchrec.benchmarks.paper.efficiency.config import parse
from mim_torchrec.benchmarks.paper.efficiency.main import main
from mim_torchrec.benchmarks.paper.efficiency.pages import PAPER

pytestmark = pytest.mark.slow


SMALL = ["--vision", "test_vit", "--image-size", "32", "--text", "bert-tiny", "--samples", "4", "--dim", "8",
         "--mm-dim", "16", "--id-rows", "500", "--batch-size", "8", "--time-vision", "test_vit",
         "--time-image-size", "32", "--time-samples", "4", "--rounds", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("efficiency")
    main(["--out", str(out), *SMALL])
    for kind in ("md", "html"):
        page = (out / f"report.{kind}").read_text()
        assert "Base + MIM (E2E)" in page and "memory (GB), estimated" in page and "720.38" in page
    return json.loads((out / "report.json").read_text())


def test_every_row_has_its_figures_in_training_and_inference(report):
    assert list(report["rows"]) == ["base", "wo_rc", "e2e", "mim"]
    for name, phases in report["rows"].items():
        for phase in ("train", "inference"):
            values = phases[phase]
            assert min(values["gflops"], values["memory_gb"], values["embedding_kb"]) > 0
            for key, full in (("gflops_delta", "gflops"), ("memory_delta", "memory_gb")):
                base = report["rows"]["base"][phase][full]
                assert values[key] == pytest.approx((values[full] - base) / base), (name, phase)


def test_without_a_representation_center_every_sample_pays_for_its_items(report):
    rows = {name: phases["train"]["gflops"] for name, phases in report["rows"].items()}
    assert rows["wo_rc"] - rows["mim"] == pytest.approx(report["foundation_gflops"], rel=1e-3)
    assert rows["e2e"] - rows["wo_rc"] > 1.8 * report["foundation_gflops"]
    assert report["rows"]["e2e"]["inference"] == report["rows"]["wo_rc"]["inference"]


def test_every_target_is_compared_with_its_figure(report):
    met = [(entry["value"], entry["met"]) for entry in report["targets"]]
    fixed = report["fixed"]
    flops = fixed["rows"]["mim"]["train"]["gflops_delta"]
    memory = [fixed[rows]["mim"]["train"]["memory_delta"] for rows in ("rows", "rows_small_tables")]
    assert met[1:4] == [(flops, flops <= 0.20), *((delta, delta <= 0.01) for delta in memory)]
    ratio = report["e2e_over_forward"]
    assert met[0] == (ratio, abs(ratio / 3 - 1) <= 0.02)
    errors = [abs(v["error"]) for phases in report["validation"].values() for v in phases.values()]
    assert met[4] == (max(errors), max(errors) <= 0.03)


def test_steps_of_all_rows_are_timed(report):
    timed = report["wall_clock"]["rows"]
    assert list(timed) == list(report["rows"])
    assert all(timed[name][phase]["samples_per_second"] > 0 for name in timed for phase in timed[name])
    assert timed["base"]["train"]["speed_ratio"] == 1


def test_the_papers_deltas_stand_beside_its_costs():
    for row in ("wo_rc", "e2e"):
        gflops, delta, _, memory_delta = PAPER[row]["train"]
        assert delta == pytest.approx(gflops / 0.114 - 1, rel=1e-4)
        assert memory_delta == pytest.approx(PAPER[row]["train"][2] / 1.1 - 1, abs=0.01)


def test_a_preset_gives_defaults_that_flags_change():
    config = parse(["--preset", "small", "--samples", "3"])
    assert (config.vision, config.samples, config.items_per_sample) == ("eva02_tiny_patch14_224", 3, 5)
    assert parse([]).table.vision == "eva02"
