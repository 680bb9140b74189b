"""The TorchX components: what they launch, without launching it."""

import inspect
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from importlib import import_module

import pytest
from torch.distributed import TCPStore
from torch.distributed.run import get_args_parser
from torchx.runner import Runner, get_runner
from torchx.specs import AppDef, macros
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate
from torchx.specs.finder import get_component, get_components

from mim_torchrec.ciubm.ubm.registry import built_in_models
from mim_torchrec.launch import components

STAGES = {
    "pretrain": ["--data", "shop", "--out", "out"],
    "csft": ["--data", "shop", "--out", "out"],
    "export": ["--data", "shop", "--encoder", "encoder", "--out", "out"],
    "ctr": ["--data", "shop", "--out", "out", "--table", "table"],
    "evaluate": ["--model", "runs/ctr", "--out", "out"],
}
MODULES = {
    "pretrain": "mim_torchrec.pretraining.main",
    "csft": "mim_torchrec.csft.main",
    "export": "mim_torchrec.representation.export",
    "ctr": "mim_torchrec.ctr.main",
    "evaluate": "mim_torchrec.ctr.evaluation",
}


SERVICES = {
    "rim": ["--source", "new", "--encoder", "encoder", "--table", "table", "--log", "log", "--out", "out"],
    "serve": ["--release", "releases", "--host", "127.0.0.1"],
    "follow": ["--store", "redis://host", "--log", "log", "--table_version", "v1"],
}
BENCH = ["--name", "paper.efficiency.main", "--out", "out"]
A_JOB = f"job-{uuid.uuid4().hex}"
"""Decides the port: tests that run at the same time have their own."""
COMPONENTS = STAGES | SERVICES | {"bench": BENCH, "doctor": []}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with get_runner() as runner:
        yield runner


def build(stage: str, *arguments: str) -> AppDef:
    return materialize_appdef(getattr(components, stage), [*COMPONENTS[stage], *arguments])


def line(app: AppDef) -> str:
    return app.roles[0].args[1]


def test_every_public_function_is_a_tested_stage():
    functions = inspect.getmembers(components, inspect.isfunction)
    here = {name for name, function in functions if function.__module__ == components.__name__}
    assert {name for name in here if not name.startswith("_")} == set(COMPONENTS)


@pytest.mark.parametrize("stage", COMPONENTS)
def test_torchx_finds_no_fault_with_a_component(stage):
    assert [message.description for message in validate(components.__file__, stage)] == []


def test_components_are_registered_beside_the_builtin_ones():
    names = {f"mim.{stage}" for stage in COMPONENTS} | {"dist.ddp", "dist.spmd", "utils.python", "utils.sh"}
    assert names <= set(get_components())


@pytest.mark.parametrize("stage", STAGES)
def test_torchrun_takes_no_flag_of_a_stage_for_an_ambiguous_one_of_its_own(stage, capsys):
    models = [["--ubm", name] for name in built_in_models()] if stage == "ctr" else [[]]
    for model in models:  # each has flags of its own
        with pytest.raises(SystemExit):
            import_module(MODULES[stage]).main([*model, "--help"])
    flags = set(re.findall(r"^[│|]? *(--[a-z][a-z0-9.-]*)", capsys.readouterr().out, re.MULTILINE))
    assert {"--data", "--out"} <= flags
    for flag in sorted(flags):
        parsed = get_args_parser().parse_args(["-m", MODULES[stage], flag, "value"])
        assert parsed.training_script_args == [flag, "value"]


@pytest.mark.parametrize("stage", COMPONENTS)
def test_every_argument_is_documented(stage):
    component = get_component(f"mim.{stage}")
    documentation = inspect.getdoc(component.fn)
    assert [p for p in inspect.signature(component.fn).parameters if f"{p}: " not in documentation] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_launches_its_stage_by_torchrun(stage):
    agent = 'exec "$${MIM_PYTHON:-python}" -m mim_torchrec.training.agent'
    assert line(build(stage)).startswith(f"{agent} --rdzv_endpoint localhost:0 --local_addr localhost ")
    assert f"-m {MODULES[stage]} {' '.join(STAGES[stage])}" in line(build(stage))


