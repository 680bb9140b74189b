"""A Slurm of two nodes for the tests of this folder, or the reason why there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.cluster import jobs
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster, why_no_slurm
from tests.programs import small_shop


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[SlurmCluster]:
    """It lives as long as the process that runs these tests."""
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def submission(forked) -> Iterator[None]:
    """Jobs are submitted by a `torchx` of the fork server."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "TORCHX", (str(Path(forked["MIM_PYTHON"]).with_name("torchx")),))
        yield


@pytest.fixture(scope="session")
def forked_on_nodes(forked) -> dict[str, str]:
    """Variables of jobs whose processes come from the fork server."""
    return {name: forked[name] for name in ("MIM_PYTHON", "PYTHON_EXEC")}


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Path:
    """Data for all stages."""
    return small_shop(tmp_path_factory.mktemp("cluster"), searches=40, requests=400, users=60)
