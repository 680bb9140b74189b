"""`mim ctr --precision bf16`: near float32, resumed to the bit, and evaluated as it was trained."""

import json
from pathlib import Path

import pytest

from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train
from mim_torchrec.errors import OptionError
from mim_torchrec.training.history import read_history
from tests.pipeline.test_ctr_main import SMALL, write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("precision") / "data"
    write_dataset(root)
    return root


def run(data: Path, out: Path, *flags: str) -> list[float]:
    """Losses of all steps."""
    train(["--data", str(data), "--out", str(out), "--mim", "off", *SMALL, *flags])
    return [step["loss"] for step in read_history(out / "history.jsonl").steps]


def test_losses_in_bf16_are_near_those_of_fp32_and_a_resumed_run_has_the_same(data, tmp_path):
    full = run(data, tmp_path / "fp32", "--epochs", "2")
    low = run(data, tmp_path / "bf16", "--epochs", "2", "--precision", "bf16")
    assert low != full and low == pytest.approx(full, rel=0.05)
    resumed = tmp_path / "resumed"
    run(data, resumed, "--epochs", "1", "--precision", "bf16")
    assert run(data, resumed, "--epochs", "2", "--precision", "bf16") == low
    predictions = "predictions.parquet"
    assert (resumed / predictions).read_bytes() == (tmp_path / "bf16" / predictions).read_bytes()
    evaluate(["--model", str(resumed), "--out", str(tmp_path / "evaluated")])
    trained, evaluated = (
        json.loads((folder / "metrics.json").read_text()) for folder in (resumed, tmp_path / "evaluated")
    )
    assert evaluated["auc"] == pytest.approx(trained["auc"], abs=1e-3)  # other batches, other roundings


def test_tf32_without_a_gpu_is_refused(data, tmp_path):
    with pytest.raises(OptionError, match="--precision tf32 is of GPUs"):
        run(data, tmp_path / "tf32", "--precision", "tf32")
