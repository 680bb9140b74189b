"""`make` works in a folder whose name has spaces, and installs what is missing and no more."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/bin/sh
# stands for the interpreter of an environment: says what it was called with
echo "$*" >> "$(dirname "$0")/calls"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout as far as make reads it, and an environment with an interpreter that installs nothing."""
    folder = tmp_path / "a folder" / "mim torchrec"
    (folder / "my env" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("Makefile", "setup.cfg"):
        shutil.copy(ROOT / name, folder)
    python = folder / "my env" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return folder


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False)


def calls(folder: Path) -> list[str]:
    """What the interpreter was called with since the last call of this."""
    log = folder / "my env" / "bin" / "calls"
    found = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def targets() -> list[str]:
    """Every target that `make help` lists."""
    return re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_help_lists_the_targets(checkout):
    shown = make(checkout, "help")
    assert shown.returncode == 0, shown.stderr
    assert {"install", "demo", "test", "lint"} <= {line.split()[0] for line in shown.stdout.splitlines()}


def test_paths_with_spaces_are_one_word(checkout):
    shown = make(checkout, "-n", *targets(), "VENV=my env", "DATA=my data", "PYTHON=python3")
    assert shown.returncode == 0, shown.stderr
    words = [word for line in shown.stdout.splitlines() for word in shlex.split(line)]
    assert f"{checkout}/my env/bin/python" in words
    assert [word for word in words if word == "my" or word.endswith(("/my", "/a"))] == []


def test_install_does_what_is_missing_and_no_more(checkout):
    made = make(checkout, "install", "VENV=my env")
    assert made.returncode == 0, made.stderr
    first = calls(checkout)
    uninstalled, packages, compiled, checked_out = first
    assert "pip uninstall" in uninstalled
    assert re.search(r"--no-deps --no-compile -r requirements/(cpu|cuda).txt$", packages)
    assert "compileall" in compiled and compiled.endswith(" my env/lib")
    assert checked_out.endswith("--no-deps --no-build-isolation -e .")
    assert make(checkout, "install", "VENV=my env").returncode == 0
    assert calls(checkout) == []
    with (checkout / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    assert make(checkout, "install", "VENV=my env").returncode == 0
    assert [words.split()[-1] for words in calls(checkout)] == ["."]
    for lock in ("cpu", "cuda"):
        with (checkout / "requirements" / f"{lock}.txt").open("a") as file:
            file.write("# changed\n")
    assert make(checkout, "install", "VENV=my env").returncode == 0
    assert len(calls(checkout)) == 4


def test_an_environment_outside_the_checkout_is_used(checkout):
    (checkout / "my env" / "bin" / "mim").symlink_to("python")
    made = make(checkout, "doctor", f"VENV={checkout / 'my env'}")
    assert made.returncode == 0, made.stderr
    assert calls(checkout)[-1] == "doctor"


@pytest.mark.parametrize(
    "python, problem", [("", "no Python 3.11, 3.12 or 3.13 found"), ("false", "false is not")]
)
def test_another_python_is_refused(checkout, python, problem):
    made = make(checkout, "install", "VENV=another env", f"PYTHON={python}")
    assert made.returncode == 2
    assert problem in made.stderr
    assert not (checkout / "another env").exists()
