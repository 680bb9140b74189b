"""The registry of benchmarks, the program that runs them all, and the page of their records."""

import dataclasses
import importlib
import json
import re

import pytest

from mim_torchrec.benchmarks.records import bench, benchmark_report
from mim_torchrec.benchmarks.records.registry import BENCHMARKS, EXPERIMENTS, RESULTS, Benchmark
from mim_torchrec.errors import OptionError
from tests.unit.test_packaging import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]

PROGRAMS = {
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text()
}  # fmt: skip


def test_every_program_that_measures_is_in_the_registry():
    measuring = {name for name in PROGRAMS if not name.startswith(("records.", "cluster.", "gpu."))}
    assert measuring == {one.module for one in (*BENCHMARKS, *EXPERIMENTS)}


@pytest.mark.parametrize("one", [*BENCHMARKS, *EXPERIMENTS], ids=lambda one: one.name)
def test_it_has_a_target_that_runs_it(one):
    makefile, rule = (ROOT / "Makefile").read_text(), rf"{one.target.split()[0]}: install"
    found = re.search(
        rf"^{rule}.*\n(?:\t.*\n)*?\t.*-m mim_torchrec\.benchmarks\.([\w.]+) ", makefile, re.MULTILINE
    )
    assert found and found.group(1) == one.module


@pytest.mark.parametrize("one", BENCHMARKS, ids=lambda one: one.name)
def test_its_record_has_figures_claims_and_where_they_are_from(one):
    record = json.loads(one.record.read_text())
    assert one.read(record) and record["targets"]
    assert {"hardware", "versions", "config", "date", "git_commit"} <= set(record)


@pytest.mark.parametrize("one", BENCHMARKS, ids=lambda one: one.name)
def test_its_small_size_is_one_that_it_knows(one, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"mim_torchrec.benchmarks.{one.module}").main([*one.small, "--help"])
    assert ended.value.code == 0, capsys.readouterr().err


def test_the_small_record_has_the_figures_of_every_benchmark():
    small = json.loads(bench.SMALL.read_text())
    assert {name: set(own) for name, own in small["figures"].items()} == {
        one.name: set(one.figures) for one in BENCHMARKS
    }
    assert sum(small["seconds"].values()) < 20 * 60


def test_the_benchmark_report_is_what_the_records_make_of_it():
    page, images = benchmark_report.render()
    assert page == benchmark_report.PAGE.read_text(encoding="utf-8"), "run `make benchmark-report`"
    assert all((RESULTS / name).exists() for name in images)


def test_the_pages_say_what_the_records_say():
    readme, page = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "docs/results.md")
    )
    names = ("efficiency", "serving", "rim_latency", "chaos", "export_throughput", "frozen_table",
             "ctr_throughput")  # fmt: skip
    table6, serving, latency, chaos, export, frozen, throughput = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    p50, p99 = ([1e-3 * one for by_way in latency[name].values() for one in by_way.values()]
                for name in ("p50_ms", "p99_ms"))  # fmt: skip
    forms = [serving["forms"][dim]["1000"]["ratio"] for dim in ("64", "128")]
    small, large = (list(own.values()) for own in export["encoders"].values())
    large = [own["ratio"] for own in large]
    mim = table6["fixed"]["rows"]["mim"]["train"]
    phases = [phase for name in ("base", "mim") for phase in table6["rows"][name].values()]
    answers = serving["p99_ms"]
    said = [
        f"p99 of {answers['1000']:.0f} ms with 1,000 behaviors, {answers['10000']:.0f} ms with 10,000",
        f"({forms[0]:.1f} times faster; {forms[1]:.1f} times with d = 128)",
        f"{min(p50):.2f} to {max(p50):.2f} s after its arrival (p50; p99 {max(p99):.2f} s)",
        f"{chaos['kills']} SIGKILLs of RIM",
        f"of {chaos['rows']:,} rows compared none was wrong",
        f"{min(large):.2f} to {max(large):.2f} of the bare forward pass at 224 pixels",
        f"decoding leaves {small[1]['ratio']:.2f}.",
        f"{mim['gflops_delta']:.1%} more operations",
        *(f"| {phase['gflops']:.4f} (" for phase in phases),
    ]
    assert [one for one in said if one not in page] == []
    step = frozen["step"]["2"]
    ratios = [own["ratio"] for models in ("models", "models_5_candidates")
              for by_dim in throughput[models].values() for own in by_dim.values()]  # fmt: skip
    short = [
        f"step at dim 64 | {mim['gflops_delta']:.1%} |",
        f"two ranks | {step['trainable']['seconds'] / step['frozen']['seconds']:.1f} times faster |",
        f"{min(ratios):.1f} to {max(ratios):.1f} times |",
        f"1,000 behaviors | {answers['1000']:.0f} ms |",
        f"| {min(p50):.2f} to {max(p50):.2f} s |",
        f"after {chaos['kills']} SIGKILLs | 0 of {chaos['rows']:,} |",
    ]
    assert [one for one in short if one not in readme] == []


def test_a_figure_that_a_report_lacks_is_named():
    one = Benchmark(name="one", module="one", target="one", title="", small=(), figures={"x": ("a|b", "a|c")})
    assert one.read({"a": {"b": 3, "c": 2}}) == {"x": 1.5}
    with pytest.raises(KeyError, match="one has no a|c"):
        one.read({"a": {"b": 3}})


def test_what_moved_is_what_differs_by_more_than_the_tolerance():
    rows = bench.compare({"a": 1.3, "b": 1.2, "c": 5.0, "d": 0.0}, {"a": 1.0, "b": 1.0, "d": 0.0}, 0.25)
    assert [row["moved"] for row in rows] == [True, False, False, False]
    assert rows[0]["change"] == pytest.approx(0.3) and rows[2]["before"] is None


def test_it_runs_what_is_asked_for_and_compares_it(tmp_path, monkeypatch, capsys):
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"figures": {"csft_loss": {"time over the naive loss": 1e9}}}))
    monkeypatch.setattr(bench, "SMALL", small)
    words = ("--queries", "8", "--dim", "4", "--queue-batches", "3", "--steps", "1", "--naive-items", "64",
             "--rounds", "1", "--loop-queries", "4")  # fmt: skip
    own = next(one for one in BENCHMARKS if one.name == "csft_loss")
    tiny = dataclasses.replace(own, small=words)
    monkeypatch.setattr(bench, "BENCHMARKS", [tiny])
    bench.main(["--out", str(tmp_path / "out"), "--only", "csft_loss"])
    said = capsys.readouterr().out
    assert "MOVED time over the naive loss" in said and "1 figures moved" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["moved"] for row in report["figures"]["csft_loss"]] == [True, False, False]


def test_a_benchmark_that_fails_ends_it_and_is_named(tmp_path, monkeypatch):
    broken = Benchmark(
        name="csft_loss", module="speed.csft_loss", target="x", title="", small=("--no-such-flag", "1")
    )
    monkeypatch.setattr(bench, "BENCHMARKS", [broken])
    with pytest.raises(bench.BenchmarkFailed, match="csft_loss ended with 2"):
        bench.main(["--out", str(tmp_path), "--only", "csft_loss"])
    with pytest.raises(OptionError, match="there is no benchmark nothing"):
        bench.main(["--out", str(tmp_path), "--only", "nothing"])
