"""The benchmark of the loss, at a small size."""

import json

import pytest

from mim_torchrec.benchmarks.speed.csft_loss import main
from mim_torchrec.errors import OptionError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]


def test_the_report_holds_every_figure_and_target(tmp_path):
    main(["--out", str(tmp_path), "--queries", "8", "--dim", "4", "--queue-batches", "3", "--steps", "1",
          "--naive-items", "64", "--rounds", "1", "--loop-queries", "4"])  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["paper_scale"]["items"] == 2 * 8 * (3 + 1)
    assert report["paper_scale"]["negatives"] == pytest.approx(2 * 8 * (3 + 1) - 1)
    assert report["paper_scale"]["extra_mib"] > 0 and report["paper_scale"]["seconds"] > 0
    assert report["naive"]["time_ratio"] > 0
    assert 0 < report["naive"]["grad_rel_error"] <= 1e-5
    assert report["open_clip"]["grad_max_diff"] <= 1e-5
    assert len(report["targets"]) == 5 and report["config"]["queries"] == 8
    text = (tmp_path / "report.md").read_text()
    assert all(target["claim"] in text for target in report["targets"])


def test_a_size_of_0_is_refused(tmp_path):
    with pytest.raises(OptionError, match="--queue-batches is 0; it must be at least 1"):
        main(["--out", str(tmp_path), "--queue-batches", "0"])
