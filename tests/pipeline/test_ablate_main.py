"""`mim ablate` on a small shop: its report is what the stages found, and a second run keeps them."""

import json

import pytest

from mim_torchrec.pipeline.ablation import main
from tests.programs import small_shop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]

GRID = """
name = "small"
held_out = 0.2

[csft]
"vision.name" = "test_convnext"
"vision.weights" = "random"
"vision.image-size" = 32
"text.name" = "bert-tiny"
"text.weights" = "random"
"head.dim" = 16
"head.fusion-dim" = 8
freeze-towers = false
epochs = 1
batch-size = 16

[ctr]
epochs = 1
batch-size = 64

[encoders.only]
"""


def test_the_report_is_of_the_stages_and_a_second_run_keeps_them(tmp_path, capfd):
    data, out = small_shop(tmp_path), tmp_path / "run"
    (tmp_path / "grid.toml").write_text(GRID)
    words = [str(tmp_path / "grid.toml"), "--data", str(data), "--out", str(out)]
    main(words)
    first = json.loads((out / "report.json").read_text())
    point = first["points"][0]
    assert point["log_rank"] == json.loads((out / "search.only.0" / "retrieval.json").read_text())["log_rank"]
    assert point["auc"] == json.loads((out / "ctr.only.0" / "metrics.json").read_text())["auc"]
    assert point["gain"] == point["auc"] - first["base"]["0"]
    assert first["watch"] is None and "none of these metrics" in (out / "report.md").read_text()
    capfd.readouterr()
    main(words)
    assert "started" not in capfd.readouterr().out
    assert json.loads((out / "report.json").read_text()) == first
