"""What a run of `mim ctr` leaves is never wrong: refused, killed, told to train on, or with two writers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.benchmarks.harness.fault_injection import Faults, Killed
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.embeddings import holder
from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.serving.bundling import write_bundle
from mim_torchrec.training.checkpoints import ResumeError
from mim_torchrec.training.history import read_history
from mim_torchrec.training.lease import Lease
from mim_torchrec.training.model_record import ModelMismatch
from mim_torchrec.training.run_directory import RunDirectory
from tests.pipeline.test_ctr_main import SMALL, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run") / "data"
    write_dataset(root)
    return root


def words(data: Path, out: Path, *flags: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), *SMALL, "--mim", "off", *flags]


@pytest.fixture(scope="module")
def whole(data) -> Path:
    out = data.parent / "whole"
    train(words(data, out))
    return out


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("flags", [["--content-pooling", "mean"], ["--spare-rows", "0.5"], ["--seed", "1"]])
def test_a_refused_rerun_changes_no_byte_of_the_finished_run(data, finished, flags):
    before = snapshot(finished)
    with pytest.raises(ResumeError, match=rf"{flags[0].strip('-').replace('-', '_')} .* \(now "):
        train(words(data, finished, *flags))
    assert snapshot(finished) == before


def test_the_second_writer_is_refused_and_changes_no_byte(data, finished):
    first = Lease(finished / "lease.json")
    first.take()
    before = snapshot(finished)
    with pytest.raises(LeaseError, match="is written by process"):
        train(words(data, finished))
    assert snapshot(finished) == before
    first.give_back()


def spoil_config(run: Path) -> None:
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"content_pooling": "mean"}))


def spoil_vocabulary(run: Path) -> None:
    file = run / "vocabulary" / "item_id.npz"
    old = Vocabulary.load(file)
    Vocabulary.build(np.append(old.ids.numpy()[:-1], 999_999)).save(file)  # of the same size


@pytest.mark.parametrize(("spoil", "named"), [
    (spoil_config, "content_pooling 'sum' .config.json: 'mean'."),
    (spoil_vocabulary, "vocabulary of item_id"),
])  # fmt: skip
@pytest.mark.parametrize("reads", ["evaluate", "evaluate a checkpoint", "bundle", "warm start"])
def test_weights_of_another_model_are_an_error_everywhere(data, finished, tmp_path, spoil, named, reads):
    spoil(finished)
    out = tmp_path / "out"
    name = sorted(path.name for path in (finished / "checkpoints").iterdir())[-1]
    act = {
        "evaluate": lambda: evaluate(["--model", str(finished), "--out", str(out)]),
        "evaluate a checkpoint": lambda: evaluate(
            ["--model", str(finished), "--out", str(out), "--checkpoint", name]
        ),
        "bundle": lambda: write_bundle(finished, out),
        "warm start": lambda: train(words(data, out, "--warm-start", str(finished))),
    }[reads]
    with pytest.raises(ModelMismatch, match=named):
        act()
    assert not (out / "metrics.json").exists() and not (out / "bundle.json").exists()


def test_damaged_best_weights_are_not_evaluated(finished, tmp_path):
    (file,) = (finished / "best").glob("*.distcp")
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match="has changed since it was written"):
        evaluate(["--model", str(finished), "--out", str(tmp_path / "out")])


def test_a_finished_run_trains_another_epoch_as_an_uninterrupted_run_does(data, finished, tmp_path):
    train(words(data, finished, "--epochs", "3"))
    train(words(data, tmp_path / "three", "--epochs", "3"))
    more, three = (read_history(run / "history.jsonl") for run in (finished, tmp_path / "three"))
    assert [entry["loss"] for entry in more.steps] == [entry["loss"] for entry in three.steps]
    assert predictions(finished).equals(predictions(tmp_path / "three"))


def predictions(run: Path) -> pa.Table:
    metrics, file = RunDirectory(run).read_results()
    assert metrics["auc"] is not None
    return pq.read_table(file)


def test_validation_with_one_class_of_labels_is_refused_before_anything_is_trained(data, tmp_path):
    one = shutil.copytree(data, tmp_path / "data")
    for file in Dataset(one).requests("validation"):
        table = pq.read_table(file)
        zeros = pa.array([[0] * len(labels) for labels in table["labels"].to_pylist()], table["labels"].type)
        table = table.set_column(table.schema.get_field_index("labels"), "labels", zeros)
        pq.write_table(table, file)
    with pytest.raises(DataError, match="all labels are 0: no AUC to choose the best epoch by"):
        train(words(one, tmp_path / "out"))
    assert not (tmp_path / "out" / "history.jsonl").exists()


class Kill(Faults):
    """Kills at a call; TensorBoard's own thread is left alone."""

    def concerns(self, path) -> bool:
        return "tensorboard" not in str(path) and super().concerns(path)


def test_a_run_that_is_killed_at_any_moment_is_resumed_and_ends_as_if_it_had_not_been(
    data, whole, tmp_path, monkeypatch
):
    command = ["--checkpoint.every", "3"]
    out = tmp_path / "counted"
    counted = Kill(out)
    with counted.injected():
        train(words(data, out, *command))
    assert predictions(out).equals(predictions(whole))
    total = len(counted.calls)
    for number in np.linspace(1, total, 7).astype(int):
        out = tmp_path / f"{number}"
        monkeypatch.setattr(holder, "_began", lambda pid, number=number: f"before the kill at {number}")
        with Kill(out, int(number), None).injected(), pytest.raises((Killed, OSError)):
            train(words(data, out, *command))
        monkeypatch.setattr(holder, "_began", lambda pid, number=number: f"after the kill at {number}")
        train(words(data, out, *command))
        assert predictions(out).equals(predictions(whole)), counted.calls[number - 1]
