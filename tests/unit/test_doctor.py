"""What `mim doctor` says when something is wrong, and that it says nothing is when nothing is."""

import json
import sys
from pathlib import Path

import pytest

from mim_torchrec import cli, doctor, doctor_gpus
from mim_torchrec.doctor import Finding

TRIPLE = {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}


def status_of(words: list[str]) -> int:
    """The exit status of `mim`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code


@pytest.mark.slow
def test_this_installation_is_sound(capsys):
    assert status_of(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"python", "versions", "lookup", "encoders", "package", "devices", "gloo", "disk"} <= {
        finding["check"] for finding in findings
    }
    assert [finding for finding in findings if not finding["ok"]] == []


def test_a_failed_check_is_the_exit_status(capsys):
    findings = [Finding("disk", True, "much"), Finding("gloo", False, "no address", "give it one")]
    with pytest.raises(SystemExit) as exit:
        doctor.main([], examine=lambda: findings)
    assert exit.value.code == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ok    disk           much", "FAIL  gloo           no address; fix it: give it one"]


@pytest.mark.parametrize("version", [(3, 10, 2), (3, 14, 0), (2, 7, 18)])
def test_another_python_is_refused(version):
    finding = doctor.check_python(version)
    assert not finding.ok
    assert "python3.11" in finding.fix


def test_the_pinned_versions_go_together():
    assert doctor.check_versions(TRIPLE, driver=False).ok


@pytest.mark.parametrize(
    "change, driver, problem",
    [
        ({"torch": "2.13.0"}, False, "torchrec 1.9.2 goes with fbgemm 1.9 and torch 2.14"),
        ({"torch": "2.13.0+cu130"}, False, "different releases"),
        ({"fbgemm-gpu-cpu": "1.8.0"}, False, "different releases"),
        ({"fbgemm-gpu": "1.9.0"}, False, "overwrite each other's files"),
        ({"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.9.0"}, False, "cannot load without an NVIDIA driver"),
        ({"fbgemm-gpu-cpu": None}, False, "fbgemm none"),
        ({"torchrec": None}, True, "torchrec none"),
        ({}, True, "the CPU build of fbgemm, but there is an NVIDIA driver"),
    ],
)
def test_versions_that_do_not_go_together_are_named(change, driver, problem):
    packages = {name: version for name, version in (TRIPLE | change).items() if version}
    finding = doctor.check_versions(packages, driver)
    assert not finding.ok
    assert problem in finding.detail
    assert f"requirements/{'cuda' if driver else 'cpu'}.txt" in finding.fix


def test_the_cuda_build_is_right_where_there_is_a_driver():
    packages = {"torch": "2.14.1+cu130", "torchrec": "1.9.2", "fbgemm-gpu": "1.9.0"}
    assert doctor.check_versions(packages, driver=True).ok


def nvidia_smi(folder: Path, monkeypatch, answer: str) -> None:
    """Put a driver that answers so on PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    "driver, capability, faults",
    [
        ("580.95.05", "9.0", {}),
        ("580.95.05", "8.6", {}),
        ("550.54.14", "8.0", {"driver": "driver 550.54.14; CUDA 13 needs 580 or later"}),
        ("580.95.05", "7.5", {"capability": "T4, a card (0) has 7.5; the wheel of fbgemm-gpu"}),
        ("590.1", "12.0", {"capability": "compiled for sm_80, sm_90, sm_100"}),
    ],
)
def test_gpus_and_drivers_that_cannot_work_are_named(driver, capability, faults, tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, f"0, {driver}, {capability}, T4, a card")
    gpus = doctor_gpus.ask_driver()
    assert gpus is not None
    found = {finding.check: finding for finding in doctor_gpus.examine(gpus)}
    assert {check for check, finding in found.items() if not finding.ok} == set(faults)
    for check, words in faults.items():
        assert words in found[check].detail and found[check].fix


def test_a_driver_that_does_not_answer_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_gpus.ask_driver() is None


def test_a_gpu_that_computes_wrong_is_named():
    finding = doctor_gpus.check_training(2, lambda device: (device == "cuda:0", "a lookup failed"))
    assert not finding.ok and finding.detail == "cuda:1: a lookup failed"


@pytest.mark.slow
def test_the_training_step_of_a_gpu_runs_on_a_cpu_too():
    assert doctor.outcome(doctor.start(doctor_gpus.TRAINING, "cpu")) == (True, "")


@pytest.mark.slow
def test_a_library_that_cannot_load_is_named(tmp_path: Path, monkeypatch):
    (tmp_path / "fbgemm_gpu.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_script("lookup", doctor.LOOKUP, "install it again")
    assert not finding.ok
    problem = "OSError: libcuda.so.1: cannot open shared object file"
    assert finding.detail == f"loading fbgemm_gpu failed: {problem}"
    assert finding.fix == "install it again"


def test_a_library_that_crashes_is_named():
    script = "import os; print('@loading it', flush=True); os.abort()"
    finding = doctor.check_script("lookup", script, "fix")
    assert (finding.ok, finding.detail) == (False, "loading it crashed with signal 6")


def test_a_check_that_hangs_ends():
    process = doctor.start(
        "import signal, sys; print('@waiting', flush=True); print(file=sys.stderr); signal.pause()"
    )
    assert process.stderr.readline() == "\n"
    assert doctor.outcome(process, timeout=1) == (False, "waiting takes more than 1 s")


def test_two_checkouts_in_one_environment_are_told_apart(tmp_path: Path, monkeypatch):
    (tmp_path / "mim_torchrec").mkdir()
    (tmp_path / "mim_torchrec" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    finding = doctor.check_script("package", doctor.PACKAGE, "")
    assert not finding.ok
    assert "two checkouts share this environment" in finding.detail


def test_a_failing_rank_is_named():
    script = "import sys; print('@starting'); assert sys.argv[2] == '0', 'no address'; print('=')"
    finding = doctor.check_group("gloo", 2, script)
    assert finding.detail == "rank 1: starting failed: AssertionError: no address"
    assert "GLOO_SOCKET_IFNAME" in finding.fix and "GLOO_SOCKET_IFNAME=lo" not in finding.fix


def test_too_little_disk_is_said():
    finding = doctor.check_disk(doctor.MIN_DISK - 1, Path("runs"))
    assert not finding.ok
    assert "free in runs" in finding.detail


def test_too_little_memory_is_said():
    finding = doctor.check_memory(doctor.GIB)
    assert not finding.ok
    assert "1x1" in finding.fix


def test_mim_names_a_command_it_does_not_have(capsys):
    assert status_of(["sctr"]) == 2
    assert "no command 'sctr'" in capsys.readouterr().err


def test_mim_help_lists_every_command(capsys):
    assert status_of(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [command for command in cli.COMMANDS if command not in shown] == []


def test_mim_hands_on_its_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mim"])
    received = []
    monkeypatch.setattr(doctor, "main", received.append)
    assert status_of(["doctor", "--json"]) == 0
    assert received == [["--json"]]
