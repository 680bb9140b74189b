"""The page about Slurm as a user follows it: stages on two real nodes, beside two ranks of this machine."""

import re
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.cluster.jobs import SMALL, Job, submit, torchx
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster
from mim_torchrec.csft.main import main as csft
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as ctr
from mim_torchrec.representation.export import main as export
from tests.doc_pages import run_page
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("submission")]
NAMES = [
    "agents.sbatch",
    "mim-csft",
    "mim-ctr-base",
    "mim-ctr-mim",
    "mim-evaluate-report",
    "mim-export-table",
    "ranks.sbatch",
]


def found(slurm: SlurmCluster, folder: Path) -> dict[str, Job]:
    """The jobs that were submitted from a folder, by name."""
    lines = slurm.call("squeue", "--states=all", "--noheader", "--format=%A|%j|%Z").splitlines()
    parts = [line.split("|") for line in lines]
    return {name: Job(number, folder, slurm) for number, name, where in parts if where == str(folder)}


@pytest.fixture(scope="module")
def two(slurm, forked, forked_on_nodes, tmp_path_factory) -> tuple[Path, str]:
    """What the page leaves in a folder, by one rank on each of two nodes, and what it prints."""
    folder = tmp_path_factory.mktemp("two")
    environment = {"PATH": forked["PATH"], **forked_on_nodes, **slurm.environment}
    return folder, run_page("cluster_slurm.md", folder, environment)


@pytest.fixture(scope="module")
def one(two, tmp_path_factory) -> Path:
    """The same by two ranks of one node."""
    root = tmp_path_factory.mktemp("one")
    data = ["--data", str(two[0] / "data" / "shop")]
    small, table = ["--epochs", "1", "--batch-size", "64"], ["--table", f"{root}/table"]
    first = ["--epochs", "1", "--batch-size", "16", "--vision.image-size", "32"]
    run_ranks(csft, 2, [*data, "--out", f"{root}/csft", *first])
    run_ranks(export, 2, [*data, "--encoder", f"{root}/csft/encoder", "--out", f"{root}/table"])
    run_ranks(ctr, 2, [*data, "--out", f"{root}/base", "--mim", "off", *small])
    run_ranks(ctr, 2, [*data, *table, "--out", f"{root}/mim", *small])
    run_ranks(evaluate, 2, ["--model", f"{root}/base", "--out", f"{root}/report", "--split", "validation"])
    return root


def test_two_nodes_equal_one(one, two):
    runs = two[0] / "runs"
    tables = [sorted((root / "table").glob("*.safetensors")) for root in (one, runs)]
    assert [file.name for file in tables[0]] == [file.name for file in tables[1]] != []
    pairs = list(zip(*tables, strict=True))
    pairs += [
        (one / of_one / "predictions.parquet", runs / of_two / "predictions.parquet")
        for of_one, of_two in zip(("base", "mim", "report", "base", "base"),
                                  ("base", "mim", "report", "agents", "ranks"), strict=True)
    ]  # fmt: skip
    assert [b for a, b in pairs if a.read_bytes() != b.read_bytes()] == []


def test_every_job_is_named_after_what_it_does_and_ran_on_both_nodes(slurm, two):
    jobs = found(slurm, two[0])
    assert sorted(jobs) == NAMES
    for name, job in jobs.items():
        assert job.field("JobState") == "COMPLETED" and job.field("NodeList") == "node[1-2]", name
        assert name.endswith(".sbatch") or all(job.log(node).count("\n") > 1 for node in range(2)), name


def test_torchx_lists_shows_and_logs_a_job(slurm, two):
    folder, out = two
    handle = found(slurm, folder)["mim-ctr-base"].handle
    assert re.search(rf"{handle}\s+SUCCEEDED", out)
    assert "State: SUCCEEDED" in out and "Msg: COMPLETED" in out
    assert "mim-ctr-base/0 " in out and "mim-ctr-base/1 " in out


def test_torchrun_leaves_nothing_in_the_temporary_folder(slurm, shop, tmp_path):
    (tmp_path / "tmp").mkdir()
    words = ["--data", str(shop), "--out", "ctr", "--env", f"TMPDIR={tmp_path}/tmp"]
    job = submit(slurm, tmp_path, "mim.ctr", *SMALL, *words, "--", "--mim", "off", "--epochs", "0")
    assert job.end() == "FAILED"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "epochs is 0" in job.log()
    assert job.field("ExitCode") == "2:0" and job.field("Restarts") == "0"


def test_torchx_cancels_a_job_for_good(slurm, tmp_path):
    job = submit(slurm, tmp_path, "utils.sh", "sleep", "1000")
    assert job.field("JobState") in ("PENDING", "RUNNING")
    assert torchx(slurm, tmp_path, "cancel", job.handle).returncode == 0
    assert job.end() == "CANCELLED" and job.field("Restarts") == "0"
    assert "State: CANCELLED" in torchx(slurm, tmp_path, "status", job.handle).stdout
