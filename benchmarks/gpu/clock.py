"""Time and memory of work on a device: of a GPU by its own clock and its allocator."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

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
    _wait()
    started = time.perf_counter()
    for turn in range(rounds):
        step(turn)
    _wait()
    return (time.perf_counter() - started) / rounds


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Bytes that a GPU's allocator has handed out at the most, during work; None without a GPU."""
    if not torch.cuda.is_available():
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


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


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
