"""Jobs on Slurm that lose a rank, a node or their time: each resumes by itself, to the same bytes.

The faults are done to jobs that run at the same time, because Slurm takes minutes to notice some of them.
Those that concern all jobs on a node have a cluster of their own. Where a process must stop or vanish, it is
Python's own: Slurm does not know the processes of the fork server, from which others come.
"""

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from mim_torchrec.benchmarks.cluster.jobs import (
    SMALL,
    Job,
    lose_node,
    preempt,
    reach_time_limit,
    submit_paused,
)
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster
from mim_torchrec.ctr.main import main as ctr
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("submission")]
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


@pytest.fixture(scope="module")
def jobs(slurm, submission, forked_on_nodes, words, tmp_path_factory) -> Iterator[dict[str, Job]]:
    """Jobs by name, each after its fault."""

    def start(name: str, where: SlurmCluster, *own: str, more: tuple[str, ...] = ()) -> Job:
        folder = tmp_path_factory.mktemp(name)
        return submit_paused(
            where, folder, folder / "ctr", [*words, *more], own=(*SMALL, "--job_name", name, *own),
            environment=None if name in ("node", "stopped") else forked_on_nodes,
        )  # fmt: skip

    def lose_rank() -> Job:
        job = start("lost", slurm)
        job.signal_rank(1, signal.SIGKILL)
        return job

    def lose_time() -> Job:
        job = start("late", slurm)
        reach_time_limit(job)
        return job

    def lose_resources() -> Job:
        job = start("preempted", others["preempted"])
        preempt(job)
        return job

    def stop_rank() -> Job:
        job = start("stopped", others["stopped"], "--max_retries", "0", more=("--timeout.step", "30"))
        job.signal_rank(1, signal.SIGSTOP)
        return job

    with ExitStack() as clusters, ThreadPoolExecutor() as pool:
        others = {
            name: clusters.enter_context(SlurmCluster(tmp_path_factory.mktemp("slurm")))
            for name in ("node", "preempted", "stopped")
        }
        without_node = start("node", others["node"])
        running = [pool.submit(fault) for fault in (lose_rank, lose_time, lose_resources, stop_rank)]
        lose_node(without_node)  # in this thread, because the node that comes back ends with its thread
        lost, late, preempted, stopped = (job.result() for job in running)
        yield {
            "lost": lost, "late": late, "preempted": preempted, "stopped": stopped, "node": without_node,
        }  # fmt: skip


def has_resumed(job: Job, uninterrupted: bytes) -> None:
    assert job.end() == "COMPLETED", job.log()
    assert job.field("Restarts") == "1"
    assert "resumed from" in job.log(0)
    assert (job.folder / "ctr" / "predictions.parquet").read_bytes() == uninterrupted


def test_a_job_that_loses_a_rank(jobs, uninterrupted):
    has_resumed(jobs["lost"], uninterrupted)
    assert "attempt 0 failed" in jobs["lost"].log()


def test_a_job_that_loses_its_time_on_the_same_nodes(jobs, uninterrupted):
    has_resumed(jobs["late"], uninterrupted)
    assert "attempt 0 was interrupted" in jobs["late"].log()
    assert jobs["lost"].field("NodeList") == jobs["late"].field("NodeList") == "node[1-2]"


def test_a_preempted_job(jobs, uninterrupted):
    has_resumed(jobs["preempted"], uninterrupted)
    assert "attempt 0 was interrupted" in jobs["preempted"].log()


def test_a_stopped_rank_is_named_within_the_timeout(jobs):
    assert jobs["stopped"].end() == "FAILED"
    assert re.search(
        "timed out waiting for rank 1 on host node2, .*which does not report any more", jobs["stopped"].log(0)
    )


def test_a_job_that_loses_a_node(jobs, uninterrupted):
    has_resumed(jobs["node"], uninterrupted)
