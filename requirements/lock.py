"""Write the complete lock files from the environment this runs in: `make lock`.

They are installed with `pip install --no-deps`, because torchrec depends on the CUDA build of fbgemm, which
cannot load without a driver. cuda.txt differs from cpu.txt in that one package. A package that only some of
the supported Pythons need has a marker; it has to be installed here all the same.
"""

from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
ROOTS = ["mim-torchrec", "fbgemm-gpu-cpu", "setuptools", "wheel", "packaging", "pip"]
FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
EXTRAS = {"mim-torchrec": ["docs", "test"]}  # test has all the others
PYTHONS = ["3.11.0", "3.11.3", "3.12.0", "3.13.0"]
"""The supported Pythons, and patch versions at which a package needs something else."""


def closure(python: str) -> dict[str, str | None]:
    """Every package that the roots need on a Python, by canonical name, with a marker if not all do."""
    at = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    found: dict[str, str | None] = {}
    waiting = [(name, tuple(EXTRAS.get(name, ())), None) for name in ROOTS]
    seen = set()
    while waiting:
        name, extras, marker = waiting.pop()
        if (name, extras) in seen or name == FBGEMM["cuda"]:
            continue
        seen.add((name, extras))
        found.setdefault(name, marker)
        for line in requirements(name):
            requirement = Requirement(line)
            environments = [at | {"extra": extra} for extra in extras] or [at | {"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                needed = str(requirement.marker) if "python" in str(requirement.marker) else marker
                waiting.append(
                    (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)), needed)
                )
    return found


def requirements(name: str) -> list[str]:
    """Requirements of an installed package."""
    if name not in INSTALLED:
        raise SystemExit(f"{name} is needed but not installed: pip install it, then run this again")
    return distribution(name).requires or []


INSTALLED = {canonicalize_name(d.metadata["Name"]) for d in distributions()}


def lock() -> dict[str, str]:
    """The line of every package, by its name."""
    by_python = [closure(python) for python in PYTHONS]
    lines = {}
    for name in sorted(set().union(*by_python)):
        line = f"{name}=={distribution(name).version.split('+')[0]}"
        needed = [found for found in by_python if name in found]
        if len(needed) < len(PYTHONS):
            line += f" ; {needed[0][name]}"
        lines[name] = line
    return lines


def main() -> None:
    """Write both lock files."""
    lines = lock()
    for name in ("mim-torchrec", "pip"):
        lines.pop(name)
    fbgemm = lines.pop(FBGEMM["cpu"])
    for kind, package in FBGEMM.items():
        pins = lines | {package: fbgemm.replace(FBGEMM["cpu"], package)}
        text = "\n".join(["# Written by `make lock`; install with pip install --no-deps -r",
                          *(pins[name] for name in sorted(pins))])  # fmt: skip
        (HERE / f"{kind}.txt").write_text(text + "\n")
        print(f"requirements/{kind}.txt: {len(pins)} packages")


if __name__ == "__main__":
    main()
