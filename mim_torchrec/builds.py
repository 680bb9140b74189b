"""Which builds of torch, torchrec and fbgemm go together; `docs/versions.md` has what was tested.

fbgemm is compiled for one torch. torchrec depends on `fbgemm-gpu`, the CUDA build, which cannot load without
a driver; `fbgemm-gpu-cpu` replaces it on other machines. Both install the package `fbgemm_gpu`. This module
needs only Python, and imports none of the three.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
PACKAGES = ("torch", "torchrec", *FBGEMM)


class IncompatibleBuilds(ImportError):
    """The installed builds of torch, torchrec and fbgemm do not go together."""


def installed() -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def conflict(packages: Mapping[str, str]) -> str | None:
    """Say why builds do not go together, or return None.

    torchrec 1.n, fbgemm 1.n and torch 2.(n + 5) are of one release. A package that is missing is no conflict.

    Args:
        packages: version by package.

    >>> conflict({"torch": "2.15.0", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"})
    'of different releases: torchrec 1.9.2 goes with fbgemm 1.9 and torch 2.14'
    """
    builds = [build for build in FBGEMM if build in packages]
    if len(builds) == len(FBGEMM):
        return "overwrite each other's files"
    if "torchrec" not in packages:
        return None
    minor = _release(packages["torchrec"])[1]
    wanted = {"torchrec": (1, minor), "torch": (2, minor + 5), **{build: (1, minor) for build in builds}}
    if any(_release(packages[name]) != release for name, release in wanted.items() if name in packages):
        together = f"torchrec {packages['torchrec']} goes with fbgemm 1.{minor} and torch 2.{minor + 5}"
        return f"of different releases: {together}"
    return None


def check_builds() -> None:
    """Refuse an environment whose builds do not go together, before one of them crashes or fails to load.

    Raises:
        IncompatibleBuilds: they do not; the message says which.
    """
    packages = installed()
    problem = conflict(packages)
    if problem is not None:
        names = ", ".join(f"{name} {number}" for name, number in packages.items())
        raise IncompatibleBuilds(f"{names}: {problem}; `mim doctor` prints the commands that fix it")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)
