"""The packages as they are installed: complete, layered, free of machine paths, and every program starts."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from mim_torchrec import cli

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "mim_torchrec": "mim_torchrec",
    "benchmarks": "mim_torchrec.benchmarks",
    "embeddings": "mim_torchrec.embeddings",
    "launch": "mim_torchrec.launch",
}
STAGES = {"prepare", "validate", "pretraining", "csft", "representation", "ctr"}
BASE = {"domains", "errors", "program", "progress", "quiet"}
PARTS = {"encoders", "losses", "ciubm", "data", "training"}
SERVICES = {"rim", "serving"}
TOP = {"launch", "pipeline", "cli", "doctor", "doctor_gpus", "doctor_nodes"}
BOTTOM = {"embeddings", "builds", "extensions", "extras", "findings", "hosts", "lazy", "links", "toml_files",
          "version"}  # fmt: skip
STANDALONE = {
    f"mim_torchrec{name}"
    for name in (
        "",
        ".cli",
        ".doctor",
        ".doctor_gpus",
        ".builds",
        ".errors",
        ".extras",
        ".findings",
        ".lazy",
        ".program",
    )
}
BENCHMARK_ROOMS = [
    {"harness", "measures"},
    {"paper", "speed", "chaos", "parity", "rehearsal"},
    {"cluster", "gpu"},
    {"records"},
]
DRAWING = {"matplotlib", "jinja2"}

WHERE = """
import json
import mim_torchrec, mim_torchrec.benchmarks, mim_torchrec.embeddings, mim_torchrec.launch
packages = (mim_torchrec, mim_torchrec.benchmarks, mim_torchrec.embeddings, mim_torchrec.launch)
print(json.dumps([m.__file__ for m in packages]))
"""
LIGHT = ["mim_torchrec.cli", "mim_torchrec.doctor", "mim_torchrec.data.shop"]  # that load in a second


def sources() -> dict[str, Path]:
    """Every module of the packages by its installed name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


SOURCES = sources()
PROGRAMS = [name for name, path in SOURCES.items() if '__name__ == "__main__"' in path.read_text()]
# of the benchmarks, tests/pipeline/test_bench.py starts every one from the checkout
STARTED = [name for name in PROGRAMS if not name.startswith("mim_torchrec.benchmarks.")]
STARTED += ["mim_torchrec.benchmarks.paper.demo", "mim_torchrec.benchmarks.records.bench"]


def layer(module: str) -> int:
    """0 for the bottom: a module may import from its own layer and those below; the package is the top."""
    names = module.split(".")[1:]
    if not names:
        return 5
    if names[0] == "benchmarks":
        return 6 + benchmark_layer(module)
    layers = [BASE, BOTTOM, PARTS, STAGES, SERVICES, TOP]
    return next(number for number, members in enumerate(layers) if names[0] in members)


def benchmark_layer(module: str) -> int:
    """As `layer`, among the rooms of the benchmarks; rooms of one layer do not import each other."""
    rooms = module.split(".")[2:3]
    return next((n for n, members in enumerate(BENCHMARK_ROOMS) if rooms and rooms[0] in members), 0)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether it is imported when the file is."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "mim_torchrec":
                names = [f"mim_torchrec.{alias.name}" for alias in node.names]
        yield from ((name, node in tree.body) for name in names)


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    assert sorted(packages) == sorted(n for n, path in SOURCES.items() if path.name == "__init__.py")


def test_every_folder_with_modules_is_a_package():
    assert [path for path in SOURCES.values() if not (path.parent / "__init__.py").exists()] == []


def test_no_file_has_more_than_400_lines():
    files = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert [file for file in files if len(file.read_text().splitlines()) > 400] == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_downwards_only(module):
    for name, _ in imports(SOURCES[module]):
        assert name.split(".")[0] not in ("embeddings", "launch", "benchmarks", "tests"), f"imports {name}"
        if name.startswith("mim_torchrec"):
            assert layer(name) <= layer(module), f"{module} must not import {name}"
        rooms = [one.split(".")[2] for one in (name, module) if one.startswith("mim_torchrec.benchmarks.")]
        if len(set(rooms)) == 2:
            assert benchmark_layer(name) < benchmark_layer(module), f"{module} must not import {name}"


@pytest.mark.parametrize("module", [name for name in SOURCES if ".embeddings.sharded" in name])
def test_the_sharded_embeddings_need_nothing_else_of_the_project(module):
    own = {name for name, _ in imports(SOURCES[module]) if name.split(".")[0] == "mim_torchrec"}
    assert [name for name in own if not name.startswith("mim_torchrec.embeddings.")] == []


@pytest.mark.parametrize("module", [m for m in SOURCES if not m.startswith("mim_torchrec.benchmarks")])
def test_only_benchmarks_draw(module):
    assert {name.split(".")[0] for name, _ in imports(SOURCES[module])}.isdisjoint(DRAWING)


