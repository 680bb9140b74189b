"""An interrupted and resumed C-SFT run is bit-identical to an uninterrupted one."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mim_torchrec.csft.main import main
from mim_torchrec.csft.task import CSFTTask
from mim_torchrec.training.checkpoints import ResumeError
from mim_torchrec.training.history import read_history
from tests.programs import TINY_TOWERS, small_shop, words

pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parents[2]
FLAGS = TINY_TOWERS | {
    "freeze-towers": "False",
    "epochs": "3", "batch-size": "64", "queue-batches": "2", "checkpoint.every": "2", "log-every": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return small_shop(tmp_path_factory.mktemp("resume"), searches=400)


def command(data: Path, out: Path, **changes: str) -> list[str]:
    return words(data, out, FLAGS, **changes)


class Job(subprocess.Popen):
    """A program whose output goes into a file, and line by line into a queue, at whose end is None."""

    def __init__(self, line: list[str], log: Path, **options: Any) -> None:
        super().__init__(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        self.log, self.lines = log, queue.SimpleQueue()
        self._copies = threading.Thread(target=self._copy, daemon=True)
        self._copies.start()

    def _copy(self) -> None:
        with self.log.open("w") as file, self.stdout:
            for line in self.stdout:
                file.write(line)
                file.flush()
                self.lines.put(line)
        self.lines.put(None)

    def end(self) -> int:
        """Wait for the exit status, and for the last line of the output."""
        status = self.wait()
        self._copies.join()
        return status


@pytest.fixture(scope="module")
def launch(forked) -> Callable[..., Job]:
    """Starts the stage under torchrun on two ranks, in a process group of its own."""

    def launch(data: Path, out: Path, program: str = "mim_torchrec.csft.main", restarts: int = 0) -> Job:
        line = [
            "torchrun", "--nproc_per_node", "2", "--max_restarts", str(restarts),
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
            "--monitor_interval", "0.1", "-m", program, *command(data, out),
        ]  # fmt: skip
        environment = {**os.environ, **forked, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return Job(line, out.with_suffix(".log"), env=environment, cwd=ROOT, start_new_session=True)

    return launch


def finish(process: Job, out: Path) -> None:
    status = process.end()
    assert status == 0, out.with_suffix(".log").read_text()[-4000:]


def result(out: Path) -> tuple[list[float], str]:
    """All losses, and the version of the encoder, which is a hash of its weights."""
    history = asdict(read_history(out / "history.jsonl"))
    metrics = json.loads((out / "metrics.json").read_text())
    return [entry["loss"] for entry in history["steps"]], metrics["encoder_version"]


def wait_for_pause(process: Job) -> int:
    """Until a rank waits for a signal; its process."""
    while (line := process.lines.get()) is not None:
        if found := re.search(r"process (\d+) waits for a signal", line):
            return int(found[1])
    raise AssertionError(process.log.read_text()[-4000:])


@pytest.fixture(scope="module")
def uninterrupted(shop, launch, tmp_path_factory) -> tuple[list[float], str]:
    """What two ranks give to which nothing happens."""
    out = tmp_path_factory.mktemp("uninterrupted") / "csft"
    finish(launch(shop, out), out)
    return result(out)


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory) -> Path:
    """A run of one process to which nothing has happened."""
    out = tmp_path_factory.mktemp("finished") / "csft"
    main(command(shop, out))
    return out


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of it, to be started again."""
    return shutil.copytree(finished, tmp_path / "csft")


def test_a_rank_that_is_killed_costs_nothing(shop, launch, uninterrupted, tmp_path):
    out = tmp_path / "csft"
    process = launch(shop, out, "tests.paused_csft", restarts=1)
    os.kill(wait_for_pause(process), signal.SIGKILL)
    finish(process, out)
    assert "resumed from" in out.with_suffix(".log").read_text()
    assert result(out) == uninterrupted


def test_sigterm_saves_and_the_same_command_resumes(shop, launch, uninterrupted, tmp_path):
    out = tmp_path / "csft"
    process = launch(shop, out, "tests.paused_csft")
    wait_for_pause(process)
    process.send_signal(signal.SIGTERM)
    assert process.end() != 0
    log = out.with_suffix(".log").read_text()
    assert "interrupted by a signal" in log, log[-4000:]
    assert not (out / "metrics.json").exists()
    finish(launch(shop, out), out)
    assert result(out) == uninterrupted


def interrupt(monkeypatch, at: int) -> None:
    """Let the process be told to stop in a step, as by SIGTERM."""
    forward, steps = CSFTTask.training_forward, []

    def told(self, batch):
        steps.append(batch)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(CSFTTask, "training_forward", told)


@pytest.mark.parametrize("at", [1, 5, 7])
def test_one_process_resumes_in_the_middle_of_an_epoch(shop, finished, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        interrupt(patched, at)
        main(command(shop, tmp_path / "broken"))
    assert stopped.value.code == 143
    main(command(shop, tmp_path / "broken"))
    assert result(tmp_path / "broken") == result(finished)


def test_a_finished_run_that_is_started_again_gives_the_same(shop, finished, again, monkeypatch):
    monkeypatch.setattr(CSFTTask, "training_forward", None)  # nothing is trained
    main(command(shop, again))
    assert result(again) == result(finished)


def test_another_configuration_in_the_same_place_is_refused(shop, again):
    with pytest.raises(ResumeError, match=r"epochs 3 \(now 1\).*--checkpoint.resume never"):
        main(command(shop, again, epochs="1"))
    main(command(shop, again, epochs="1", checkpoint__resume="never"))
    assert len(asdict(read_history(again / "history.jsonl"))["epochs"]) == 1


def test_another_number_of_ranks_is_refused(shop, launch, again):
    process = launch(shop, again)
    assert process.end() != 0
    assert "is of 1 ranks, this run has 2" in again.with_suffix(".log").read_text()
