"""What `torchx run -s slurm` writes into the batch script and refuses. tests/cluster/ runs scripts."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.runner import Runner, config, get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories
from torchx.specs import AppState, CfgVal

from mim_torchrec.errors import OptionError
from mim_torchrec.launch import slurm_job
from mim_torchrec.launch.slurm import SlurmScheduler
from mim_torchrec.launch.slurm_job import SlurmRequest

CTR = ["--data", "shop", "--table", "table", "--out", "out"]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with get_runner() as runner:
        yield runner


def script(runner: Runner, *words: str, component: str = "mim.ctr", **config: object) -> str:
    arguments = [*CTR, *words] if component == "mim.ctr" else list(words)
    return runner.dryrun_component(component, arguments, "slurm", config).request.script()


def test_every_scheduler_of_torchx_is_still_there_and_slurm_is_ours(runner):
    assert set(get_scheduler_factories()) > set(DEFAULT_SCHEDULER_MODULES)
    assert isinstance(runner._scheduler("slurm"), SlurmScheduler)
    assert runner._scheduler("local_cwd").backend == "local"
    assert "mim_torchrec.ctr.main" in str(runner.dryrun_component("mim.ctr", CTR, "local_cwd"))


def test_a_job_is_one_of_equal_nodes(runner):
    text = script(runner, "-j", "3x2", "--cpu", "5", "--gpu", "2", "--memMB", "4000")
    for flag in ("nodes=3", "ntasks-per-node=1", "cpus-per-task=5", "gpus-per-task=2", "mem=4000"):
        assert f"#SBATCH --{flag}\n" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--cpus-per-task=5 --gpus-per-task=2 --mem=4000" in srun  # srun does not take them from sbatch
    assert "hetjob" not in text


def test_options_of_the_site_reach_sbatch(runner):
    options = {"partition": "gpu", "account": "ads", "qos": "low", "reservation": "r", "constraint": "h200",
               "exclude": "node7", "time": "1-00:00:00", "comment": "two words"}  # fmt: skip
    text = script(runner, **options)
    for name, value in options.items():
        quoted = f"'--{name}={value}'" if " " in value else f"--{name}={value}"
        assert f"#SBATCH {quoted}\n" in text
    text = script(runner, dependency="afterok:12")
    assert "--dependency=afterok:12\n" in text and "--kill-on-invalid-dep=yes\n" in text


def test_what_may_be_tried_again_is_warned_before_its_end(runner):
    assert "#SBATCH --requeue\n" in script(runner) and "#SBATCH --signal=TERM@300\n" in script(runner)
    assert "--signal=TERM@900\n" in script(runner, time="60", warning=900)
    once = script(runner, "--max_retries", "0")
    assert "#SBATCH --no-requeue\n" in once and "--signal" not in once
    assert "--signal" not in script(runner, warning=0)


@pytest.mark.parametrize("limit", ["5", "0:06:00", "6:00", "0-0:6"])
def test_a_time_limit_within_the_warning_is_refused(runner, limit):
    with pytest.raises(OptionError, match="smaller warning"):
        script(runner, time=limit)


@pytest.mark.parametrize("limit", ["7", "0:07:00", "1-0", "UNLIMITED"])
def test_a_longer_time_limit_is_none(runner, limit):
    assert f"--time={limit}\n" in script(runner, time=limit)


@pytest.mark.parametrize(
    "words, config, message",
    [
        (["--image", "mim:1"], {}, "--image has no effect on Slurm"),
        (["--mounts", "type=bind,src=/a,dst=/b"], {}, "--mounts has no effect on Slurm"),
        (["-j", "1:2x1"], {}, "jobs on Slurm keep their nodes"),
        ([], {"container": "pyxis"}, "needs an --image"),
        (["--image", "mim:1"], {"container": "podman"}, "one of pyxis, apptainer"),
        (
            ["--image", "i", "--mounts", "type=volume,src=a,dst=/b"],
            {"container": "pyxis"},
            "bind mounts only",
        ),
        ([], {"time": "soon"}, "time soon is none of"),
    ],
)
def test_what_slurm_does_not_do_is_refused(runner, words, config, message):
    with pytest.raises(OptionError, match=message):
        script(runner, *words, **config)


MOUNTED = ["--image", "mim:1", "--mounts", "type=bind,src=/a,dst=/b,type=bind,src=/c,dst=/d,readonly"]


def test_pyxis_gets_options_of_srun(runner):
    text = script(runner, *MOUNTED, container="pyxis")
    assert " --container-image=mim:1 --container-mounts=/a:/b,/c:/d:ro bash -c" in text


def test_apptainer_starts_the_task(runner):
    text = script(runner, *MOUNTED, container="apptainer")
    assert "    apptainer exec --bind /a:/b --bind /c:/d:ro mim:1 bash -c " in text


def test_a_dry_run_makes_no_folder(runner, tmp_path):
    folder = tmp_path / "job"
    (tmp_path / "code").mkdir()
    dry = runner.dryrun_component("mim.ctr", CTR, "slurm", {"job_dir": str(folder)}, f"{tmp_path}/code")
    assert not folder.exists()
    assert dry.request.cmd[-1] == f"--chdir={folder}" and dry.request.workspace == f"{tmp_path}/code"
    folder.mkdir()
    with pytest.raises(OptionError, match="exists"):
        script(runner, job_dir=str(folder))


def run_task(text: str, tmp_path: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the function `task` of a script as srun does."""
    body = text[text.index("task() {") : text.index("\nsrun ")]
    known = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_PROCID": "1", **environment}
    words = ["bash", "-c", f"{body}\ntask"]
    return subprocess.run(words, env=known, cwd=tmp_path, capture_output=True, text=True)


