"""The benchmark of serving through its `main`, at a small size; what is fast is not asked here."""

import json

import pytest
import torch

from mim_torchrec.benchmarks.speed.serving import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]


SMALL = ["--behaviors", "3", "1000", "--candidates", "20", "--mm-dims", "8", "--id-dim", "4", "--models",
         "sim/paper", "--items", "200", "--users", "10", "--rounds", "2", "--requests", "4", "--clients", "2",
         "--threads", "1", "--ubms", "din", "sim", "--score-rounds", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("serving")
    threads = torch.get_num_threads()
    main(["--out", str(out), *SMALL])
    assert torch.get_num_threads() == threads
    found = json.loads((out / "report.json").read_text())
    page = (out / "report.md").read_text()
    assert all(target["claim"] in page for target in found["targets"])
    return found


def test_every_figure_is_there_by_the_length_of_the_history(report):
    for name in ("direct_over_matrix", "p50_ms", "p99_ms"):
        assert set(report[name]) == {"3", "1000"} and min(report[name].values()) > 0
    assert {clients: set(found) for clients, found in report["requests_per_s"].items()} == {
        "1": {"3", "1000"}, "2": {"3", "1000"}
    }  # fmt: skip


def test_scores_are_timed_in_all_forms(report):
    figures = report["models"]["sim/paper"]["1000"]
    assert min(figures[f"{form}_ms"] for form in ("built", "cached", "plain", "p50", "p99")) > 0
    assert figures["p50_ms"] <= figures["p99_ms"]


def test_targets_are_compared_with_their_figures(report):
    met = {entry["claim"]: entry["met"] for entry in report["targets"]}
    assert met["sim/paper, 1000 behaviors, one client: p99 at most 30 ms"] == (report["p99_ms"]["1000"] <= 30)
    assert len(met) == 5 + 2 + 1 + 1  # dim 8 has no target of its ratio
    assert met["private memory of a server: at most 350 MiB"] == (report["rss_mib"] <= 350)


def test_a_server_is_measured_from_its_start_to_its_end(report):
    assert 0 < report["exit_s"] and 0 < report["start_s"] and 0 < report["rss_mib"]
    assert {count: set(found) for count, found in report["workers"].items()} == {
        "1": {"requests_per_s"}, "2": {"requests_per_s"}
    }  # fmt: skip
    assert set(report["users_per_request"]) == {"1", "8"} and min(report["users_per_request"].values()) > 0


def test_scores_of_models_are_compared_by_preset(report):
    presets = {"paper", "recommended"}
    assert set(report["recommended_over_paper"]) == {"din", "sim"}
    for name in ("score_over_matmul", "p99_over_p50"):
        assert {ubm: set(found) for ubm, found in report[name].items()} == {"din": presets, "sim": presets}
    scores = report["scores"]
    expected = scores["sim/recommended"]["score_ms"] / scores["sim/paper"]["score_ms"]
    assert report["recommended_over_paper"]["sim"] == pytest.approx(expected)
    assert report["score_over_matmul"]["din"]["paper"] == pytest.approx(
        scores["din/paper"]["score_ms"] / scores["din/paper"]["matmul_ms"]
    )
