"""`mim doctor`: is everything there that the stages need, and if not, what is wrong and how is it fixed?

One line a check. What is checked is loaded in processes of its own, so that a library that cannot load, or
that crashes while it does, is a line of the report and not the end of it. This module itself needs only
Python. `--nodes` checks the hosts of a job instead (`doctor_nodes.py`). Not checked: a scheduler, GPU speed.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path

from mim_torchrec import doctor_gpus
from mim_torchrec.builds import FBGEMM, PACKAGES, conflict
from mim_torchrec.errors import Status
from mim_torchrec.extras import EXTRAS, is_installed
from mim_torchrec.findings import Finding
from mim_torchrec.program import run

PYTHONS = ((3, 11), (3, 14))
GIB = 1024**3
MIN_DISK, MIN_MEMORY = 5 * GIB, 3 * GIB
TIMEOUT = 180
MISSING = "none"
# not `make install`: what make has installed once it takes to be there still
REPLACE = "python -m pip install --no-deps -r requirements/{kind}.txt, in a checkout"
REBUILD = f"remove the environment {sys.prefix}, then `make install` in a checkout"
RELINK = "python -m pip install --no-deps --no-build-isolation -e ., in the checkout that is to be used"


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """The interpreter is one that all packages have builds for."""
    text = f"{'.'.join(map(str, version))} at {sys.executable}"
    low, high = ("{}.{}".format(*v) for v in PYTHONS)
    if PYTHONS[0] <= version[:2] < PYTHONS[1]:
        return Finding("python", True, text)
    fix = f"remove the environment, then make PYTHON=python{low}"
    return Finding("python", False, f"{text}, not {low} or later and before {high}", fix)


def installed() -> dict[str, str]:
    """Version of each installed package, by its name in lower case and with dashes."""
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}


def check_versions(packages: Mapping[str, str], driver: bool) -> Finding:
    """torch, torchrec and fbgemm are installed and come from one release, see `builds.py`.

    Args:
        packages: version by package.
        driver: whether there is an NVIDIA driver; without one the CUDA build of fbgemm cannot load.
    """
    name = "versions"
    fix = REPLACE.format(kind="cuda" if driver else "cpu")
    torch, torchrec = packages.get("torch", MISSING), packages.get("torchrec", MISSING)
    builds = [build for build in FBGEMM if build in packages]
    fbgemm = " and ".join(f"{build} {packages[build]}" for build in builds) or f"fbgemm {MISSING}"
    text = f"torch {torch}, torchrec {torchrec}, {fbgemm}"
    if MISSING in (torch, torchrec) or not builds:
        return Finding(name, False, f"not all installed: {text}", fix)
    problem = conflict({package: packages[package] for package in PACKAGES if package in packages})
    if len(builds) == 2:
        both = f"python -m pip uninstall -y {' '.join(builds)}, then {fix}"
        return Finding(name, False, f"{text} {problem}", both)
    if builds == ["fbgemm-gpu"] and not driver:
        lone = f"python -m pip uninstall -y fbgemm-gpu, then {fix}"
        return Finding(name, False, f"{text}: the CUDA build cannot load without an NVIDIA driver", lone)
    if builds == ["fbgemm-gpu-cpu"] and driver:
        lone = f"python -m pip uninstall -y fbgemm-gpu-cpu, then {fix}"
        return Finding(name, False, f"{text}: the CPU build of fbgemm, but there is an NVIDIA driver", lone)
    if problem is not None:
        return Finding(name, False, f"{text} are {problem}", fix)
    return Finding(name, True, text)


def check_extras() -> Finding:
    """Say which extras are installed; a missing one is no fault, but its programs do not start."""
    present = [extra for extra in EXTRAS if is_installed(extra)]
    missing = [extra for extra in EXTRAS if extra not in present]
    text = f"installed: {', '.join(present) or 'none'}"
    return Finding("extras", True, f"{text}; not installed: {', '.join(missing)}" if missing else text)


LOOKUP = """
print("@loading torch", flush=True)
import torch
print("@loading fbgemm_gpu", flush=True)
import fbgemm_gpu
print("@loading torchrec", flush=True)
import torchrec
print("@looking up rows", flush=True)
table = torchrec.EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=8, feature_names=["f"])
collection = torchrec.EmbeddingBagCollection(tables=[table])
bags = torchrec.KeyedJaggedTensor.from_lengths_sync(
    keys=["f"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 0, 1]))
