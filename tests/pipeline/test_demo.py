"""The whole demo, every stage launched by TorchX on two ranks, on a shop as small as can be."""

import json

import pytest

from mim_torchrec.benchmarks.paper import demo

pytestmark = pytest.mark.slow


TINY = (
    "--items 200 --users 100 --requests 300 --searches 60 --csft-epochs 1 --csft-batch-size 16 --ctr-epochs 1"
)


@pytest.fixture(scope="module")
def out(forked_stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.main(["--out", str(folder), *TINY.split()])
    return folder


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def test_the_report_has_every_promised_key(report):
    for model in ("base", "mim"):
        assert {"auc", "gauc", "ne"} <= report["ctr"][model].keys()
    assert {"mim_minus_base_auc", "mim_minus_base_ci"} <= report["ctr"].keys()
    assert [entry["set"] for entry in report["cold_start"]] == [f"S{k}" for k in range(1, 11)]
    assert report["controls"].keys() == {"permuted", "no_style"}
    assert report["by_category"]


def test_the_table_holds_every_item_and_training_left_it_as_it_was(report):
    assert report["table"]["rows"] == 200
    assert report["table"]["digest_before"] == report["table"]["digest_after"]


def test_every_stage_was_timed_and_ran_on_two_ranks(out, report):
    assert {"shop", "csft", "export-table", "ctr-base", "ctr-mim"} <= report["stages"].keys()
    assert all(seconds > 0 for seconds in report["stages"].values())
    metrics = json.loads((out / "ctr" / "mim" / "metrics.json").read_text())
    assert metrics["world_size"] == 2


def test_pages_and_plots_were_written(out):
    for name in ("report.md", "report.html", "cold_start.png", "curves.png"):
        assert (out / name).stat().st_size > 0


def test_a_second_call_runs_no_stage_again(out, report, capsys):
    demo.main(["--out", str(out), *TINY.split()])
    printed = capsys.readouterr().out
    assert "started" not in printed
    assert "Base test AUC" in printed and "MIM test AUC" in printed
    assert json.loads((out / "report.json").read_text())["ctr"] == report["ctr"]
