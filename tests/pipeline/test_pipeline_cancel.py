"""Ending a run ends its jobs, on every way out; what a killed run left is found and cancelled."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from mim_torchrec.pipeline import local_processes
from mim_torchrec.pipeline.main import main
from mim_torchrec.pipeline.records import RecordError
from tests.pipeline_steps import Steps, command, tagged

SIDE_BY_SIDE = """
[stages.a]
step = true
flags = {{ child = 1, ready = "{a}" }}
[stages.b]
step = true
flags = {{ child = 1, ready = "{b}" }}
[stages.c]
step = true
after = ["a", "b"]
"""


@pytest.fixture
def steps(tmp_path):
    return Steps(tmp_path)


class Running:
    """A pipeline in a process of its own, two of its stages side by side, each with a process of its own."""

    def __init__(self, steps: Steps, handled: str = "--default-signal=HUP,INT") -> None:
        self.tag = uuid.uuid4().hex
        fifos = {name: steps.folder / f"{name}.fifo" for name in "ab"}
        for fifo in fifos.values():
            fifo.unlink(missing_ok=True)
            os.mkfifo(fifo)
        words = steps.write(SIDE_BY_SIDE.format(**fifos))
        self.process = subprocess.Popen(
            ["env", handled, *command(*words, "--jobs", "2")], env={**os.environ, "TAG": self.tag}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert [fifo.read_text() for fifo in fifos.values()] == ["ready", "ready"]

    def left(self) -> list[int]:
        """Processes of the run."""
        return tagged(self.tag)


@pytest.fixture
def running(steps):
    found = Running(steps)
    yield found
    for pid in found.left():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)]
)
def test_a_signal_to_a_run_ends_all_its_processes(steps, running, number, status):
    assert len(running.left()) >= 5
    running.process.send_signal(number)
    said, _ = running.process.communicate()
    assert running.process.returncode == status, said
    assert running.left() == []
    assert steps.states() == {"a": "cancelled", "b": "cancelled", "c": "waiting"}
    assert [steps.record(name)["state"] for name in "ab"] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(steps, number):
    running = Running(steps, f"--ignore-signal={number}")  # as nohup and `&` of a script do
    running.process.send_signal(number)
    running.process.send_signal(signal.SIGTERM)
    said, _ = running.process.communicate()
    assert "interrupted by SIGTERM" in said and running.left() == []


def test_cancel_ends_a_run_from_another_process(steps, running, capsys):
    main(["cancel", str(steps.out)])
    said, _ = running.process.communicate()
    assert running.process.returncode == 143 and "mim pipeline cancel" in said
    assert running.left() == []
    assert "no job runs" in capsys.readouterr().out


def test_cancel_finds_what_a_killed_run_has_left(steps, running, capsys):
    running.process.kill()
    running.process.communicate()
    assert len(running.left()) >= 4
    main(["status", str(steps.out)])
    assert capsys.readouterr().out.count("running") == 2
    main(["cancel", str(steps.out)])
    assert running.left() == []
    assert "cancelled a, b" in capsys.readouterr().out
    main(["cancel", str(steps.out)])
    assert "no job runs" in capsys.readouterr().out


def test_the_next_run_cancels_what_a_killed_one_has_left_and_runs_it_again(steps, running, capsys):
    running.process.kill()
    running.process.communicate()
    main(steps.write("[stages.a]\nstep = true\n[stages.b]\nstep = true\n"))
    assert running.left() == []
    assert "cancelled 2 jobs that an earlier run had left" in capsys.readouterr().out
    assert steps.states() == {"a": "done", "b": "done"}


def test_a_second_run_in_the_same_directory_is_refused(steps, running):
    with pytest.raises(ValueError, match="is written by process"):
        main(steps.write("[stages.a]\nstep = true\n"))
    assert len(running.left()) >= 5
    running.process.terminate()
    running.process.communicate()


def test_an_exception_ends_the_jobs(steps, monkeypatch):
    tag = uuid.uuid4().hex
    monkeypatch.setenv("TAG", tag)
    text = f"""
    [stages.a]
    step = true
    flags.until = "/dev/null"
    [stages.b]
    step = true
    files = ["{steps.folder}/no"]
    """
    with pytest.raises(FileNotFoundError, match=r"stages.b.files: .*/no does not exist"):
        main([*steps.write(text), "--jobs", "2"])
    assert tagged(tag) == []


def test_a_process_that_ignores_sigterm_is_killed():
    mark = uuid.uuid4().hex
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, local_processes.MARK: mark},
                               stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    local_processes.end([mark], grace=0.2)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_processes_of_other_jobs_stay():
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                               env={**os.environ, local_processes.MARK: "another"})  # fmt: skip
    local_processes.end([uuid.uuid4().hex])
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_directory_without_a_pipeline_is_refused(tmp_path: Path):
    for what in ("status", "cancel"):
        with pytest.raises(RecordError, match="is no directory of a pipeline"):
            main([what, str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