def test_a_benchmark_without_what_it_draws_with_names_the_extra(tmp_path: Path):
    code = (
        "import importlib.util as u; known = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'matplotlib' else known(name, *more); "
        "import mim_torchrec.benchmarks"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "no module 'matplotlib'" in done.stderr and "mim-torchrec[report]" in done.stderr


def imported_modules(module: str) -> set[str]:
    """Modules of the packages that a module imports, at once or within a function."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in members}
    return found & SOURCES.keys()


def circles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Paths of imports that end where they began; none where the graph has an order."""
    try:
        list(TopologicalSorter(imported).static_order())
    except CycleError as error:
        return [error.args[1]]
    return []


def test_a_circle_of_imports_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    (found,) = circles(graph)
    assert found[0] == found[-1] and set(found) == {"a", "b", "c"}


def test_no_modules_import_each_other_in_a_circle():
    assert circles({module: imported_modules(module) for module in SOURCES}) == []


@pytest.mark.parametrize("module", sorted(STANDALONE))
def test_the_doctor_loads_where_no_library_does(module):
    names = {name for name, at_once in imports(SOURCES[module]) if at_once}
    ours = {name for name in names if name.startswith("mim_torchrec")}
    assert {name.rpartition(".")[0] if name not in SOURCES else name for name in ours} <= STANDALONE
    assert {name.split(".")[0] for name in names - ours} <= set(sys.stdlib_module_names)


def test_every_command_has_a_program():
    assert {module for module, _ in cli.COMMANDS.values()} <= set(PROGRAMS)


@pytest.mark.parametrize("module", STARTED)
def test_every_program_has_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(module).main(["--help"])
    assert not ended.value.code
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_program_ends_errors_as_all_do(module):
    (ending,) = re.findall(r'^if __name__ == "__main__":\n((?:    .*\n)+)', SOURCES[module].read_text(), re.M)
    if module == "mim_torchrec.cli":
        assert ending == "    main()\n"
    else:
        assert ending in ("    run(main)\n", "    program.run(main)\n")


def python(folder: Path, search: Path | None, *words: str) -> str:
    """What Python prints in a folder, with another one before those of the packages."""
    result = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": "" if search is None else str(search)},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def start(folder: Path, search: Path | None) -> list[Path]:
    """`--help` of some programs, as `python -m` from a folder; returns where the packages were found."""
    for module in LIGHT:
        assert "usage" in python(folder, search, "-m", module, "--help")
    return [Path(file).parent for file in json.loads(python(folder, search, "-c", WHERE))]


def test_programs_start_from_the_checkout():
    assert start(ROOT, None) == [ROOT / folder for folder in FOLDERS]


def installed(module: str, path: Path) -> str:
    """The file of a module in a wheel."""
    return module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_starts(tmp_path: Path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.png")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "-w", str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    unpacked, elsewhere = tmp_path / "unpacked", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(unpacked)
    assert modules == {installed(name, path) for name, path in SOURCES.items()}
    elsewhere.mkdir()
    package = unpacked / "mim_torchrec"
    folders = [package, *(package / name for name in ("benchmarks", "embeddings", "launch"))]
    assert start(elsewhere, unpacked) == folders
    assert (package / "benchmarks" / "results" / "small.json").exists()
    top = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"mim_torchrec"}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize(
    "what, pattern",
    [
        ("a path of one machine", r"(?<![\w.~<>*)}\]-])/(?:home|root|work|tmp|mnt|opt|Users|workspace)/\w"),
        (
            "an address of a registry",
            r"(?i)https?://\S*(?:pypi|/simple\b|download\.pytorch|artifact|conda\.)",
        ),
        ("an option that names a registry", r"--(?:extra-)?index-url|--find-lin[k]s"),
    ],
)
def test_no_tracked_file_holds(what, pattern):
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == [], f"{what} in a tracked file"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_lock_files_pin_every_package_to_one_version(kind):
    lines = (ROOT / "requirements" / f"{kind}.txt").read_text().splitlines()[1:]
    pin = r"[a-z0-9-]+==[\w.]+( ; python_full_version < \"[\d.]+\")?"
    assert [line for line in lines if not re.fullmatch(pin, line)] == []


def test_lock_files_are_for_every_supported_patch_version_of_python():
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    needed = [line for line in lines if line.startswith("async-timeout==")]  # by redis on Debian 12's Python
    assert [line.partition(" ; ")[2] for line in needed] == ['python_full_version < "3.11.3"']


def test_lock_files_differ_in_the_build_of_fbgemm_only():
    files = (ROOT / "requirements" / f"{kind}.txt" for kind in ("cpu", "cuda"))
    cpu, cuda = (set(file.read_text().splitlines()) for file in files)
    assert {line.split("==")[0] for line in cpu ^ cuda} == {"fbgemm-gpu-cpu", "fbgemm-gpu"}
