"""Progress is a bar on a terminal only; a line of a program begins where a line does."""

import os
import pty
import subprocess
import sys
import termios
import threading

import pytest

PROGRAM = """
import logging
import sys
from mim_torchrec import program
from mim_torchrec.embeddings import progress
from mim_torchrec.errors import OptionError

progress.LOG_SECONDS = {seconds}

def main(words):
    with progress.Progress(4, "epoch 0", "step", initial=1, show={show}) as shown:
        for at in range(3):
            shown.note(loss=f"0.{{at}}")
            shown.update()
            if at == 1:
                logging.getLogger("mim_torchrec.somewhere").info("half")
                {then}

program.run(main, [], name="mim toy")
"""
OTHER_RANK = "sys.stderr.write('other bar'); raise OptionError('what, where')"


def words(then: str = "", seconds: float = 1e9, show: bool = True) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(then=then or "pass", seconds=seconds, show=show)]


def in_a_pipe(line: list[str]) -> list[str]:
    return subprocess.run(line, stderr=subprocess.PIPE, text=True, check=False).stderr.splitlines()


def on_a_terminal(line: list[str]) -> str:
    """Everything that a terminal receives."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 100))
    found: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 12):
                found.append(part)
        except OSError:  # Linux: the other side has been closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    subprocess.run(line, stderr=theirs, check=False)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return b"".join(found).decode()


def screen(received: str) -> list[str]:
    """The lines that stay: a carriage return goes to the start of the line, ESC[K deletes the rest of it."""
    lines = []
    for line in received.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part.removeprefix("\x1b[K") if part.startswith("\x1b[K") else part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_pipe_gets_one_line_at_the_end_and_no_bar():
    first, last = in_a_pipe(words())
    assert first == "INFO mim_torchrec.somewhere: half"
    assert last.startswith(
        "INFO mim_torchrec.embeddings.progress: epoch 0: 4 of 4 step in 00:00, 00:00 left, "
    )
    assert last.endswith("step/s, loss=0.2")


def test_a_pipe_gets_a_line_whenever_the_interval_has_passed():
    said = [line for line in in_a_pipe(words(seconds=0)) if "epoch 0" in line]
    assert [line.split("epoch 0: ")[1].split(" step")[0] for line in said] == [
        "2 of 4",
        "3 of 4",
        "4 of 4",
        "4 of 4",
    ]


def test_a_pipe_learns_how_far_failed_work_came():
    half, progress, error = in_a_pipe(words("raise OptionError('what, where')"))
    assert "epoch 0: 3 of 4 step" in progress and error == "mim toy: what, where"


def test_a_terminal_gets_a_bar_and_no_line_of_progress():
    received = on_a_terminal(words())
    assert "\repoch 0:  25%|" in received and "mim_torchrec.embeddings.progress" not in received
    shown = screen(received)
    assert "INFO mim_torchrec.somewhere: half" in shown  # though the bar stood there
    assert any(line.startswith("epoch 0: 100%|") and line.endswith("loss=0.2]") for line in shown)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_rank_that_shows_nothing_writes_only_its_lines(terminal):
    line = words(show=False)
    shown = screen(on_a_terminal(line)) if terminal else in_a_pipe(line)
    assert [line for line in shown if line] == ["INFO mim_torchrec.somewhere: half"]


def test_an_error_begins_a_line_where_the_bar_of_another_rank_stands():
    received = on_a_terminal(words(OTHER_RANK, show=False))
    assert "other bar" in received and screen(received)[-2:] == ["mim toy: what, where", ""]


def test_a_bug_begins_a_line_where_the_bar_of_another_rank_stands():
    received = on_a_terminal(words(OTHER_RANK.replace("OptionError", "ValueError"), show=False))
    shown = screen(received)
    assert "Traceback (most recent call last):" in shown and shown[-2] == "ValueError: what, where"
