"""How `mim ctr` reads: ahead or not, in buffers of any size, and no more of the items than it reports by."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mim_torchrec.ctr import task as task_module
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train
from mim_torchrec.data import items as item_module
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.training.history import read_history
from tests.pipeline.test_ctr_main import SMALL, write_dataset
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("input") / "data"
    write_dataset(root)
    return root


def run(data: Path, out: Path, *flags: str) -> Path:
    train(["--data", str(data), "--out", str(out), "--mim", "off", *SMALL, *flags])
    return out


@pytest.fixture(scope="module")
def ahead(data) -> Path:
    return run(data, data.parent / "ahead")


def losses(out: Path) -> list[float]:
    return [step["loss"] for step in read_history(out / "history.jsonl").steps]


def test_reading_ahead_changes_nothing(data, ahead, tmp_path):
    here = run(data, tmp_path / "here", "--prefetch", "0", "--id-dropout", "0.0")
    assert losses(here) == losses(ahead)
    assert (here / "predictions.parquet").read_bytes() == (ahead / "predictions.parquet").read_bytes()


def test_the_next_epoch_is_read_during_the_evaluation(data, tmp_path, monkeypatch):
    begun, evaluated = [], []
    read, predict = RequestReader.batches, task_module.predict

    def batches(reader, *place, **options):
        begun.append(len(evaluated))
        return read(reader, *place, **options)

    def predicted(*words):
        evaluated.append(len(begun))
        return predict(*words)

    monkeypatch.setattr(RequestReader, "batches", batches)
    monkeypatch.setattr(task_module, "predict", predicted)
    run(data, tmp_path / "run", "--epochs", "2")
    # an epoch, the next one before the evaluation of the first, that evaluation, the last one, the test part
    assert begun == [0, 0, 1, 2, 2] and evaluated == [2, 3]


def test_a_buffer_of_other_size_gives_another_order(data, ahead, tmp_path):
    small = run(data, tmp_path / "small", "--buffer-rows", "10")
    assert len(losses(small)) == len(losses(ahead)) and losses(small) != losses(ahead)


def test_a_size_per_rank_is_that_of_all_ranks_divided(data, tmp_path):
    outs = {"together": ["--batch-size", "64"], "each": ["--batch-size-per-rank", "32"]}
    for name, size in outs.items():
        flags = ["--data", str(data), "--out", str(tmp_path / name), "--mim", "off", *SMALL, *size]
        run_ranks(train, 2, flags)
    assert losses(tmp_path / "each") == losses(tmp_path / "together")
    alone = run(data, tmp_path / "alone", "--batch-size-per-rank", "32")
    assert len(losses(alone)) > 1.5 * len(losses(tmp_path / "each"))


@pytest.mark.parametrize("flags", [["--buffer-rows", "0"], ["--prefetch", "-1"], ["--min-count", "0"]])
def test_impossible_sizes_are_refused_before_anything_is_read(tmp_path, flags):
    with pytest.raises(ValueError, match=f"{flags[0]} is {flags[1]}; it must be at least"):
        run(tmp_path / "nothing", tmp_path / "out", *flags)


def test_neither_titles_nor_images_of_items_are_read_or_copied(data, tmp_path, monkeypatch):
    read, plain = [], item_module.read_row_group

    def read_row_group(parquet, row_group, columns, file):
        read.append(tuple(columns))
        return plain(parquet, row_group, columns, file)

    monkeypatch.setattr(item_module, "read_row_group", read_row_group)
    out = run(data, tmp_path / "run", "--epochs", "1")
    evaluate(["--model", str(out), "--out", str(tmp_path / "evaluation"), "--draws", "0"])
    assert set(read) == {("item_id", "category", "listed_at")}
    image = pq.read_table(data / "items")["image"][0].as_py()
    for file in tmp_path.rglob("*"):
        assert file.name != "items.arrow"
        assert not file.is_file() or image not in file.read_bytes()


def test_rare_ids_share_the_row_of_unknown_ones(data, ahead, tmp_path):
    out = run(data, tmp_path / "run", "--min-count", "30")
    rare, every = (json.loads((one / "metrics.json").read_text()) for one in (out, ahead))
    assert rare["unknown_ids"]["item_id"] > every["unknown_ids"]["item_id"] == 0
    assert rare["auc"] is not None


def test_a_run_says_what_its_start_took(ahead):
    found = json.loads((ahead / "metrics.json").read_text())
    assert 0 < found["startup_seconds"] < found["seconds"]


def test_nothing_but_results_is_left(ahead):
    names = {path.name for path in ahead.iterdir()}
    assert names == {"config.json", "vocabulary", "ids", "best", "checkpoints", "history.jsonl",
                     "metrics.json", "predictions.parquet", "tensorboard"}  # fmt: skip
