"""Checks of `mim doctor` that need an NVIDIA driver: its version, the GPUs, and a training step on each.

The packages are compiled for some GPUs and for one version of CUDA. Others fail deep inside fbgemm, so they
are named here. This module itself needs only Python.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterable

from mim_torchrec.findings import Finding

CUDA, OLDEST_DRIVER = "13", 580
"""CUDA of requirements/cuda.txt, and the first driver that runs it (CUDA 13 release notes, table 3)."""
CAPABILITIES = {8: "sm_80", 9: "sm_90", 10: "sm_100"}
"""What the wheels of fbgemm-gpu 1.9 are compiled for, by the major number of a GPU's compute capability."""
QUERY = "index,driver_version,compute_cap,name"  # a name may hold commas

TRAINING = """
import sys
print("@loading torch", flush=True)
import torch
print("@loading fbgemm_gpu", flush=True)
import fbgemm_gpu
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen)
device = torch.device(sys.argv[1])
on_gpu = device.type == "cuda"
if on_gpu:
    torch.cuda.set_device(device)
print(f"@an operator of fbgemm on {device}", flush=True)
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 1], device=device))
assert offsets.tolist() == [0, 2, 2, 3], offsets
print(f"@a lookup on {device}", flush=True)
place = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
kind = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
table = SplitTableBatchedEmbeddingBagsCodegen(
    [(8, 4, place, kind)], optimizer=EmbOptimType.EXACT_SGD, learning_rate=0.5, device=device)
(weights,) = table.split_embedding_weights()
with torch.no_grad():
    weights.copy_(torch.arange(32.0).view(8, 4))
before = weights.clone()
rows = torch.tensor([1, 2, 3], device=device)
found = table(rows, offsets)
expected = torch.stack([before[1] + before[2], torch.zeros(4, device=device), before[3]])
torch.testing.assert_close(found, expected)
print(f"@a training step on {device}", flush=True)
found.sum().backward()
after = before.clone()
after[rows] -= 0.5
torch.testing.assert_close(table.split_embedding_weights()[0], after)
print("=")
"""


def ask_driver() -> list[list[str]] | None:
    """Index, driver version, compute capability and name of each GPU; None where no driver answers."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True
    )
    if asked.returncode:
        return None
    return [[word.strip() for word in line.split(",", 3)] for line in asked.stdout.splitlines() if line]


def check_driver(gpus: list[list[str]]) -> Finding:
    """The driver runs the CUDA that the packages are compiled with."""
    version = gpus[0][1]
    text = f"NVIDIA driver {version}"
    if int(version.partition(".")[0]) >= OLDEST_DRIVER:
        return Finding("driver", True, text)
    return Finding(
        "driver", False, f"{text}; CUDA {CUDA} needs {OLDEST_DRIVER} or later",
        "a newer driver",
    )  # fmt: skip


def check_capabilities(gpus: list[list[str]]) -> Finding:
    """Every GPU is one that fbgemm is compiled for."""
    built = ", ".join(CAPABILITIES.values())
    other = [
        f"{name} ({index}) has {capability}"
        for index, _, capability, name in gpus
        if int(capability.partition(".")[0]) not in CAPABILITIES
    ]
    if not other:
        return Finding("capability", True, f"{len(gpus)} GPUs of kinds that fbgemm is compiled for ({built})")
    return Finding(
        "capability", False, f"{'; '.join(other)}; the wheel of fbgemm-gpu is compiled for {built}",
        "run on other GPUs, or compile fbgemm for these",
    )  # fmt: skip


def check_training(gpus: int, run: Callable[[str], tuple[bool, str]]) -> Finding:
    """On every GPU an operator of fbgemm, a lookup and a training step give the right numbers.

    Args:
        gpus: how many torch sees.
        run: runs `TRAINING` on a device and says whether it ended well, and else why.
    """
    outcomes = {f"cuda:{number}": run(f"cuda:{number}") for number in range(gpus)}
    problems = [f"{device}: {why}" for device, (ok, why) in outcomes.items() if not ok]
    if not problems:
        return Finding("training", True, f"a lookup and a training step are right on {', '.join(outcomes)}")
    return Finding(
        "training",
        False,
        "; ".join(problems),
        "requirements/cuda.txt with this driver; `nvidia-smi -q` shows faults",
    )


def examine(gpus: list[list[str]]) -> Iterable[Finding]:
    """What can be said without loading the packages."""
    yield check_driver(gpus)
    yield check_capabilities(gpus)
