"""Ranks that stop, or never start: the others end within the timeout and name them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import Store, TCPStore

from mim_torchrec.benchmarks.harness.redis_server import free_port
from mim_torchrec.errors import SetupError, Status
from mim_torchrec.training import liveness, network
from mim_torchrec.training.liveness import Liveness
from mim_torchrec.training.network import check_interface
from tests.programs import small_shop
from tests.said import said

pytestmark = pytest.mark.slow


@contextmanager
def rank(
    number: int, port: int, data: Path, out: Path, *flags: str, python: str = sys.executable
) -> Iterator[subprocess.Popen[str]]:
    """One of two ranks of the CTR stage, without a launcher that would end one with the other."""
    environment = {
        **os.environ, "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    line = [
        python,
        "-m",
        "mim_torchrec.ctr.main",
        "--data",
        str(data),
        "--out",
        str(out),
        "--mim",
        "off",
    ]
    with subprocess.Popen(
        [*line, *flags], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_stopped_rank_is_named_within_the_timeout(tmp_path: Path, forked):
    port, data = free_port(), small_shop(tmp_path)
    endless = ["--epochs", "100000", "--batch-size", "16", "--log-every", "1", "--timeout.step", "20"]
    with (
        rank(0, port, data, tmp_path / "run", *endless, python=forked["MIM_PYTHON"]) as first,
        rank(1, port, data, tmp_path / "run", *endless) as second,  # its own process is what stops
    ):
        _until(lambda: (tmp_path / "run" / "history.jsonl").exists(), first)
        second.send_signal(signal.SIGSTOP)
        _, said = first.communicate()
    assert first.returncode == Status.ENVIRONMENT, said[-3000:]
    last = said.splitlines()[-1]
    assert last.startswith("mim_torchrec.ctr.main: rank 0: ")
    assert f"timed out waiting for rank 1 on host {socket.gethostname()}, last seen at " in last
    assert "step" in last and "does not report any more" in last


def test_a_rank_that_never_starts_is_named_within_the_timeout(tmp_path: Path, forked):
    data, python = small_shop(tmp_path), forked["MIM_PYTHON"]
    with rank(0, free_port(), data, tmp_path / "run", "--timeout.init", "2", python=python) as alone:
        _, said = alone.communicate()
    assert alone.returncode == Status.ENVIRONMENT, said[-3000:]
    assert "ranks [1] of 2 have not started within 2 s (--timeout.init)" in said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pair(monkeypatch) -> Iterator[Callable[..., Liveness]]:
    """Makes one of two ranks, both in this process.

    Who waits for silence waits until every other rank that has not ended has reported again, however long a
    slow machine takes for that.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: list[Liveness] = []

    def until_reported(seconds: float) -> None:
        assert seconds == liveness.SILENCE
        others = [
            each for each in made
            if not each._ended.is_set() and each._thread is not threading.current_thread()
        ]  # fmt: skip
        before = [_reported(store, each._rank) for each in others]
        for each, (count, *_) in zip(others, before, strict=True):
            while _reported(store, each._rank)[0] < count + 2:  # the next one may have begun before
                each._thread.join(timeout=0.01)

    def make(number: int, **words: Any) -> Liveness:
        made.append(Liveness(store, number, 2, **words))
        return made[-1]

    monkeypatch.setattr(liveness, "INTERVAL", 0.01)
    monkeypatch.setattr(liveness, "time", SimpleNamespace(sleep=until_reported, monotonic=time.monotonic))
    yield make
    for each in made:
        each.close()


def test_who_is_waited_for(pair):
    first, second = pair(0), pair(1)
    first.at("step 1")
    assert "rank 1 on host" in first.waits_for() and "last seen at the start" in first.waits_for()
    second.at("step 1")
    assert first.waits_for() == second.waits_for() == ""  # both compute
    second.close()
    assert first.waits_for().endswith("last seen at step 1, which does not report any more")
    error = first.stalled(RuntimeError("Timed out waiting 5000ms"))
    assert str(error).startswith("step 1: timed out waiting for rank 1 on host ")


def test_a_long_wait_is_logged(pair, caplog):
    first, second = pair(0, patience=0.2), pair(1)
    second.at("step 1")
    first.at("step 1")
    first.at("step 2")
    while not said(caplog, "training.liveness"):
        first._thread.join(timeout=0.01)  # it goes on for as long as the rank does
    line = said(caplog, "training.liveness")[0]
    assert line.startswith("step 2: waiting for rank 1 on host") and "last seen at step 1" in line


def test_reports_are_one_short_value_a_rank(pair):
    first = pair(0)
    first.at("epoch 3, step 7")
    first.waits_for()
    count, host, places, place = _reported(first._store.clone(), 0)
    assert (host, places, place) == (socket.gethostname(), 1, "epoch 3, step 7") and count > 1


def test_a_host_whose_name_is_loopback_is_refused_before_the_group_forms(monkeypatch):
    monkeypatch.setattr(network.socket, "gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        SetupError, match="resolves to 127.0.1.1 .* set GLOO_SOCKET_IFNAME .* to the interface"
    ):
        check_interface()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # one machine
    check_interface()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_interface()


def _reported(store: Store, rank: int) -> list[Any]:
    """The last report of a rank."""
    return json.loads(store.get(f"liveness/{rank}"))


def _until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a state that the process brings about."""
    while not reached():
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(process.communicate()[1][-3000:])
