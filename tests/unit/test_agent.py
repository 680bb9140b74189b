"""The launcher of ranks ends with what they ended with, and leaves no folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
rank, how = int(os.environ["RANK"]), sys.argv[1]
if how == "wait":
    print(f"waiting", flush=True)
    signal.pause()
if how == "late" and rank == 0:
    raise SystemExit(143)
if rank == 1:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(int(how) if how != "late" else 143)
if how == "killed":
    signal.pause()
"""


def launch(tmp_path: Path, how: str, python: str = sys.executable) -> "subprocess.Popen[str]":
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tmp").mkdir()
    words = ["--nproc_per_node", "2", "--tee", "3", str(tmp_path / "program.py"), how]
    return subprocess.Popen(
        [python, "-m", "mim_torchrec.training.agent", *words],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("how", "status"), [("0", 0), ("2", 2), ("6", 6), ("killed", 137), ("late", 143)])
def test_it_ends_with_the_status_of_the_rank_that_failed(forked, tmp_path, how, status):
    process = launch(tmp_path, how, forked["MIM_PYTHON"])
    said, _ = process.communicate()
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_signal_to_it_is_an_interruption(tmp_path):
    process = launch(tmp_path, "wait")
    assert process.stdout is not None
    assert sum("waiting" in process.stdout.readline() for _ in range(2)) == 2
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    assert list((tmp_path / "tmp").iterdir()) == []
