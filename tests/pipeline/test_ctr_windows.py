"""Windows of new items into the table of a CTR model while it trains, through the stage's `main`."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main
from mim_torchrec.ctr.task import CTRTask
from mim_torchrec.ctr.windows import LiveWindows
from mim_torchrec.embeddings.sharded.item_index import SpareRowsExhausted
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.table.format import TableWriter, VersionMismatch
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.transport import open_log
from tests.pipeline.test_ctr_main import NUM_ITEMS, SMALL, STYLES, item_id, write_dataset
from tests.ranks import run_ranks

IDS = torch.tensor([item_id(k) for k in range(NUM_ITEMS)])
VECTORS = torch.eye(8)[torch.arange(NUM_ITEMS) % STYLES] + 0.1 * torch.randn(
    NUM_ITEMS, 8, generator=torch.Generator().manual_seed(0)
)
OLD = NUM_ITEMS // 2


def write_table(path: Path, items: int, spare_rows: int) -> None:
    writer = TableWriter(path, table_version="v1", dim=8, dtype="float16", encoder={}, spare_rows=spare_rows)
    writer.write_shard(IDS[:items], VECTORS[:items])
    writer.finish()


def append(log: WindowLog, *parts: tuple[int, int]) -> None:
    for first, last in parts:
        log.append(f"{first}-{last}", IDS[first:last], VECTORS[first:last])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, a table of all items, one of the older half, and a log with the rest."""
    root = tmp_path_factory.mktemp("windows")
    write_dataset(root / "data")
    write_table(root / "whole", NUM_ITEMS, 0)
    write_table(root / "half", OLD, OLD)
    append(open_log(root / "log", "v1", start=0), (OLD, 40), (40, 41), (41, NUM_ITEMS))
    return root


def words(folder: Path, table: str, out: Path, *more: str) -> list[str]:
    return ["--data", str(folder / "data"), "--table", str(folder / table), "--out", str(out), *SMALL, *more]


