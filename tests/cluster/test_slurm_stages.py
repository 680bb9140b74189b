"""The stages on two real nodes of Slurm, as a user submits them, beside two ranks of this machine."""

import re
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.cluster.jobs import SMALL, Job, submit, torchx
from mim_torchrec.csft.main import main as csft
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as ctr
from mim_torchrec.representation.export import main as export
from tests.programs import TINY_TOWERS
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
TOWERS = [word for name, value in TINY_TOWERS.items() for word in (f"--{name}", value)]
CSFT = [*TOWERS, "--epochs", "1", "--batch-size", "16"]
CTR = ["--epochs", "1", "--batch-size", "256"]


@pytest.fixture(scope="module")
def one(shop, tmp_path_factory) -> Path:
    """All stages by two ranks of one node."""
    root = tmp_path_factory.mktemp("one")
    data = ["--data", str(shop)]
    run_ranks(csft, 2, [*data, "--out", f"{root}/csft", *CSFT])
    run_ranks(export, 2, [*data, "--encoder", f"{root}/csft/encoder", "--out", f"{root}/table"])
    run_ranks(ctr, 2, [*data, "--table", f"{root}/table", "--out", f"{root}/ctr", *CTR])
    run_ranks(evaluate, 2, ["--model", f"{root}/ctr", "--out", f"{root}/evaluate"])
    return root


@pytest.fixture(scope="module")
def two(slurm, shop, tmp_path_factory) -> tuple[Path, dict[str, Job]]:
    """All stages by one rank on each of two nodes, and their jobs."""
    root = tmp_path_factory.mktemp("two")
    data = ["--data", str(shop)]
    stages = {
        "csft": [*data, "--out", "csft", "--", *CSFT],
        "export": [*data, "--encoder", "csft/encoder", "--out", "table"],
        "ctr": [*data, "--table", "table", "--out", "ctr", "--", *CTR],
        "evaluate": ["--model", "ctr", "--out", "evaluate"],
    }
    jobs = {}
    for stage, words in stages.items():
        jobs[stage] = submit(slurm, root, f"mim.{stage}", *SMALL, *words)
        assert jobs[stage].end() == "COMPLETED", jobs[stage].log()
    return root, jobs


def test_two_nodes_equal_one(one, two):
    root, _ = two
    tables = [sorted((folder / "table").glob("*.safetensors")) for folder in (one, root)]
    assert [file.name for file in tables[0]] == [file.name for file in tables[1]] != []
    pairs = list(zip(*tables, strict=True))
    pairs += [
        (one / name, root / name) for name in ("ctr/predictions.parquet", "evaluate/predictions.parquet")
    ]
    assert [a.name for a, b in pairs if a.read_bytes() != b.read_bytes()] == []


def test_a_rank_ran_on_each_node(slurm, two):
    _, jobs = two
    for stage, job in jobs.items():
        lines = [job.log(node) for node in range(2)]
        assert all(line.strip() for line in lines), stage
        assert job.field("NodeList") == "node[1-2]"


def test_jobs_are_named_after_what_they_do(two):
    _, jobs = two
    names = {stage: job.field("JobName") for stage, job in jobs.items()}
    assert names == {
        "csft": "mim-csft", "export": "mim-export-table", "ctr": "mim-ctr", "evaluate": "mim-evaluate"
    }  # fmt: skip


def test_torchrun_leaves_nothing_in_the_temporary_folder(slurm, shop, tmp_path):
    (tmp_path / "tmp").mkdir()
    words = ["--data", str(shop), "--out", "ctr", "--env", f"TMPDIR={tmp_path}/tmp"]
    job = submit(slurm, tmp_path, "mim.ctr", *SMALL, *words, "--", "--mim", "off", "--epochs", "0")
    assert job.end() == "FAILED"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "epochs is 0" in job.log()
    assert job.field("ExitCode") == "2:0" and job.field("Restarts") == "0"


def test_torchx_shows_lists_and_logs_a_job(slurm, two, tmp_path):
    root, jobs = two
    handle = jobs["ctr"].handle
    status = torchx(slurm, tmp_path, "status", handle).stdout
    assert re.search(r"State: +SUCCEEDED", status) and "COMPLETED" in status
    listed = torchx(slurm, tmp_path, "list", "-s", "slurm").stdout
    assert re.search(rf"{handle}\s+SUCCEEDED", listed), listed
    log = torchx(slurm, tmp_path, "log", handle).stdout
    assert "mim-ctr/0" in log and "mim-ctr/1" in log and "test" in log


def test_torchx_cancels_a_job_for_good(slurm, tmp_path):
    job = submit(slurm, tmp_path, "utils.sh", "sleep", "1000")
    assert job.field("JobState") in ("PENDING", "RUNNING")
    assert torchx(slurm, tmp_path, "cancel", job.handle).returncode == 0
    assert job.end() == "CANCELLED" and job.field("Restarts") == "0"
    status = torchx(slurm, tmp_path, "status", job.handle).stdout
    assert re.search(r"State: +CANCELLED", status), status
