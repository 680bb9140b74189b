"""`make prepare-demo` and `make bench-prepare` through their mains, on logs as small as can be."""

import json
import shutil

import pytest

from mim_torchrec.benchmarks.paper import prepare_demo
from mim_torchrec.benchmarks.speed import prepare as prepare_bench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]

TINY = (
    "--items 200 --users 100 --requests 300 --searches 60 --csft-epochs 1 --csft-batch-size 16 "
    "--ctr-epochs 1 --nproc 1"
)


def test_damaged_logs_give_the_requests_of_the_shop_and_the_same_auc(tmp_path, capsys):
    prepare_demo.main(["--out", str(tmp_path), *TINY.split()])
    report = json.loads((tmp_path / "report.json").read_text())
    parts = report["rows"]
    assert all(part["equal"] == part["prepared"] for part in parts.values())
    assert parts["train"] == {"shop": 240, "prepared": 240, "equal": 240}
    young = report["left_out"]["requests"]["too_young_for_their_label"]
    assert sum(part["shop"] - part["prepared"] for part in parts.values()) == young
    if not young:
        assert all(found["prepared"] == found["shop"] for found in report["auc"].values())
    for kind in ("impression", "click"):
        counts = report["left_out"]["input"][kind]
        assert counts["repeated"] > 0 and counts["kept"] < counts["rows"]
    assert "from raw logs" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs a Java runtime")
def test_the_benchmark_has_its_figures(tmp_path):
    sizes = "--impressions 20000 --days 3 --users 500 --items 300 --spark-impressions 5000 --rounds 1"
    prepare_bench.main(["--out", str(tmp_path), *sizes.split(), "--memory", "1GB"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["events"] > 20_000 and report["seconds"] > 0 and report["peak_mib"] > 0
    assert report["over_bare"] > 1 and report["spark_equals_duckdb"] is True
    assert not (tmp_path / "log").exists() and (tmp_path / "report.md").exists()
