"""What cannot run is refused at submission, in one line, and dry runs leave nothing."""

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from torchx.runner import Runner, get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories
from torchx.specs import AppDef, Resource
from torchx.specs.builders import materialize_appdef

from mim_torchrec.errors import OptionError
from mim_torchrec.launch import components

pytestmark = pytest.mark.usefixtures("forked_stages")
TRAIN = ["--data", "shop", "--out", "out"]
BASE = ["--", "--mim", "off"]
TOKENS = ["--", "--token-file", "tokens"]
VOLCANO = {"queue": "default"}


def build(stage: str, *words: str) -> AppDef:
    return materialize_appdef(getattr(components, stage), list(words))


def resource(stage: str, *words: str) -> Resource:
    return build(stage, *words).roles[0].resource


@pytest.fixture
def runner() -> Iterator[Runner]:
    with get_runner() as runner:
        yield runner


def torchx(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an empty folder."""
    environment = {**os.environ, "KUBECONFIG": str(folder / "none"), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_cores_and_memory_follow_the_gpus():
    eight = resource("ctr", *TRAIN, "--gpu", "8", "-j", "2x8", *BASE)
    assert (eight.cpu, eight.gpu, eight.memMB) == (64, 8, 262144)
    given = resource("ctr", *TRAIN, "--gpu", "8", "--cpu", "96", "--memMB", "1000000", "-j", "1x8", *BASE)
    assert (given.cpu, given.memMB) == (96, 1000000)


@pytest.mark.parametrize(("j", "cpu", "memory"), [("1x1", 2, 8192), ("1x2", 2, 8192), ("4x8", 8, 32768)])
def test_cores_and_memory_follow_the_processes_where_there_is_no_gpu(j, cpu, memory):
    found = resource("csft", *TRAIN, "-j", j)
    assert (found.cpu, found.gpu, found.memMB) == (cpu, 0, memory)


def test_a_service_has_defaults_of_its_own():
    assert resource("serve", "--release", "r", *TOKENS).memMB == 4096
    follow = resource("follow", "--store", "s", "--log", "l", "--table_version", "v")
    assert (follow.cpu, follow.memMB) == (1, 2048)
    assert resource("serve", "--release", "r", "--gpu", "1", *TOKENS).cpu == 8


REFUSED = {
    "more processes than GPUs": ("ctr", [*TRAIN, "--gpu", "1", "-j", "1x2", *BASE], "say -j 1x1"),
    "GPUs without a process": ("ctr", [*TRAIN, "--gpu", "8", *BASE], "a node has 8 GPUs and 2 processes"),
    "a machine with fewer GPUs": ("csft", [*TRAIN, "-h", "gpu.small", "-j", "1x2"], "a node has 1 GPUs"),
    "an unknown machine": ("csft", [*TRAIN, "-h", "no_such"], "-h no_such: No named resource found"),
    "a negative size": ("csft", [*TRAIN, "--cpu", "-1"], "--cpu, --gpu and --memMB are at least 0"),
    "a malformed -j": ("ctr", [*TRAIN, "-j", "two", *BASE], "-j two: write [MIN_NODES:]NODESxPROCESSES"),
    "no node": ("ctr", [*TRAIN, "-j", "0x1", *BASE], "each at least 1"),
    "nodes upside down": ("ctr", [*TRAIN, "-j", "3:2x1", *BASE], "-j 3:2x1: write"),
    "a stage of fixed size": ("csft", [*TRAIN, "-j", "1:2x4"], "csft cannot go on with another"),
    "a malformed mount": ("csft", [*TRAIN, "--mounts", "src=a,dst=b"], "--mounts src=a,dst=b: type must be"),
    "a mount of no kind": ("csft", [*TRAIN, "--mounts", "type=nfs"], "invalid mount type 'nfs'"),
    "MIM without a table": ("ctr", TRAIN, "mim.ctr needs --table DIR"),
    "a server without tokens": ("serve", ["--release", "r"], "add `-- --token-file FILE`"),
    "a server of nothing": ("serve", TOKENS, "say what to serve"),
    "a server of two things": ("serve", ["--release", "r", "--bundle", "b", *TOKENS], "say what to serve"),
    "no server": ("serve", ["--release", "r", "--replicas", "0", *TOKENS], "--replicas is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_submission_that_cannot_run_is_refused(case):
    stage, words, problem = REFUSED[case]
    with pytest.raises(OptionError) as refused:
        build(stage, *words)
    assert problem in str(refused.value)


@pytest.mark.parametrize("words", [["--mim", "off"], ["--mim=off"], ["--ubm", "sim", "--mim", "off"]])
def test_base_needs_no_table_however_it_is_said(words):
    build("ctr", *TRAIN, "--", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--host", "127.0.0.1"],
        ["--host", "localhost"],
        TOKENS,
        ["--", "--token-file=t"],
        ["--", "--token_file", "t"],
    ],
)
def test_a_server_on_loopback_or_with_tokens_is_no_mistake(words):
    build("serve", "--release", "r", *words)


def test_an_elastic_job_restarts_its_workers():
    def restarts(*words: str) -> str:
        text = build("ctr", *TRAIN, *words, *BASE).roles[0].args[1]
        return text.partition("--max_restarts ")[2].split()[0]

    assert (restarts("-j", "1:2x1"), restarts("-j", "2x1")) == ("10", "0")
    assert restarts("-j", "1:2x1", "--max_restarts", "3") == "3"


def test_every_scheduler_of_torchx_is_there_beside_our_own():
    assert set(get_scheduler_factories()) == {*DEFAULT_SCHEDULER_MODULES, "kueue"}


def test_kubernetes_needs_an_image(runner):
    with pytest.raises(OptionError, match="ctr on kubernetes needs --image NAME"):
        runner.dryrun_component("mim.ctr", [*TRAIN, "--image", "", *BASE], "kubernetes", VOLCANO)


def test_several_servers_are_no_volcano_job(runner):
    serve = ["--release", "r", "--image", "mim:1", "--replicas", "3", *TOKENS]
    with pytest.raises(OptionError, match="deploy/kubernetes/serve"):
        runner.dryrun_component("mim.serve", serve, "kubernetes", VOLCANO)
    serve[serve.index("3")] = "1"
    runner.dryrun_component("mim.serve", serve, "kubernetes", VOLCANO)


def spec(runner: Runner, words: list[str], **config: object) -> dict:
    """The Volcano job of a CTR run, as it is sent."""
    dryrun = runner.dryrun_component(
        "mim.ctr", [*TRAIN, "--image", "mim:1", *words, *BASE], "kubernetes", VOLCANO | config
    )
    return yaml.safe_load(str(dryrun))["spec"]


def test_pods_have_tolerations_secrets_and_a_user(runner):
    job = spec(
        runner, ["-j", "2x1"], run_as_user=1000,
        tolerations=["nvidia.com/gpu:NoSchedule", "team=ads"], secrets=["redis-password:/secrets/redis"],
    )  # fmt: skip
    for task in job["tasks"]:
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "ads"},
        ]
        (volume,) = [v for v in pod["volumes"] if "secret" in v]
        assert volume["secret"] == {"secretName": "redis-password"}
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts[volume["name"]]["mountPath"] == "/secrets/redis" and mounts[volume["name"]]["readOnly"]
        assert mounts["dshm"]["mountPath"] == "/dev/shm"
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"tolerations": ["gpu:Never"]}, "tolerations=gpu:Never: write"),
        ({"secrets": ["name:relative"]}, "secrets=name:relative: write NAME:/FOLDER"),
        ({"run_as_user": 0}, "run_as_user=0: it must be at least 1"),
    ],
)
def test_malformed_settings_of_kubernetes_are_refused(runner, config, problem):
    with pytest.raises(OptionError, match=problem):
        spec(runner, [], **config)


def test_a_pod_of_an_elastic_job_starts_again_alone(runner):
    def policies(*words: str) -> list:
        job = spec(runner, [*words, "--max_retries", "3"])
        assert [task["minAvailable"] for task in job["tasks"]] == ([1, 0] if "1:2x1" in words else [1, 1])
        return [task["policies"] for task in job["tasks"]]

    alone = [
        {"event": "PodFailed", "action": "RestartTask"},
        {"event": "PodEvicted", "action": "RestartTask"},
    ]
    assert policies("-j", "1:2x1") == [alone, alone]
    assert all(policy["action"] == "RestartJob" for task in policies("-j", "2x1") for policy in task)


def test_the_command_refuses_in_one_line_with_a_status(tmp_path: Path):
    for words in (
        ["-s", "local_cwd", "mim.serve", "--release", "r"],
        ["-s", "kubernetes", "-cfg", "queue=q", "--dryrun", "mim.ctr", *TRAIN, *BASE],
        ["-s", "kubernetes", "-cfg", "queue=q", "mim.serve", "--image", "i", "--release", "r",
         "--replicas", "2", *TOKENS],
    ):  # fmt: skip
        done = torchx(tmp_path, "run", *words)
        assert done.returncode == 2, done.stderr
        said = [line for line in done.stderr.splitlines() if " INFO " not in line]
        assert len(said) == 1 and said[0].startswith("torchx run: "), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_volcano_job_without_docker_and_without_a_cluster(tmp_path: Path):
    done = torchx(
        tmp_path, "run", "-s", "kubernetes", "-cfg", "queue=research", "--dryrun", "mim.ctr", *TRAIN,
        "--image", "mim:1", "-j", "2x1", *BASE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout.partition("=== SCHEDULER REQUEST ===")[2])
    assert job["apiVersion"] == "batch.volcano.sh/v1alpha1" and job["spec"]["queue"] == "research"
    assert [task["replicas"] for task in job["spec"]["tasks"]] == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_dry_runs_leave_no_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with get_runner() as runner:
        for _ in range(2):
            runner.dryrun_component("mim.ctr", [*TRAIN, *BASE], "local_cwd")
        assert list(tmp_path.iterdir()) == []


def test_logs_of_a_local_job_are_removed_at_the_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with get_runner() as runner:
        handle = runner.run_component("utils.echo", ["--msg", "hello"], "local_cwd")
        assert runner.wait(handle, wait_interval=0.1).state.name == "SUCCEEDED"
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o77 == 0 and list(folder.rglob("stdout.log"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["ctr", "csft", "serve", "bench"])
def test_help_has_every_argument_with_its_default(capsys, stage):
    with pytest.raises(SystemExit):
        build(stage, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, parameter in inspect.signature(getattr(components, stage)).parameters.items():
        assert f"--{name} " in text or name == "script_args"
        if parameter.default not in (parameter.empty, None, ""):
            assert f"(default: {parameter.default})" in text
