"""Time and memory of work on a device: of a GPU by its own clock and its allocator."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from mim_torchrec.benchmarks.measures.peak_memory import measured_on_gpu
from mim_torchrec.benchmarks.measures.turns import when_done

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch")
"""What names of calls that launch kernels begin with."""


def seconds_each(step: Callable[[int], Any], rounds: int, warmup: int) -> float:
    """Seconds of a step, of many that are launched one after the other.

    Args:
        step: takes the number of the round.
        rounds: that are timed together.
        warmup: before those.
    """
    for turn in range(warmup):
        step(turn)
    started = when_done(time.perf_counter)
    for turn in range(rounds):
        step(turn)
    return (when_done(time.perf_counter) - started) / rounds


def peak_mib(step: Callable[[int], Any], device: torch.device) -> float | None:
    """MiB that the allocator of a GPU has handed out at the most, during a step; None on a CPU."""
    return measured_on_gpu(lambda: step(0), device) / 2**20 if device.type == "cuda" else None


def host_calls(step: Callable[[int], Any]) -> dict[str, int] | None:
    """Kernels that a step launches, waits for the GPU, and copies to it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profiled:
        step(0)
    names = Counter(event.name for event in profiled.events())
    return {
        "kernels": sum(count for name, count in names.items() if name.startswith(LAUNCHES)),
        "syncs": sum(count for name, count in names.items() if name.endswith("Synchronize")),
        "uploads": sum(count for name, count in names.items() if name.startswith("Memcpy HtoD")),
    }
