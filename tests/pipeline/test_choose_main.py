"""`mim choose`: the best of several click models on validation."""

import json
from pathlib import Path

import pytest

from mim_torchrec.ctr.choosing import main


def model(folder: Path, name: str, *aucs: float | None) -> Path:
    """What a CTR run leaves, as far as it matters here; the highest AUC is the best epoch."""
    out = folder / name
    out.mkdir()
    best = max((auc for auc in aucs if auc is not None), default=None)
    lines = [{"epoch": k, "loss": 1.0, "auc": auc, "ne": 1 - (auc or 0), "is_best": auc == best}
             for k, auc in enumerate(aucs)]  # fmt: skip
    (out / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "config.json").write_text(json.dumps({"lr": 0.1, "name": name}))
    return out


def test_the_run_with_the_best_epoch_is_chosen(tmp_path, capsys):
    runs = [model(tmp_path, "a", 0.6, 0.7), model(tmp_path, "b", 0.8, 0.5), model(tmp_path, "c", 0.8)]
    main([*map(str, runs), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "best.json").read_text())
    assert found == {"run": str(runs[1]), "name": "b", "metric": "auc", "value": 0.8,
                     "values": [0.7, 0.8, 0.8],
                     "config": {"lr": 0.1, "name": "b"}}  # fmt: skip
    assert "the best of 3" in capsys.readouterr().out


def test_entropy_is_best_when_it_is_lowest(tmp_path):
    runs = [model(tmp_path, "a", 0.6), model(tmp_path, "b", 0.9)]
    main([*map(str, runs), "--out", str(tmp_path / "out"), "--metric", "ne"])
    assert json.loads((tmp_path / "out" / "best.json").read_text())["name"] == "b"


def test_a_run_without_the_metric_is_an_error(tmp_path):
    run = model(tmp_path, "a", None)
    with pytest.raises(ValueError, match="no epoch has a validation auc"):
        main([str(run), "--out", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError):
        main([str(tmp_path / "no"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
