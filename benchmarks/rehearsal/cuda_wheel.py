"""Whether fbgemm's build for CUDA has a kernel for every operator that we call: `make cuda-check`.

The operators are those that `make rehearsal` has seen on the pretended GPU. To be loaded, the build needs the
driver's management library and no GPU. A library of that name, with the functions that the build asks for,
takes its place in a process of its own. No kernel runs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mim_torchrec import program
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import SetupError

DRIVER = "libnvidia-ml.so.1"
KEYS = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
SCRIPT = """
import json, sys
import torch, fbgemm_gpu
operators, keys = map(json.loads, sys.argv[1:])
known, has = set(torch._C._dispatch_get_all_op_names()), torch._C._dispatch_has_kernel_for_dispatch_key
missing = [name for name in operators if name not in known or not any(has(name, key) for key in keys)]
print(json.dumps([fbgemm_gpu.__file__, missing]))
"""
"""Of a process without this package, which refuses two builds of fbgemm side by side."""


@dataclass(frozen=True, kw_only=True)
class WheelConfig:
    """Look for the kernels of fbgemm's operators, and write a report."""

    rehearsal: Path = Path("runs/rehearsal/report.json")
    """Report of `make rehearsal`, which names the operators."""
    wheel: Path | None = None
    """The wheel of fbgemm-gpu; by default the build that is installed is looked at."""
    out: Path = Path("runs/cuda_wheel")
    """Directory of report.json."""


def operators_of(rehearsal: Path) -> list[str]:
    """Operators of fbgemm that a rehearsal has seen.

    Raises:
        SetupError: there is no report, or it names none.
    """
    try:
        found = json.loads(rehearsal.read_text()).get("fbgemm")
    except FileNotFoundError:
        found = None
    if not found:
        raise SetupError(f"{rehearsal}: no operators of fbgemm; run make rehearsal first")
    return found


def without_kernel(operators: Sequence[str], wheel: Path | None = None) -> list[str]:
    """Those of the operators that fbgemm has no kernel of GPUs for.

    Args:
        operators: by their names.
        wheel: of fbgemm; None is the build that is installed.

    Raises:
        SetupError: the build cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), dict(os.environ)
        if wheel is not None:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(folder / "build")
            libraries = [str(stand_in_for_driver(folder / "build", folder))]
            libraries += filter(None, [environment.get("LD_LIBRARY_PATH")])
            environment |= {
                "PYTHONPATH": str(folder / "build"), "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            }  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(list(operators)), json.dumps(KEYS)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        what = wheel or "fbgemm"
        if run.returncode:
            raise SetupError(f"{what} cannot be loaded: {run.stderr.strip().splitlines()[-1]}")
        loaded, missing = json.loads(run.stdout.splitlines()[-1])
        if wheel is not None and not loaded.startswith(name):
            raise SetupError(f"{what}: {loaded} was loaded in its place")
        return missing


def stand_in_for_driver(build: Path, folder: Path) -> Path:
    """Make a library with the names that a build asks the driver's management library for.

    Returns:
        The folder that it is in.

    Raises:
        SetupError: there is no C compiler.
    """
    text = b"".join(path.read_bytes() for path in build.glob("fbgemm_gpu/fbgemm_gpu_py.so"))
    names = sorted(set(re.findall(rb"\x00(nvml[A-Z]\w*)(?=\x00)", text)))
    source, library = folder / "driver.c", folder / "driver" / DRIVER
    source.write_text("".join(f"int {name.decode()}(void) {{ return 1; }}\n" for name in names))
    library.parent.mkdir()
    words = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), str(source)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise SetupError(f"{DRIVER} cannot be stood in for: {error}; install a C compiler") from error
    return library.parent


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.rehearsal.cuda_wheel`."""
    config = tyro.cli(WheelConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    operators = operators_of(config.rehearsal)
    missing = without_kernel(operators, config.wheel)
    config.out.mkdir(parents=True, exist_ok=True)
    build = config.wheel.name if config.wheel is not None else "installed"
    write_json(
        config.out / "report.json", {"build": build, "operators": operators, "without_kernel": missing}
    )
    for name in operators:
        print(f"{name}: {'no kernel' if name in missing else 'has a kernel'}")
    if missing:
        raise SetupError(f"{build}: {len(missing)} of {len(operators)} operators have no kernel for a GPU")


if __name__ == "__main__":
    program.run(main)
