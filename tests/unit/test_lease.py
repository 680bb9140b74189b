"""One process writes into a directory: a second is refused by the name of the first, a dead one replaced."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.training.lease import Lease, leased

HOLD = """
import sys
from pathlib import Path
from mim_torchrec.training.lease import Lease
Lease(Path(sys.argv[1])).take()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lease of `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / "lease.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_writer_is_refused_by_the_name_of_the_first(tmp_path, other):
    expected = f"is written by process {other.pid} on {socket.gethostname()}, since .*choose another --out"
    with pytest.raises(LeaseError, match=expected):
        Lease(tmp_path / "run" / "lease.json").take()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lease.json"]


def test_a_killed_process_is_replaced_at_once(tmp_path, other):
    other.kill()
    other.wait()
    with leased(tmp_path / "run" / "lease.json") as lease:
        lease.check()
    assert list((tmp_path / "run").iterdir()) == []


def of_another_machine(file: Path, silence: float, **facts) -> None:
    """A lease as another machine would have left it, so many seconds ago."""
    lease = Lease(file)
    lease.take()
    held = json.loads(file.read_text())
    lease.give_back()
    file.write_text(json.dumps(held | {"host": "elsewhere", "machine": "m", "token": "t"} | facts))
    changed = file.stat().st_mtime - silence
    os.utime(file, (changed, changed))


def test_another_machine_is_believed_until_its_signs_of_life_stop(tmp_path):
    file = tmp_path / "lease.json"
    of_another_machine(file, silence=60)
    with pytest.raises(LeaseError, match="on elsewhere, .* last sign of life was 6[0-9] s ago"):
        Lease(file).take()
    of_another_machine(file.with_name("old.json"), silence=121)
    with leased(file.with_name("old.json")) as lease:
        lease.check()


def test_a_job_that_starts_again_elsewhere_waits_for_its_own_lease_to_expire(tmp_path, monkeypatch):
    file = tmp_path / "lease.json"
    of_another_machine(file, silence=119.9, job="job-7")
    monkeypatch.setenv("TORCHX_JOB_ID", "job-7")
    with leased(file) as lease:
        lease.check()


def test_a_process_whose_lease_was_taken_over_writes_no_more(tmp_path):
    file = tmp_path / "lease.json"
    first = Lease(file)
    first.take()
    second = Lease(file, expiry=0.0)
    second.take()
    with pytest.raises(LeaseError, match="no longer that of this process.*Nothing more is written"):
        first.check()
    first.give_back()
    second.check()  # the first has not ended the second's
    second.give_back()


def test_a_process_that_wakes_up_gives_no_sign_of_life_for_its_successor(tmp_path):
    file = tmp_path / "lease.json"
    first, second = Lease(file, heartbeat=0.01), Lease(file, heartbeat=3600, expiry=-3600)
    first.take()
    second.take()
    os.utime(file, (0, 0))
    while first._thread.is_alive() and file.stat().st_mtime == 0:
        os.sched_yield()
    assert file.stat().st_mtime == 0
    second.give_back()
    with pytest.raises(LeaseError, match=f"was replaced by process {os.getpid()} on"):
        first.check()
    first.give_back()


def test_signs_of_life_are_given(tmp_path):
    file = tmp_path / "lease.json"
    lease = Lease(file, heartbeat=0.01)
    lease.take()
    os.utime(file, (0, 0))
    while file.stat().st_mtime == 0:
        os.sched_yield()
    lease.give_back()
    assert not file.exists()