def test_a_task_gets_its_variables_its_number_and_the_id_of_the_job(runner, tmp_path):
    words = ["--env", "LIST=a,b,QUOTED=it's", "printenv", "LIST", "QUOTED", "TORCHX_JOB_ID"]
    done = run_task(script(runner, *words, component="utils.sh"), tmp_path)
    job = runner._name
    assert done.stdout == f"a,b\nit's\nslurm://{job}/12\n"


@pytest.mark.parametrize(
    "status, of_task",
    [(0, 0), (143, 100), (2, 222), (5, 225), (127, 227), (6, 186), (1, 181), (137, 159), (50, 149)],
)
def test_a_task_tells_slurm_why_it_ended(runner, tmp_path, monkeypatch, status, of_task):
    monkeypatch.setattr(slurm_job, "OTHERS", 0)
    (tmp_path / "end.sh").write_text(f"exit {status}")
    done = run_task(script(runner, "sh", "end.sh", component="utils.sh"), tmp_path)
    assert done.returncode == of_task


@pytest.mark.parametrize(
    ("endless", "asked", "of_task"), [(True, True, 100), (True, False, 0), (False, True, 0)]
)
def test_a_service_that_ends_because_it_was_asked_to_comes_back(tmp_path, endless, asked, of_task):
    end = "kill -TERM $PPID; exit 0" if asked else "exit 0"
    request = SlurmRequest(name="a", nodes=1, options={}, resources={}, command=["sh", "-c", end], env={},
                           max_retries=3, is_endless=endless)  # fmt: skip
    assert run_task(request.script(), tmp_path).returncode == of_task


def test_services_are_endless_and_stages_are_not(runner):
    assert not runner.dryrun_component("mim.ctr", CTR, "slurm").request.is_endless
    words = ["--store", "s", "--log", "l", "--table_version", "v"]
    assert runner.dryrun_component("mim.follow", words, "slurm").request.is_endless


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}")
    (folder / name).chmod(0o755)


ROWS = """JobID|JobName|State|NNodes|WorkDir
12|mim-ctr|CANCELLED by 0|2|/shared/me
13|mim-csft|COMPLETED|1|/shared/me
12.batch|batch|CANCELLED|1|
"""


@pytest.fixture
def finished(tmp_path, monkeypatch) -> SlurmScheduler:
    """A cluster whose controller has forgotten its jobs, and whose accounting has not."""
    program(tmp_path, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(tmp_path, "squeue", "echo '14|PENDING'")
    program(tmp_path, "sacct", f"cat <<'END'\n{ROWS}END\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return SlurmScheduler("session")


def test_accounting_knows_what_the_controller_has_forgotten(finished):
    found = finished.describe("12")
    assert found is not None and found.state == AppState.CANCELLED and found.msg == "CANCELLED"
    assert found.roles[0].num_replicas == 2
    states = {app.app_id: app.state for app in finished.list()}
    expected = {"12": AppState.CANCELLED, "13": AppState.SUCCEEDED, "14": AppState.PENDING}
    assert states == expected


def test_without_accounting_a_forgotten_job_is_none(finished, tmp_path):
    program(tmp_path, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert finished.describe("12") is None
    assert [app.app_id for app in finished.list()] == ["14"]


def test_a_job_that_sbatch_refuses_is_refused_in_its_words(runner, tmp_path, monkeypatch):
    program(tmp_path, "sbatch", "echo 'error: invalid partition specified: gpu' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    dry = runner.dryrun_component("mim.ctr", CTR, "slurm", {})
    with pytest.raises(OptionError, match="sbatch: error: invalid partition specified: gpu"):
        runner.schedule(dry)


def test_the_configuration_of_this_checkout_is_one_that_the_scheduler_knows():
    configuration: dict[str, CfgVal] = {}
    config.apply("slurm", configuration, dirs=[str(Path(__file__).parents[2])])
    assert configuration == {"warning": 300}
    assert SlurmScheduler("session").run_opts().resolve(configuration)["warning"] == 300


@pytest.mark.parametrize(
    ("of_srun", "status", "again"),
    [(0, 0, False), (222, 2, False), (225, 5, False), (227, 127, False), (232, 1, True), (186, 6, True),
     (159, 137, True), (137, 137, True), (149, 1, True), (1, 1, True), (100, 143, True)],
)  # fmt: skip
def test_a_job_is_queued_again_where_that_can_help(tmp_path, monkeypatch, of_srun, status, again):
    program(tmp_path, "srun", f"exit {of_srun}")
    program(tmp_path, "scontrol", f"echo $1 >> {tmp_path}/called")
    request = SlurmRequest(
        name="a", nodes=1, options={}, resources={}, command=["true"], env={}, max_retries=3
    )
    known = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "a"}

    def run() -> int:
        with (tmp_path / "slurm-12.out").open("ab") as log:
            return subprocess.run(
                ["bash"], input=request.script().encode(), env=known, cwd=tmp_path, stdout=log
            ).returncode

    assert run() == status
    assert ("requeue" in (tmp_path / "called").read_text()) == again
    if again:  # three times, and no more
        for _ in range(4):
            run()
        assert (tmp_path / "called").read_text().count("requeue") == 3