def test_flags_after_two_dashes_go_to_the_stage():
    assert line(build("ctr", "--", "--mim", "off")).endswith("--table table --mim off")


def test_base_needs_no_table():
    app = materialize_appdef(components.ctr, ["--data", "shop", "--out", "out", "--", "--mim", "off"])
    assert "--table" not in line(app)


def test_spaces_in_a_path_are_quoted():
    app = materialize_appdef(components.csft, ["--data", "my shop", "--out", "out"])
    assert "--data 'my shop'" in line(app)


def test_nodes_are_replicas_that_meet_at_the_first():
    app = build("ctr", "-j", "2x4")
    assert app.roles[0].num_replicas == 2
    assert '--rdzv_endpoint "$${${rank0_env}:=localhost}:$(($(printf %s ${app_id} | cksum' in line(app)
    assert "--nnodes 2 --nproc_per_node 4" in line(app)


def on_node(app: AppDef, number: int, forked: dict[str, str]) -> subprocess.Popen[str]:
    """Start the line of one node of a job as a scheduler does."""
    values = macros.Values(img_root="", app_id=A_JOB, replica_id=str(number), rank0_env="FIRST_NODE")
    role = values.apply(app.roles[0])
    environment = {**os.environ, **role.env, **forked, "FIRST_NODE": "127.0.0.1"}
    return subprocess.Popen(
        [role.entrypoint, *role.args], env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def port_of(app: AppDef, app_id: str) -> int:
    """The port on which the first node of a job listens."""
    expression = re.search(r"\$\(\(.* \+ 20000\)\)", line(app))
    assert expression is not None
    text = macros.Values(img_root="", app_id=app_id, replica_id="0", rank0_env="").substitute(expression[0])
    said = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True, check=True)
    return int(said.stdout)


def test_jobs_meet_at_ports_of_their_own():
    app = build("ctr", "-j", "2x1")
    ports = [port_of(app, str(job)) for job in range(1000, 1040)]
    assert len(set(ports)) > 35 and all(20000 <= port < 30000 for port in ports)
    assert ports == [port_of(app, str(job)) for job in range(1000, 1040)]
    assert build("ctr", "-j", "2x1", "--port", "4321").roles[0].port_map == {"c10d": 4321}
    assert "localhost}:4321" in line(build("ctr", "-j", "2x1", "--port", "4321"))


def test_two_nodes_meet(forked):
    app = build("ctr", "-j", "2x1", "--", "--help")
    nodes = [on_node(app, number, forked) for number in (1, 0)]
    said = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert all("--table" in text for text in said)


def test_a_job_refuses_the_store_of_another(forked):
    app = build("ctr", "-j", "2x1", "--", "--help")
    other = TCPStore("127.0.0.1", port_of(app, A_JOB), is_master=True, wait_for_workers=False)
    node = on_node(app, 0, forked)
    said, _ = node.communicate()
    assert node.returncode == 6 and "The connection to the C10d store has failed" in said
    assert other.num_keys() <= 1


def test_stages_are_tried_again_and_jobs_are_named_after_their_results():
    for stage in STAGES:
        assert build(stage).roles[0].max_retries == 3
    assert build("ctr", "--max_retries", "0").roles[0].max_retries == 0
    assert build("ctr").name == "mim-ctr-out" and build("rim").name == "mim-rim-out"
    app = materialize_appdef(components.csft, ["--data", "shop", "--out", "runs/Demo_1/csft/"])
    assert app.name == "mim-csft" and build("serve").name == "mim-serve"
    assert build("ctr", "--job_name", "my-job").name == "my-job"


