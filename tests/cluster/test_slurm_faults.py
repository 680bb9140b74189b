"""Jobs on Slurm that lose a rank, a node or their time: each resumes by itself, to the same bytes."""

import re
import signal
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.cluster.jobs import (
    SMALL,
    Job,
    lose_node,
    preempt,
    reach_time_limit,
    submit_paused,
)
from mim_torchrec.ctr.main import main as ctr
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
FLAGS = [
    "--mim",
    "off",
    "--epochs",
    "2",
    "--batch-size",
    "256",
    "--dropout",
    "0.2",
    "--checkpoint.every",
    "1",
]


@pytest.fixture(scope="module")
def words(shop) -> list[str]:
    return ["--data", str(shop), *FLAGS]


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory) -> bytes:
    """The predictions of the same run on two ranks of one node, to which nothing happens."""
    out = tmp_path_factory.mktemp("uninterrupted") / "ctr"
    run_ranks(ctr, 2, [*words, "--out", str(out)])
    return (out / "predictions.parquet").read_bytes()


def has_resumed(job: Job, out: Path, uninterrupted: bytes) -> None:
    assert job.end() == "COMPLETED", job.log()
    assert job.field("Restarts") == "1"
    assert "resumed from" in job.log(0)
    assert (out / "predictions.parquet").read_bytes() == uninterrupted


def test_two_jobs_on_the_same_nodes_lose_a_rank_and_their_time(slurm, words, uninterrupted, tmp_path):
    lost, late = (
        submit_paused(slurm, tmp_path, tmp_path / name, words, own=(*SMALL, "--job_name", name))
        for name in ("lost", "late")
    )
    assert lost.field("NodeList") == late.field("NodeList") == "node[1-2]"
    lost.signal_rank(1, signal.SIGKILL)
    reach_time_limit(late)
    has_resumed(lost, tmp_path / "lost", uninterrupted)
    has_resumed(late, tmp_path / "late", uninterrupted)
    assert "attempt 0 was interrupted" in late.log() and "attempt 0 failed" in lost.log()


def test_a_preempted_job(slurm, words, uninterrupted, tmp_path):
    job = submit_paused(slurm, tmp_path, tmp_path / "ctr", words)
    preempt(job)
    has_resumed(job, tmp_path / "ctr", uninterrupted)
    assert "attempt 0 was interrupted" in job.log()


def test_a_job_that_loses_a_node(slurm, words, uninterrupted, tmp_path):
    job = submit_paused(slurm, tmp_path, tmp_path / "ctr", words)
    lose_node(job)
    has_resumed(job, tmp_path / "ctr", uninterrupted)


def test_a_stopped_rank_is_named_within_the_timeout(slurm, words, tmp_path):
    job = submit_paused(
        slurm,
        tmp_path,
        tmp_path / "ctr",
        [*words, "--timeout.step", "10"],
        own=(*SMALL, "--max_retries", "0"),
    )
    job.signal_rank(1, signal.SIGSTOP)
    assert job.end() == "FAILED"
    assert re.search(
        "timed out waiting for rank 1 on host node2, .*which does not report any more", job.log(0)
    )
