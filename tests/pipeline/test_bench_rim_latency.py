"""The benchmark of new items, at a small size."""

import json

import pytest

from mim_torchrec.benchmarks.speed.rim_latency import main

pytestmark = pytest.mark.usefixtures("forked_stages")


def test_the_report_holds_every_figure_by_store_and_transport(tmp_path):
    out = tmp_path / "run"
    main(["--out", str(out), "--stores", "redis", "--transports", "log", "--items", "4", "--bursts", "1",
          "--burst", "3", "--base", "50", "--vision", "test_resnet.r160_in1k", "--image-size", "32",
          "--window-seconds", "0.05"])  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    for name in ("p50_ms", "p99_ms", "encoder_ms", "burst_p50_ms", "burst_p99_ms", "publish_ms", "windows"):
        assert report[name]["redis"]["log"] > 0, name
    assert report["encoder_alone_ms"] > 0 and len(report["targets"]) == 2
    assert all(entry["claim"] in (out / "report.md").read_text() for entry in report["targets"])
