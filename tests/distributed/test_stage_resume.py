"""Interrupted and resumed CTR and pre-training runs are bit-identical to uninterrupted ones."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.ctr.main import main as train_ctr
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.pretraining.main import main as pretrain
from mim_torchrec.training.history import read_history
from tests.programs import small_shop
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return small_shop(tmp_path_factory.mktemp("resume"), searches=40, requests=400, users=60)


def command(data: Path, out: Path, *options: str) -> list[str]:
    """Two epochs with a checkpoint at every step."""
    return ["--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "256",
            "--checkpoint.every", "1", "--checkpoint.keep", "99", *options]  # fmt: skip


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory) -> Callable[..., Path]:
    """An uninterrupted run with these options, of which tests take copies."""

    @cache
    def train(ranks: int, *options: str) -> Path:
        out = tmp_path_factory.mktemp("trained") / "ctr"
        run_ranks(train_ctr, ranks, command(shop, out, *options))
        return out

    return train


def forget_after(out: Path, name: str) -> None:
    """Leave a run as one that was killed right after a checkpoint."""
    for path in (out / "checkpoints").iterdir():
        if path.name > name:
            path.rename(path.with_name(f"{path.name}.partial"))
    assert (out / "checkpoints" / name).is_dir()


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in asdict(read_history(out / "history.jsonl"))["steps"]]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("at", ["epoch-0001-step-00000002", "epoch-0001-step-00000000"])
def test_ctr(shop, trained, tmp_path, ranks, at):
    options = ["--mim", "off", "--dropout", "0.2"]
    out = shutil.copytree(trained(ranks, *options), tmp_path / "ctr")
    whole, predictions = losses(out), pq.read_table(out / "predictions.parquet")
    forget_after(out, at)
    run_ranks(train_ctr, ranks, command(shop, out, *options))
    assert losses(out) == whole
    assert pq.read_table(out / "predictions.parquet").equals(predictions)


def test_pretraining(shop, tmp_path):
    out = tmp_path / "pretrain"
    command = [
        "--data", str(shop), "--out", str(out), "--vision.name", "test_vit", "--vision.weights", "random",
        "--vision.image-size", "32", "--text.name", "bert-tiny", "--text.weights", "random",
        "--checkpoint.every", "1", "--checkpoint.keep", "99", "--dda-vision.mask-size", "8",
    ]  # fmt: skip
    for phase in ("dda-vision", "dda-text", "dma"):
        command += [f"--{phase}.epochs", "2", f"--{phase}.batch-size", "64"]
    run_ranks(pretrain, 2, command)
    phases = [out / name for name in ("dda-vision", "dda-text", "dma")]
    whole = [losses(phase) for phase in phases]
    version = json.loads((out / "metrics.json").read_text())["towers_version"]
    forget_after(phases[1], "epoch-0001-step-00000001")
    for path in (phases[2] / "checkpoints").iterdir():
        path.rename(path.with_name(f"{path.name}.partial"))
    run_ranks(pretrain, 2, command)
    assert [losses(phase) for phase in phases] == whole
    assert json.loads((out / "metrics.json").read_text())["towers_version"] == version


def test_ctr_with_a_warm_up_goes_on_at_the_rates_it_had(shop, tmp_path):
    out = tmp_path / "ctr"
    words = command(shop, out, "--mim", "off", "--warmup-steps", "5")
    run_ranks(train_ctr, 1, words)
    whole = losses(out)
    forget_after(out, "epoch-0000-step-00000003")
    run_ranks(train_ctr, 1, words)
    assert losses(out) == whole


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("mim", ["off", "on"])
def test_ctr_goes_on_with_another_number_of_ranks(shop, trained, tmp_path, before, after, mim):
    options = ["--mim", mim]
    if mim == "on":
        items = pq.read_table(shop / "items")["item_id"].to_numpy()
        writer = TableWriter(tmp_path / "table", table_version="v", dim=8, dtype="float16", encoder={})
        writer.write_shard(torch.from_numpy(items.copy()), torch.randn(len(items), 8))
        writer.finish(None)
        options += ["--table", str(tmp_path / "table")]
    out = shutil.copytree(trained(before, *options), tmp_path / "ctr")
    words, whole = command(shop, out, *options), losses(out)
    forget_after(out, "epoch-0001-step-00000002")
    run_ranks(train_ctr, after, words)
    again, half = losses(out), len(whole) // 2
    assert again[: half + 2] == whole[: half + 2]  # what was trained before
    assert abs(len(again) - len(whole)) <= 1
    assert np.mean(again[half + 2 :]) == pytest.approx(np.mean(whole[half + 2 :]), abs=0.05)
    assert json.loads((out / "metrics.json").read_text())["world_size"] == after
    forget_after(out, "epoch-0001-step-00000001")  # which the second run wrote, of its own part
    run_ranks(train_ctr, after, words)
    assert losses(out) == again


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_an_epoch_that_others_have_read_whole_is_evaluated(shop, trained, tmp_path, before, after):
    out = shutil.copytree(trained(before, "--mim", "off"), tmp_path / "ctr")
    whole = losses(out)
    forget_after(out, f"epoch-0000-step-{len(whole) // 2:08d}")
    run_ranks(train_ctr, after, command(shop, out, "--mim", "off"))
    again = losses(out)
    assert again[: len(whole) // 2] == whole[: len(whole) // 2] and abs(len(again) - len(whole)) <= 1
    assert len(read_history(out / "history.jsonl").epochs) == 2
    assert json.loads((out / "metrics.json").read_text())["world_size"] == after
