"""Workers of the server: all are told to end and reload, the dead are replaced, none outlives its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mim_torchrec.errors import Status

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
from mim_torchrec import program
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.workers import Workers

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def told(number, _):
    say(signal.Signals(number).name, os.getpid())
    if number == signal.SIGTERM:
        sys.exit()

def work(ready):
    signal.signal(signal.SIGHUP, told)
    signal.signal(signal.SIGTERM, told)
    kind = sys.argv[1]
    if kind == "away" and os.path.exists(sys.argv[2]):
        raise OptionError("the store is away")
    if kind == "refuse":
        raise OptionError("there is nothing to serve")
    if kind == "abort":
        os.kill(os.getpid(), signal.SIGKILL)
    ready("at http")
    say("worker", os.getpid())
    if kind == "die":
        sys.exit(7)
    while True:
        signal.pause()

def main(_):
    program.log_to_stderr()
    Workers(2, work, "the server", lambda pid: say("dead", pid)).run(lambda line: say("all", line))
    say("ended")

program.run(main, [], "the server")
"""


@contextmanager
def workers(kind: str, *words: str) -> Iterator[subprocess.Popen]:
    """The program, with its output in lines."""
    one = subprocess.Popen([sys.executable, "-c", PROGRAM, kind, *words], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        yield one
    finally:
        one.kill()
        one.wait()
        one.stdout.close()
        one.stderr.close()


def pids_of(one: subprocess.Popen, word: str, count: int) -> set[str]:
    """Process ids of the next lines that begin with a word; others are left out."""
    found: set[str] = set()
    while len(found) < count:
        line = one.stdout.readline()
        assert line, one.stderr.read()
        said, _, pid = line.strip().partition(" ")
        found |= {pid} if said == word else set()
    return found


def begun(one: subprocess.Popen) -> set[str]:
    """Process ids of the workers, once both serve."""
    return pids_of(one, "worker", 2)


def test_signals_reach_every_worker_and_the_end_waits_for_all():
    with workers("wait") as one:
        pids = begun(one)
        for number, name in ((signal.SIGHUP, "SIGHUP"), (signal.SIGTERM, "SIGTERM")):
            one.send_signal(number)
            assert pids_of(one, name, 2) == pids
        assert one.stdout.read().endswith("ended\n") and one.wait() == 0


def test_a_dead_worker_is_replaced_and_said():
    with workers("wait") as one:
        pids = begun(one)
        victim = min(pids)
        os.kill(int(victim), signal.SIGKILL)
        assert pids_of(one, "dead", 1) == {victim}
        (born,) = pids_of(one, "worker", 1)
        assert born not in pids
        assert f"worker {victim} was ended by SIGKILL; another takes its place" in one.stderr.readline()
        one.send_signal(signal.SIGTERM)
        assert pids_of(one, "SIGTERM", 2) == (pids - {victim}) | {born}
        assert one.wait() == 0


def test_a_worker_that_cannot_begin_is_tried_again_while_another_serves(tmp_path):
    flag = tmp_path / "away"
    with workers("away", str(flag)) as one:
        pids = begun(one)
        flag.touch()
        os.kill(int(min(pids)), signal.SIGKILL)
        assert any("before it served; another is tried in 1 s" in line for line in one.stderr)
        one.send_signal(signal.SIGHUP)
        assert pids_of(one, "SIGHUP", 1) == {max(pids)}
        flag.unlink()
        assert pids_of(one, "worker", 1).isdisjoint(pids)
        flag.touch()
        one.send_signal(signal.SIGTERM)
        assert one.wait() == 0


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("refuse", Status.USAGE, "the server: there is nothing to serve\n"),
        ("abort", Status.ENVIRONMENT, "the server: a worker was ended by SIGKILL before it served"),
        (
            "die",
            Status.ENVIRONMENT,
            "the server: 5 workers have ended within 60 s; the last ended with status 7",
        ),
    ],
)
def test_workers_that_cannot_serve_end_the_service_by_name(kind, status, said):
    with workers(kind) as one:
        _, errors = one.communicate()
        assert one.returncode == status and errors.count(said) == 1, errors


def test_workers_end_when_their_parent_has_gone():
    with workers("wait") as one:
        pids = begun(one)
        one.kill()
        # the pipe ends when nobody can write to it any more
        told = {line.strip() for line in one.stdout if line.startswith("SIGTERM")}
        assert told == {f"SIGTERM {pid}" for pid in pids}