found = collection(bags)["f"]
rows = collection.embedding_bags["t"].weight
expected = torch.stack([rows[1] + rows[2], torch.zeros(4), rows[3]])
torch.testing.assert_close(found, expected)
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 1]))
assert offsets.tolist() == [0, 2, 2, 3], offsets
print("=torch, fbgemm and torchrec load, and a lookup in an EmbeddingBagCollection is right")
"""

ENCODERS = """
print("@loading torch", flush=True)
import torch
print("@loading torchvision", flush=True)
import torchvision
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
assert torchvision.ops.nms(boxes, torch.ones(1), 0.5).tolist() == [0]
print("@loading timm", flush=True)
import timm
print("@loading transformers", flush=True)
import transformers
print(f"=torchvision {torchvision.__version__}, timm {timm.__version__}, "
      f"transformers {transformers.__version__} load")
"""

PACKAGE = """
from pathlib import Path
print("@loading mim_torchrec", flush=True)
import mim_torchrec, mim_torchrec.embeddings
from mim_torchrec.extras import is_installed
package, table = (Path(m.__file__).parent for m in (mim_torchrec, mim_torchrec.embeddings))
assert table in (package / "embeddings", package.parent / "embeddings"), (
    f"mim_torchrec is that of {package.parent}, but mim_torchrec.embeddings that of {table.parent}: "
    "two checkouts share this environment")
if not is_installed("launch"):
    print(f"=mim_torchrec at {package}")
    raise SystemExit
print("@loading torchx", flush=True)
from torchx.specs.finder import get_components
missing = {"mim.csft", "mim.export", "mim.ctr"} - set(get_components())
assert not missing, f"TorchX does not know {sorted(missing)}"
print(f"=mim_torchrec at {package}, its components known to TorchX")
"""

DEVICES = """
print("@loading torch", flush=True)
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print("=" + (", ".join(names) if torch.cuda.is_available() else "no GPU"))
"""

GROUP = """
import sys
from datetime import timedelta
print("@loading torch", flush=True)
import torch
import torch.distributed as dist
backend, rank, size, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
print(f"@starting {backend}", flush=True)
dist.init_process_group(backend, store=dist.FileStore(path, size), rank=rank, world_size=size,
                        timeout=timedelta(seconds=60))
