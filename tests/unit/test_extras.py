"""Every room imports with its extras alone, and names the extra that is missing."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mim_torchrec.builds import FBGEMM, conflict
from mim_torchrec.extras import EXTRAS, MissingExtra, needs, require
from tests.unit.test_packaging import SOURCES

NEEDS_REDIS = ("windows.redis_connection", "windows.redis_log", "stores.redis_store", "stores.main")
NEEDS_FUXICTR = ("ctr_throughput", "fuxictr_models", "scaling")
PROMISES = {
    (): ["embeddings", "ciubm", "losses", "ctr.model", "ctr.config", "data.batch", "data.requests"],
    ("redis",): ["embeddings"],
    ("train",): ["ctr", "data", "training"],
    ("encoders",): ["encoders"],
    ("encoders", "train"): ["csft", "pretraining", "representation", "rim"],
    ("serving",): ["serving"],
    ("prepare",): ["prepare"],
    ("launch",): ["launch", "pipeline"],
    ("launch", "mlflow"): ["pipeline"],
    ("all",): ["benchmarks"],
}
"""What imports with core and these extras: every module of these rooms."""

OF_ENCODERS = ("csft", "encoders", "pretraining", "representation", "rim")
ROOMS = {
    **{f"mim_torchrec.{room}": "encoders" for room in OF_ENCODERS},
    "mim_torchrec.prepare": "prepare",
    "mim_torchrec.serving": "serving",
    "mim_torchrec.launch": "launch",
    "mim_torchrec.pipeline": "launch",
    "mim_torchrec.training.loop": "train",
    "mim_torchrec.data.images": "train",
    "mim_torchrec.embeddings.stores.redis_store": "redis",
}
"""The extra that a room asks for where it is missing."""

IMPORT = """
import json, os, sys
from importlib import import_module
shared, cases = json.load(sys.stdin)
blocked = set(cases[0][0])

class Blocking:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if path is None and name in blocked:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Blocking(finder) for finder in sys.meta_path]
for module in shared:
    import_module(module)
for still_blocked, modules in cases:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, modules
        continue
    blocked.intersection_update(still_blocked)
    failed = {}
    for module in modules:
        try:
            import_module(module)
        except Exception as error:
            failed[module] = f"{type(error).__name__}: {error}"
    print("=" + json.dumps(failed), flush=True)
    os._exit(0)
"""


def packages_of(*extras: str) -> set[str]:
    """Names of all packages that mim-torchrec with these extras depends on, directly or not."""
    found: set[str] = set()
    waiting = [("mim-torchrec", frozenset(extras))]
    seen = set()
    while waiting:
        name, chosen = waiting.pop()
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            wanted = canonicalize_name(requirement.name)
            if wanted == "fbgemm-gpu":  # one of its builds is installed, which one depends on the machine
                found |= {"fbgemm-gpu", "fbgemm-gpu-cpu"}
                continue
            environments = [{"extra": extra} for extra in chosen] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                waiting.append((wanted, frozenset(requirement.extras)))
    return found


def modules_of(packages: set[str]) -> set[str]:
    """Top-level modules of packages."""
    provided = packages_distributions().items()
    return {module for module, names in provided if packages & {canonicalize_name(name) for name in names}}


def promised(extras: tuple[str, ...]) -> list[str]:
    """Modules of the rooms that import with core and these extras."""
    rooms = tuple(f"mim_torchrec.{room}" for room in PROMISES[extras])
    left_out = {f"mim_torchrec.benchmarks.speed.{name}" for name in NEEDS_FUXICTR}
    if "mlflow" not in extras:
        left_out |= {"mim_torchrec.pipeline.tracking"}
    if not {"redis", "all"} & set(extras):
        left_out |= {f"mim_torchrec.embeddings.{name}" for name in NEEDS_REDIS}
    return [name for name in SOURCES if f"{name}.".startswith(tuple(f"{room}." for room in rooms))
            and name not in left_out]  # fmt: skip


@pytest.fixture(scope="module")
def failed() -> list[dict[str, str]]:
    """Errors by module, where only core and the extras of a promise can be found; last, of `ROOMS` with core.

    Each has a process of its own, forked from one that has loaded torchrec where only core can be found.
    """
    cases = [(extras, promised(extras)) for extras in PROMISES] + [((), list(ROOMS))]
    assert all(modules for _, modules in cases)
    blocked = [
        sorted(set(packages_distributions()) - modules_of(packages_of(*extras))) for extras, _ in cases
    ]
    given = ["torchrec"], [(names, modules) for names, (_, modules) in zip(blocked, cases, strict=True)]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in re.findall("^=(.*)$", result.stdout, re.MULTILINE)]
    assert len(found) == len(cases)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("extras", PROMISES, ids="+".join)
def test_rooms_import_with_their_extras_alone(failed, extras):
    assert failed[list(PROMISES).index(extras)] == {}


@pytest.mark.slow
def test_every_other_room_names_the_extra_that_is_missing(failed):
    named = {room: re.findall(r"^MissingExtra: .*\[(.*)\]'$", error) for room, error in failed[-1].items()}
    assert named == {room: [extra] for room, extra in ROOMS.items()}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_the_modules_that_it_is_for(extra):
    assert set(EXTRAS[extra]) <= modules_of(packages_of(extra))


def test_core_brings_no_optional_package():
    optional = {module for modules in EXTRAS.values() for module in modules}
    assert modules_of(packages_of()) & optional == {"jinja2"}  # torch depends on it


def test_a_missing_package_is_an_error_that_names_its_extra(monkeypatch):
    monkeypatch.setitem(EXTRAS, "redis", ("no_such_module",))
    with pytest.raises(
        MissingExtra, match=r"no module 'no_such_module': .* 'mim-torchrec\[redis\]'"
    ) as caught:
        require("redis")
    assert caught.value.name == "no_such_module"
    with pytest.raises(MissingExtra, match=r"mim-torchrec\[serving\]"), needs("serving"):
        import no_such_module  # noqa: F401


@pytest.mark.parametrize("packages, problem", [
    ({"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}, None),
    ({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, None),
    ({"torch": "2.15.0", "torchrec": "1.9.2", "fbgemm-gpu": "1.9.0"}, "of different releases"),
    ({"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu": "1.8.0"}, "of different releases"),
    ({"torch": "2.14.1", "fbgemm-gpu-cpu": "1.9.0", "fbgemm-gpu": "1.9.0"}, "overwrite each other's files"),
    ({}, None),
])  # fmt: skip
def test_builds_of_one_release_go_together(packages, problem):
    found = conflict(packages)
    assert found == problem if problem is None else problem in found


def test_the_embeddings_refuse_both_builds_of_fbgemm(tmp_path: Path):
    for build in FBGEMM:
        about = tmp_path / f"{build.replace('-', '_')}-1.9.0.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 1.9.0\n")
    done = subprocess.run(
        [sys.executable, "-c", "import mim_torchrec.embeddings"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "IncompatibleBuilds: " in done.stderr
    assert "fbgemm-gpu 1.9.0, fbgemm-gpu-cpu 1.9.0: overwrite each other's files; `mim doctor`" in done.stderr
