"""The words of a submission reach the program as they were written, through TorchX, schedulers and bash."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from torchx.runner import Runner, get_runner

from mim_torchrec.errors import OptionError
from mim_torchrec.launch.kubernetes import literal
from tests.manifests import expanded

WORDS = ["x y", "it's \"q\"", "1,2", "k=v", "$HOME", "a$$b", "$$$", "$(X_A)", "$$(X_A)", "`id`", "%d", "*",
         "~", "", "{replica_id}", "back\\slash", "ünï", "new\nline", "#x", "!x", "a;b&c|d>e"]  # fmt: skip
OUT = "it's ${replica_id}/o$$t"
ENV = {"X_A": "a b", "X_B": "1,2", "X_C": "it's $$ $(X_A)"}
QUEUE = {"queue": "research"}
Started = tuple[list[str], dict[str, str]]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with get_runner() as runner:
        yield runner


def of_docker(request: Any) -> Started:
    container = request.containers[0]
    return container.command, container.kwargs["environment"]


def of_pod(words: list[str], variables: list[tuple[str, str]]) -> Started:
    known: dict[str, str] = {}
    for name, value in variables:
        known[name] = expanded(value, known)
    return [expanded(word, known) for word in words], known


def of_volcano(request: Any) -> Started:
    container = request.resource["spec"]["tasks"][0]["template"].spec.containers[0]
    return of_pod(container.command, [(each.name, each.value or "") for each in container.env])


def of_kueue(request: Any) -> Started:
    container = request.job["spec"]["template"]["spec"]["containers"][0]
    words, known = of_pod(
        container["command"], [(each["name"], each.get("value", "")) for each in container["env"]]
    )
    return words, {**known, "JOB_COMPLETION_INDEX": "0"}


def of_batch(request: Any) -> Started:
    node = request.job_def["nodeProperties"]["nodeRangeProperties"][0]["container"]
    known = {each["name"]: each["value"] for each in node["environment"]}
    return node["command"], {**known, "AWS_BATCH_JOB_NODE_INDEX": "0"}


def of_slurm(request: Any) -> Started:
    text = request.script()
    body = text[text.index("task() {") : text.index("\nsrun ")]
    return ["bash", "-c", f"{body}\ntask"], {"SLURM_PROCID": "0", "SLURM_JOB_ID": "12"}


SCHEDULERS: dict[str, tuple[Any, dict[str, str]]] = {
    "local_docker": (of_docker, {}),
    "kubernetes": (of_volcano, QUEUE),
    "kueue": (of_kueue, QUEUE),
    "aws_batch": (of_batch, QUEUE),
    "slurm": (of_slurm, {}),
}


@pytest.mark.parametrize("component", ["mim.csft", "mim.rim"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_words_and_variables_reach_the_program_as_they_were_written(runner, tmp_path, scheduler, component):
    program = tmp_path / "a program"
    names = [*ENV, "X_N"] if scheduler not in ("kueue", "aws_batch") else [*ENV]
    program.write_text(
        f"#!{sys.executable} -I\nimport json, os, sys\n"
        f"print(json.dumps([sys.argv[1:], [os.environ[name] for name in {names}]]))\n"
    )
    program.chmod(0o755)
    own = ["--out", OUT]
    own += ["--data", "shop"] if component == "mim.csft" else [
        "--source", "new", "--encoder", "e", "--table", "t", "--log", "l"]  # fmt: skip
    variables = ENV | ({"X_N": "n${replica_id}"} if "X_N" in names else {})
    own += ["--env", ",".join(f"{name}={value}" for name, value in variables.items())]
    own += ["--image", "mim:1"] if scheduler != "slurm" else []
    started, config = SCHEDULERS[scheduler]
    dry = runner.dryrun_component(component, [*own, "--", *WORDS], scheduler, config)
    words, environment = started(dry.request)
    environment = {**os.environ, **environment, "MIM_PYTHON": str(program)}
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, values = json.loads(done.stdout)
    assert found[-len(WORDS) :] == WORDS
    assert found[found.index("--out") + 1] == "it's 0/o$$t"
    assert values == [value.replace("${replica_id}", "0") for value in variables.values()]


def test_a_variable_with_the_number_of_a_pod_is_refused_on_kueue(runner):
    words = ["--out", "o", "--data", "shop", "--image", "mim:1", "--env", "X_N=n${replica_id}"]
    with pytest.raises(OptionError, match=r"--env X_N: on kueue .* JOB_COMPLETION_INDEX"):
        runner.dryrun_component("mim.csft", words, "kueue", QUEUE)


@pytest.mark.parametrize("text", ["$(A)", "$$(A)", "$$", "a$$b", "$$$", "$((1 + 1))", "$A", "${A}"])
def test_kubernetes_expands_nothing_in_a_literal(text):
    assert expanded(literal(text), {"A": "wrong"}) == text
