"""Peak memory of a step: as a GPU's allocator measures it, or estimated from the storages that are alive.

The estimate follows every tensor that an operation returns until its storage is freed. It needs no GPU and,
under `FakeTensorMode`, no memory: models of any size are run without computing anything. It does not see what
a kernel takes and gives back within one operation, nor the fragments and the caches of an allocator.

`measured_on_cpu` is the yardstick of it: what torch's allocator of the CPU itself has handed out.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEASURED = "measured step"
BLOCK = 512
"""Bytes that the allocator of a GPU rounds to."""


class PeakMemory(TorchDispatchMode):
    """Within it, the bytes of all storages that operations return, while they are alive, and their maximum.

    What is there before has to be named with `track`; each storage counts once, whatever views it has.

    Args:
        round_to: bytes that each storage is rounded up to.

    Attributes:
        current: bytes that are alive.
        peak: the largest `current` so far.
    """

    def __init__(self, round_to: int = BLOCK) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._round_to = round_to

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:  # a sparse matrix of packed pairs is its index and value tensors
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._round_to) * self._round_to

        def freed(_: Any) -> None:
            del self._alive[key]
            self.current -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.track(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def estimated(step: Callable[[], Any], resident: Iterator[Tensor]) -> int:
    """Peak bytes of a step by the storages that are alive.

    Args:
        step: what is done.
        resident: what lies in memory before it. An iterator: a list would keep what the step gives back.
    """
    memory = PeakMemory()
    memory.track(resident)
    with memory:
        step()
    return memory.peak


def measured_on_gpu(step: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that the allocator of a GPU had handed out during a step, whatever they were for."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measured_on_cpu(build: Callable[[], Callable[[], Any]]) -> int:
    """Peak bytes that torch's allocator of the CPU had handed out during a step.

    The allocator tells a profiler what it hands out and takes back; of what is older than the profiler it
    knows nothing.

    Args:
        build: makes everything that is to be counted, and returns the step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build()
        with record_function(MEASURED):
            step()
    events = profiler.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == MEASURED)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for moment, change in changes:
        current += change
        if moment >= began:
            peak = max(peak, current)
    return peak
