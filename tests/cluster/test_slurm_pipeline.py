"""`mim pipeline` on Slurm: jobs that wait for jobs, and jobs that outlive the process of their run."""

import os
import subprocess

import pytest

from mim_torchrec.pipeline.execution import StageError
from mim_torchrec.pipeline.main import main
from tests.pipeline_steps import Steps, command

pytestmark = pytest.mark.slow
CHAIN = """
[stages.a]
step = true
[stages.b]
step = true
flags.reads = "${a}/words"
[stages.c]
step = true
flags.auc = "${b/metrics.json#auc}"
"""
HELD = """
[stages.a]
step = true
flags = {{ started = "{fifo}", until = "{go}" }}
[stages.b]
step = true
after = ["a"]
"""


@pytest.fixture
def steps(slurm, tmp_path, monkeypatch):
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return Steps(tmp_path)


def state(slurm, steps: Steps, stage: str) -> str:
    """What Slurm says of the job of a stage."""
    number = steps.record(stage)["handle"].rpartition("/")[2]
    said: str = slurm.call("squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={number}")
    return said.strip()


def test_a_stage_is_submitted_behind_the_job_that_it_reads(slurm, steps, capsys):
    main([*steps.write(CHAIN), "--scheduler", "slurm"])
    printed = capsys.readouterr().out
    order = [
        printed.index(line) for line in ("b: submitted", "a: done", "b: done", "c: submitted", "c: done")
    ]
    assert order == sorted(order)
    assert (steps.out / "c" / "words").read_text() == "--auc 0.75"
    assert steps.states() == {"a": "done", "b": "done", "c": "done"}
    main([*steps.write(CHAIN), "--scheduler", "slurm"])
    assert set(steps.states().values()) == {"kept"}


def test_what_waits_for_a_failed_job_is_cancelled(slurm, steps, capsys):
    text = CHAIN.replace("[stages.b]", "flags = { fail = 3, say = 'poster 7 is torn' }\n[stages.b]")
    with pytest.raises(StageError, match="stage a failed as FAILED"):
        main([*steps.write(text), "--scheduler", "slurm"])
    assert "poster 7 is torn" in capsys.readouterr().err
    assert steps.states() == {"a": "failed", "b": "blocked", "c": "blocked"}
    assert state(slurm, steps, "b") == "CANCELLED"


@pytest.fixture
def killed(slurm, steps):
    """A run that was killed while its first job ran; the job ends when the file `go` says so."""
    fifo, go = steps.folder / "fifo", steps.folder / "go"
    os.mkfifo(fifo)
    go.write_text("")
    words = [*steps.write(HELD.format(fifo=fifo, go=go)), "--scheduler", "slurm"]
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, text=True)
    assert fifo.read_text() == "started"
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("b: submitted"):
            break
    process.kill()
    process.communicate()
    return words


def test_the_next_run_waits_for_the_jobs_of_a_killed_one(slurm, steps, killed, capsys):
    number = steps.record("a")["handle"]
    (steps.folder / "go").write_text('"failed"')
    main(killed)
    printed = capsys.readouterr().out
    assert f"a: still there, {number}" in printed and "b: still there" in printed
    assert steps.states() == {"a": "done", "b": "done"}
    assert (steps.times_run("a"), steps.times_run("b")) == (1, 1)


def test_cancel_finds_the_jobs_of_a_killed_run(slurm, steps, killed, capsys):
    main(["status", str(steps.out)])
    assert "running" in capsys.readouterr().out
    main(["cancel", str(steps.out)])
    assert "cancelled a, b" in capsys.readouterr().out
    assert {state(slurm, steps, "a"), state(slurm, steps, "b")} <= {"CANCELLED", "COMPLETING"}
