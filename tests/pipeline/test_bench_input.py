"""`make bench-input` through its `main`, on a few requests; what is fast is not asked here."""

import json

import pyarrow.parquet as pq
import pytest

from mim_torchrec.benchmarks.records.figures import draw
from mim_torchrec.benchmarks.records.registry import BENCHMARKS
from mim_torchrec.benchmarks.speed.input import growth, main
from mim_torchrec.benchmarks.speed.input_data import InputSizes, request_table, write_dataset
from mim_torchrec.data.requests import RequestReader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]

SMALL = ["--requests", "300", "--row-groups", "50", "20000", "--rounds", "1", "--behaviors", "5",
         "--items", "90", "--users", "60", "--categories", "7", "--batch-size", "64",
         "--startup-requests", "120",
         "--startup-sizes", "1", "2", "--train-requests", "200", "--epochs", "1", "--dim", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench-input")
    main(["--out", str(out), *SMALL])
    assert "raw scan" in (out / "report.html").read_text()
    return json.loads((out / "report.json").read_text())


def test_the_report_has_what_is_measured(report):
    assert set(report["reader"]["cpu_over_raw"]) == {"50", "20000"}
    assert min(report["reader"]["cpu_over_raw"].values()) > 0
    assert report["reader"]["peak_mib"] == max(report["reader"]["peak_mib_by_row_group"].values())
    assert set(report["startup"]) == {"1", "2"} and min(report["startup"].values()) > 0
    assert report["reader"]["two_over_one"] > 0 and report["reader"]["two_raw_over_one"] > 0
    assert 0 <= report["data_wait"] < 1


def test_every_target_is_compared_with_its_figure(report):
    assert len(report["targets"]) == 5
    values = {entry["claim"].split(",")[0]: entry for entry in report["targets"]}
    waits = next(entry for claim, entry in values.items() if "the loop waits" in claim)
    assert waits["value"] == report["data_wait"] and waits["met"] == (report["data_wait"] <= 0.02)


def test_the_registry_reads_its_figures_and_draws_it(report):
    own = next(one for one in BENCHMARKS if one.name == "input")
    like = {"1000": report["reader"]["cpu_over_raw"]["50"], "20000": 1.0}
    known = report | {"reader": report["reader"] | {"cpu_over_raw": like}}
    assert len(own.read(known)) == len(own.figures)
    assert draw("input", report).startswith(b"\x89PNG")


def test_growth_is_the_largest_from_one_size_to_the_next():
    starts = {"1": 2.0, "2": 2.1, "4": 2.52, "8": 2.52}
    assert growth({size: {"beyond_scan": s} for size, s in starts.items()}) == pytest.approx(0.2)


def test_the_data_is_what_readers_take(tmp_path):
    sizes = InputSizes(behaviors=6, candidates=2, items=40, users=10, categories=3)
    root = write_dataset(tmp_path, sizes, 300, 64)
    (file,) = (root / "requests" / "train").iterdir()
    assert pq.ParquetFile(file).metadata.num_row_groups == 5
    reader = RequestReader([file], batch_size=10)
    assert sum(batch.num_requests for batch in reader) == 300
    assert request_table(sizes, 50, 1).equals(request_table(sizes, 50, 1))
