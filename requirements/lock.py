"""Write the complete lock files from the environment this runs in: `make lock`.

They are installed with `pip install --no-deps`, because torchrec depends on the CUDA build of fbgemm, which
cannot load without a driver. cuda.txt differs from cpu.txt in that one package.
"""

from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
ROOTS = ["mim-torchrec", "fbgemm-gpu-cpu", "setuptools", "wheel", "packaging", "pip"]
FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
EXTRAS = {"mim-torchrec": ["docs", "encoders", "test"]}


def closure() -> dict[str, str]:
    """Version of every installed package that the roots need, by canonical name."""
    installed = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    found: dict[str, str] = {}
    waiting = [(name, tuple(EXTRAS.get(name, ()))) for name in ROOTS]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or name == FBGEMM["cuda"]:
            continue
        seen.add((name, extras))
        if name not in installed:
            raise SystemExit(f"{name} is needed but not installed: pip install it, then run this again")
        package = distribution(name)
        found[name] = package.version
        for line in package.requires or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                waiting.append((canonicalize_name(requirement.name), tuple(sorted(requirement.extras))))
    return found


def main() -> None:
    """Write both lock files."""
    versions = closure()
    for name in ("mim-torchrec", "pip"):
        versions.pop(name)
    fbgemm = versions.pop(FBGEMM["cpu"])
    for kind, package in FBGEMM.items():
        pins = versions | {package: fbgemm}
        lines = [f"{name}=={pins[name].split('+')[0]}" for name in sorted(pins)]
        text = "# Written by `make lock`; install with pip install --no-deps -r\n" + "\n".join(lines) + "\n"
        (HERE / f"{kind}.txt").write_text(text)
        print(f"requirements/{kind}.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