total = torch.full((1,), rank + 1.0, device=device)
dist.all_reduce(total)
assert total.item() == size * (size + 1) / 2, f"the sum over ranks is {total.item()}"
dist.destroy_process_group()
print("=")
"""


def start(script: str, *arguments: str, python: str = sys.executable) -> subprocess.Popen[str]:
    """Start a script in a process of its own; it prints `@<step>` before a step, `=<result>` at its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [python, "-c", script, *arguments],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def outcome(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> tuple[bool, str]:
    """Wait for a script: (True, its result) or (False, what went wrong in which step)."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        return False, f"{_last_step(output)} takes more than {timeout:.0f} s"
    result = [line[1:] for line in output.splitlines() if line.startswith("=")]
    if process.returncode == 0 and result:
        return True, result[-1]
    if process.returncode < 0:
        return False, f"{_last_step(output)} crashed with signal {-process.returncode}"
    messages = [line for line in errors.splitlines() if line and not line.startswith((" ", "Traceback"))]
    return False, f"{_last_step(output)} failed: {messages[-1] if messages else process.returncode}"


def _last_step(output: str) -> str:
    steps = [line[1:] for line in output.splitlines() if line.startswith("@")]
    return steps[-1] if steps else "starting Python"


def check_script(check: str, script: str, fix: str, python: str = sys.executable) -> Finding:
    """The script runs to its end."""
    ok, detail = outcome(start(script, python=python))
    return Finding(check, ok, detail, "" if ok else fix)


def check_devices(driver: bool) -> tuple[Finding, int]:
    """A machine with a driver has GPUs that torch sees; also returns how many."""
    ok, detail = outcome(start(DEVICES))
    gpus = 0 if not ok or detail == "no GPU" else len(detail.split(", "))
    cores = f"{os.cpu_count()} cores"
    if not ok:
        return Finding("devices", False, detail, REBUILD), 0
    if driver and not gpus:
        problem = "nvidia-smi works but torch sees no GPU"
        fix = "a driver for the CUDA of requirements/cuda.txt, and CUDA_VISIBLE_DEVICES unset"
        return Finding("devices", False, f"{problem}, {cores}", fix), 0
    return Finding("devices", True, f"{detail}, {cores}"), gpus


def check_group(backend: str, size: int, script: str = GROUP) -> Finding:
    """`size` real processes add up a number over a process group."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [start(script, backend, str(rank), str(size), store) for rank in range(size)]
        outcomes = [outcome(process) for process in processes]
    problems = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if not problems:
        return Finding(backend, True, f"{size} process{'es' * (size > 1)} summed a tensor")
    named = ", ".join(name for _, name in socket.if_nameindex() if name != "lo") or "none but lo"
    fix = {
        "gloo": "let this host's name resolve to an address of its own, or set GLOO_SOCKET_IFNAME to an "
        f"interface that the other hosts reach ({named}); several hosts are checked by --nodes",
        "nccl": "run again with NCCL_DEBUG=WARN, which names the cause; often /dev/shm is too small",
    }[backend]
    return Finding(backend, False, "; ".join(problems), fix)


def check_disk(free: int, folder: Path) -> Finding:
    """There is room for a run below the current folder."""
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free >= MIN_DISK:
        return Finding("disk", True, text)
    fix = "free some, or run in another folder"
    return Finding("disk", False, f"{text}, a run wants {MIN_DISK // GIB}", fix)


def check_memory(available: int) -> Finding:
    """There is memory for two ranks."""
    text = f"{available / GIB:.1f} GiB available"
    if available >= MIN_MEMORY:
        return Finding("memory", True, text)
    fix = "end other programs, or run one rank (-j 1x1)"
    return Finding("memory", False, f"{text}, two ranks want {MIN_MEMORY // GIB}", fix)


def available_memory() -> int:
    """Bytes that can still be had: the machine's, or less in a container with a limit."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        return min(machine, int(limit.read_text()) - int(used.read_text()))
    return machine


def has_driver() -> bool:
    """Whether there is a working NVIDIA driver, asked as the Makefile does."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0


def examine() -> Iterable[Finding]:
    """All checks, one after the other."""
    driver = has_driver()
    of_driver = doctor_gpus.ask_driver() if driver else None
    yield check_python()
    yield check_versions(installed(), driver)
    yield check_extras()
    yield check_script("lookup", LOOKUP, REBUILD)
    if is_installed("encoders"):
        yield check_script("encoders", ENCODERS, REBUILD)
    yield check_script("package", PACKAGE, RELINK)
    devices, gpus = check_devices(driver)
    yield devices
    if of_driver:
        yield from doctor_gpus.examine(of_driver)
    yield check_group("gloo", 2)
    if gpus:
        yield doctor_gpus.check_training(gpus, lambda device: outcome(start(doctor_gpus.TRAINING, device)))
        yield check_group("nccl", min(gpus, 2))
    yield check_disk(shutil.disk_usage(Path.cwd()).free, Path.cwd())
    if platform.system() == "Linux":
        yield check_memory(available_memory())


def examine_nodes() -> Iterable[Finding]:
    """All checks between the hosts of a job; every rank of it calls this."""
    from mim_torchrec.doctor_nodes import examine

    return examine()


def main(argv: list[str] | None = None, examine: Callable[[], Iterable[Finding]] = examine) -> None:
    """Run `mim doctor`; exits with status 6 when a check fails.

    Args:
        argv: the words after the command; by default those of the process.
        examine: yields the findings.
    """
    parser = argparse.ArgumentParser(description="Check the installation; one line a check.")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead")
    parser.add_argument(
        "--nodes", action="store_true",
        help="under torchrun: check instead whether the hosts of the job reach each other, how fast, and "
        "their clocks; the first rank prints the report",
    )  # fmt: skip
    given = parser.parse_args(argv)
    findings = []
    for finding in examine_nodes() if given.nodes else examine():
        findings.append(finding)
        if not given.json:
            print(finding, flush=True)
    if given.json and findings:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    if not all(finding.ok for finding in findings):
        raise SystemExit(Status.ENVIRONMENT)


if __name__ == "__main__":
    run(main)