def test_torchrun_gives_ranks_the_time_that_was_asked_for():
    assert build("ctr").roles[0].env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    assert build("ctr", "--grace", "600").roles[0].env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_restarted_workers_do_not_share_the_rendezvous_store():
    environment = build("ctr", "--env", "A=1", "--max_restarts", "3").roles[0].env
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == environment["A"] == "1"
    assert "--max_restarts 3" in line(build("ctr", "--max_restarts", "3"))


def test_several_ranks_of_a_node_compute_on_one_thread_each_unless_told():
    def threads(*words: str) -> str | None:
        return build("ctr", *words).roles[0].env.get("OMP_NUM_THREADS")

    assert (threads("-j", "1x1"), threads("-j", "1x2")) == (None, "1")
    assert threads("-j", "1x2", "--env", "OMP_NUM_THREADS=4") == "4"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "scheduler, config",
    [("local_cwd", {}), ("slurm", {}), ("kubernetes", {"queue": "default", "validate_spec": False})],
)
def test_schedulers_accept_a_component(runner, stage, scheduler, config):
    known = runner.scheduler_run_opts(scheduler)._opts
    config = {name: value for name, value in config.items() if name in known}
    image = ["--image", "mim:1"] if scheduler != "slurm" else []
    arguments = [*STAGES[stage], *image, "-j", "2x2"]
    request = runner.dryrun_component(f"mim.{stage}", arguments, scheduler, config)
    assert MODULES[stage] in str(request)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    "scheduler, config",
    [("local_cwd", {}), ("slurm", {}), ("kubernetes", {"queue": "default", "validate_spec": False})],
)
def test_a_service_is_one_process_that_schedulers_accept(runner, service, scheduler, config):
    known = runner.scheduler_run_opts(scheduler)._opts
    config = {name: value for name, value in config.items() if name in known}
    app = build(service, "--", "--once")
    assert re.fullmatch(r'exec "\$\$\{MIM_PYTHON:-python\}" -m mim_torchrec\.\S+ .*--once', line(app))
    image = ["--image", "mim:1"] if scheduler != "slurm" else []
    arguments = [*SERVICES[service], *image]
    request = runner.dryrun_component(f"mim.{service}", arguments, scheduler, config)
    assert "mim_torchrec" in str(request) and app.roles[0].num_replicas == 1


@pytest.mark.parametrize(
    "scheduler, config",
    [("local_cwd", {}), ("slurm", {}), ("kubernetes", {"queue": "default", "validate_spec": False})],
)
def test_a_benchmark_is_one_process_that_schedulers_accept(runner, scheduler, config):
    known = runner.scheduler_run_opts(scheduler)._opts
    config = {name: value for name, value in config.items() if name in known}
    app = build("bench", "--", "--samples", "8")
    expected = (
        'exec "$${MIM_PYTHON:-python}" -m mim_torchrec.benchmarks.paper.efficiency.main --out out --samples 8'
    )
    assert line(app) == expected and app.roles[0].num_replicas == 1
    image = ["--image", "mim:1"] if scheduler != "slurm" else []
    request = runner.dryrun_component("mim.bench", [*BENCH, *image], scheduler, config)
    assert "mim_torchrec.benchmarks.paper.efficiency.main" in str(request)


@pytest.mark.parametrize(
    "scheduler, config",
    [("local_cwd", {}), ("slurm", {}), ("kubernetes", {"queue": "default"}), ("kueue", {"queue": "default"})],
)
def test_nodes_are_checked_by_a_job_of_two(runner, scheduler, config):
    image = ["--image", "mim:1"] if config else []
    request = runner.dryrun_component("mim.doctor", image, scheduler, config)
    assert "mim_torchrec.doctor" in str(request)
    app = build("doctor")
    assert app.roles[0].num_replicas == 2 and line(app).endswith("-m mim_torchrec.doctor --nodes")
