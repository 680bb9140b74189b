"""The launcher as a library: components in a file of the user, and the settings of this folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim_torchrec.launch import jobs

pytestmark = pytest.mark.usefixtures("forked_stages")
ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = '''
"""Jobs of my own."""

from typing import Optional

import torchx.specs as specs

from mim_torchrec.launch.jobs import distributed, process, service


@distributed(j="1x4", memMB=20000)
def train(*script_args: str, data: str, table: Optional[str] = None) -> specs.AppDef:
    """
    Train a model of my own.

    Args:
        script_args: further flags, after a lone --
        data: dataset directory
        table: directory of the multi-modal table
    """
    return process("train", "my_package.train", script_args, data=data, table=table)


@service(max_retries=5)
def watch(*script_args: str, log_every: int = 10) -> specs.AppDef:
    """
    Watch something.

    Args:
        script_args: further flags, after a lone --
        log_every: seconds
    """
    app = process("watch", "my_package.watch follow", script_args, log_every=log_every)
    app.roles[0].num_replicas = 2
    return app
'''


def torchx(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", *words],
        cwd=folder, env={**os.environ, "HOME": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(COMPONENTS)
    return tmp_path


def described(folder: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The specification of a job for Kueue, and its container."""
    done = torchx(folder, "run", "-s", "kueue", "-cfg", "queue=q", "--dryrun", *words)
    assert done.returncode == 0, done.stderr
    job = next(yaml.safe_load_all(done.stdout.partition("=== SCHEDULER REQUEST ===")[2]))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return job["spec"], container


def test_a_stage_of_the_user_has_the_ranks_and_the_arguments_of_a_job(folder):
    _, container = described(
        folder, "own.py:train", "--image", "i", "--data", "d", "--env", "A=1", "--", "--lr", "0.1"
    )
    line = container["command"][2]
    assert "--nproc_per_node 4" in line and line.endswith("-m my_package.train --data d --lr 0.1")
    assert container["resources"]["limits"] == {"cpu": "4000m", "memory": "20000M"}
    assert {"name": "A", "value": "1"} in container["env"]


def test_a_service_of_the_user_runs_python(folder):
    spec, container = described(folder, "own.py:watch", "--image", "i")
    assert container["command"][2].endswith('}" -m my_package.watch follow --log-every 10')
    assert (spec["completions"], spec["backoffLimit"]) == (2, 2 * 5)


def test_a_mistake_in_a_job_of_the_user_is_one_line(folder):
    done = torchx(folder, "run", "-s", "local_cwd", "--dryrun", "own.py:train", "--data", "d", "--gpu", "1")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if " INFO " not in line] == [
        "torchx run: a node has 1 GPUs and 4 processes, and each process takes one GPU; say -j 1x1"
    ]


def test_help_has_the_arguments_of_the_user_and_of_the_job(folder):
    done = torchx(folder, "run", "-s", "local_cwd", "own.py:train", "--help")
    assert done.returncode == 0, done.stderr
    assert {"--data", "--table", "--memMB", "--mounts", "-j"} <= set(done.stdout.replace(",", " ").split())


def test_what_is_public_is_documented():
    assert [name for name in jobs.__all__ if "Args:" not in (getattr(jobs, name).__doc__ or "")] == []


def test_the_settings_of_the_repository_are_known_to_their_schedulers():
    done = torchx(
        ROOT, "run", "--dryrun", "-s", "kueue", "mim.csft", "--data", "d", "--out", "o", "--image", "i"
    )
    assert done.returncode == 0, done.stderr
    assert "kueue.x-k8s.io/queue-name: default" in done.stdout
    done = torchx(ROOT, "run", "--dryrun", "mim.csft", "--data", "d", "--out", "o")
    assert done.returncode == 0 and "log_dir" in done.stdout, done.stderr