def report(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def scores(out: Path) -> torch.Tensor:
    return torch.from_numpy(pq.read_table(out / "predictions.parquet")["score"].to_numpy().copy())


def train(arguments: list[str]) -> None:
    main(arguments)


@pytest.mark.parametrize("ranks", [1, 2])
def test_windows_make_of_half_a_table_what_the_whole_one_is(folder, tmp_path, ranks):
    run_ranks(train, ranks, words(folder, "whole", tmp_path / "whole"))
    run_ranks(train, ranks, words(folder, "half", tmp_path / "half", "--windows", str(folder / "log")))
    torch.testing.assert_close(scores(tmp_path / "half"), scores(tmp_path / "whole"), rtol=1e-4, atol=1e-5)
    facts = report(tmp_path / "half")["table"]
    assert (facts["rows"], facts["seq"], facts["seq_after"]) == (OLD, 0, 3)
    assert facts["digest_after"] == facts["digest_of_windows"] != facts["digest_before"]
    assert report(tmp_path / "half")["unknown_ids"]["mm"] == 0


def test_a_window_is_applied_within_the_steps_that_were_asked_for(folder, tmp_path, monkeypatch):
    log, forward, seen = open_log(tmp_path / "log", "v1", start=0), CTRTask.training_forward, []

    def watched(task, batch):
        result = forward(task, batch)
        seen.append(task._windows.seq)
        if len(seen) == 7:
            append(log, (OLD, NUM_ITEMS))
        return result

    monkeypatch.setattr(CTRTask, "training_forward", watched)
    main(words(folder, "half", tmp_path / "run", "--windows", str(log.root), "--windows-every", "5"))
    assert seen[:10] == [0] * 10 and set(seen[10:]) == {1}
    unknown = report(tmp_path / "run")["unknown_ids"]["mm"]
    assert 0 < unknown < 0.3  # of the first steps only


class Break(Exception):
    """A run breaks off."""


def test_a_resumed_run_has_the_windows_it_had_and_continues(folder, tmp_path, monkeypatch):
    forward = CTRTask.training_forward
    more = ["--windows-every", "4", "--checkpoint.every", "3", "--checkpoint.asynchronous", "False"]

    def run(name: str, breaks: bool) -> torch.Tensor:
        log = open_log(tmp_path / f"{name}-log", "v1", start=0)
        steps = []

        def broken(task, batch):
            step = task.state.steps
            if step == 2:
                append(log, (OLD, 40))
            if step == 9:
                append(log, (40, NUM_ITEMS))
            if breaks and step == 7 and not steps:
                steps.append(step)
                raise Break
            return forward(task, batch)

        monkeypatch.setattr(CTRTask, "training_forward", broken)
        command = words(folder, "half", tmp_path / name, "--windows", str(log.root), *more)
        if breaks:
            with pytest.raises(Break):
                main(command)
            compact(folder / "half", log.root, tmp_path / "later")  # the first window is in a later base
            assert log.forget(1) == 1
            command = words(tmp_path, "later", tmp_path / name, "--windows", str(log.root), *more)
            command[1] = str(folder / "data")
        main(command)
        assert report(tmp_path / name)["table"]["seq_after"] == 2
        return scores(tmp_path / name)

    torch.testing.assert_close(run("broken", True), run("unbroken", False), rtol=0, atol=0)


def test_evaluation_applies_the_windows_of_the_run(folder, tmp_path):
    main(words(folder, "half", tmp_path / "run", "--windows", str(folder / "log")))
    evaluate(["--model", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--draws", "0"])
    torch.testing.assert_close(scores(tmp_path / "again"), scores(tmp_path / "run"))
    assert report(tmp_path / "again")["table"]["seq_after"] == 3


def test_what_changes_the_table_besides_windows_is_noticed(folder, tmp_path, monkeypatch):
    forward = CTRTask.training_forward

    def spoil(task, batch):
        _, frozen = find_frozen(task.model, "mm")
        frozen.store.write(torch.tensor([3]), torch.ones(1, 8, dtype=torch.float16))
        return forward(task, batch)

    monkeypatch.setattr(CTRTask, "training_forward", spoil)
    with pytest.raises(RuntimeError, match="changed in training"):
        main(words(folder, "half", tmp_path / "run", "--windows", str(folder / "log")))


def test_no_room_another_version_and_no_table_are_errors(folder, tmp_path):
    write_table(tmp_path / "full", OLD, 5)
    with pytest.raises(SpareRowsExhausted, match="mim table grow"):
        main(words(folder, str(tmp_path / "full"), tmp_path / "run", "--windows", str(folder / "log")))
    open_log(tmp_path / "foreign", "v9", start=0)
    with pytest.raises(VersionMismatch, match="v9"):
        main(words(folder, "half", tmp_path / "run", "--windows", str(tmp_path / "foreign")))
    with pytest.raises(ValueError, match="--mim off has not"):
        main(words(folder, "half", tmp_path / "run", "--windows", str(folder / "log"), "--mim", "off"))
    with pytest.raises(ValueError, match="at least 1"):
        main(
            words(folder, "half", tmp_path / "run", "--windows", str(folder / "log"), "--windows-every", "0")
        )


def train_with_a_log_that_fails(arguments: list[str]) -> None:
    """Rank 1 cannot read the log at first, then only its first window."""
    after, calls = WindowLog.after, []

    def failing(self, seq):
        calls.append(seq)
        if int(os.environ["RANK"]) == 1 and len(calls) == 1:
            raise ConnectionError("the disk is away")
        for window in after(self, seq):
            if int(os.environ["RANK"]) == 1 and len(calls) == 2 and window.seq == 2:
                raise ConnectionError("the disk is away again")
            yield window

    WindowLog.after = failing
    catch_up, seen = LiveWindows.catch_up, []

    def watched(self, seq=None):
        catch_up(self, seq)
        seen.append(self.seq)

    LiveWindows.catch_up = watched
    main(arguments)
    assert seen[0] == 0 and set(seen[1:]) == {3}, seen


def test_ranks_apply_only_what_all_can_read(folder, tmp_path):
    run_ranks(
        train_with_a_log_that_fails,
        2,
        words(folder, "half", tmp_path / "run", "--windows", str(folder / "log"), "--windows-every", "2"),
    )
    assert report(tmp_path / "run")["table"]["seq_after"] == 3
