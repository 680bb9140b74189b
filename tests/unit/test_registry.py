"""The extras resolve against the package registry to builds that go together, on every supported Python."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mim_torchrec.builds import PACKAGES, conflict
from mim_torchrec.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.11", "3.12", "3.13"]

pytestmark = [pytest.mark.slow, pytest.mark.registry]


def compile_pins(*words: str) -> subprocess.CompletedProcess[str]:
    """Ask the registry for the versions that uv would install."""
    from uv import find_uv_bin

    environment = {**os.environ, "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never"}
    if "PIP_CERT" in environment:
        environment.setdefault("SSL_CERT_FILE", environment["PIP_CERT"])
    options = ["--no-header", "--no-annotate", "--no-config", "--no-build-isolation"]
    return subprocess.run(
        [find_uv_bin(), "pip", "compile", *options, "--python", sys.executable, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registry(tmp_path_factory):
    """Skip where the registry cannot be asked."""
    if find_spec("uv") is None:
        pytest.skip("uv is not installed (extra `test`)")
    wanted = tmp_path_factory.mktemp("registry") / "one.in"
    wanted.write_text("tqdm\n")
    asked = compile_pins(str(wanted))
    if asked.returncode:
        pytest.skip(f"the package registry cannot be reached: {asked.stderr.strip().splitlines()[0]}")


def resolve(python: str, *words: str) -> dict[str, str]:
    """Versions of all packages, by name."""
    compiled = compile_pins("--python-version", python, *words, "setup.cfg")
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", compiled.stdout, re.MULTILINE))


def builds(pins: dict[str, str]) -> dict[str, str]:
    return {name: pins[name] for name in PACKAGES if name in pins}


@pytest.mark.parametrize("extra", [None, *EXTRAS, "all"])
def test_an_extra_resolves_to_builds_that_go_together(extra):
    pins = resolve("3.11", *(["--extra", extra] if extra else []))
    assert set(builds(pins)) == {"torch", "torchrec", "fbgemm-gpu"}
    assert conflict(builds(pins)) is None


@pytest.mark.parametrize("python", PYTHONS)
def test_the_cpu_build_replaces_the_other_one_with_overrides(python):
    pins = resolve(
        python, "--extra", "cpu", "--extra", "all", "--overrides", "requirements/cpu-overrides.txt"
    )
    assert set(builds(pins)) == {"torch", "torchrec", "fbgemm-gpu-cpu"}
    assert conflict(builds(pins)) is None


def test_the_cpu_extra_alone_brings_builds_that_are_refused():
    assert conflict(builds(resolve("3.11", "--extra", "cpu"))) == "overwrite each other's files"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lower_bounds_resolve(python):
    pins = resolve(python, "--extra", "all", "--resolution", "lowest-direct")
    assert (pins["numpy"], pins["tyro"]) == ("2.2.0", "1.0.0")
    assert conflict(builds(pins)) is None


def test_tests_and_documentation_resolve_together():
    assert {"pytest", "sphinx"} <= set(resolve("3.11", "--extra", "test", "--extra", "docs"))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_of_the_lock_files_has_a_wheel(kind, python):
    lock = ROOT / "requirements" / f"{kind}.txt"
    # pure Python that is published as source only
    words = ["--only-binary", ":all:", "--no-binary", "pyspark"]
    compiled = compile_pins("--python-version", python, *words, "--no-deps", str(lock))
    assert compiled.returncode == 0, compiled.stderr[-2000:]
