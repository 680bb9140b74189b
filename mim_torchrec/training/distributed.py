"""The process group of a stage: the ranks of torchrun or another launcher, or a world of one."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from mim_torchrec.errors import SetupError

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that run the stage together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def all_gather_objects(self, obj: T) -> list[T]:
        """Objects of all ranks, by rank. Every rank must call it; what can be pickled can be gathered."""
        if self.world_size == 1:
            return [obj]
        gathered: list[T | None] = [None] * self.world_size
        dist.all_gather_object(gathered, obj)
        return cast(list[T], gathered)

    def broadcast_object(self, obj: T | None) -> T:
        """The object of rank 0 on every rank; what other ranks give is ignored. Every rank must call it."""
        return cast(T, self.all_gather_objects(obj)[0])


@contextmanager
def distributed(seed: int) -> Iterator[DistributedContext]:
    """Set up the process group and the seeds, and take the group down at the end.

    Where a launcher such as torchrun has set RANK and WORLD_SIZE the group spans its ranks; otherwise it is a
    world of one, so that code has one path. With GPUs, tensors on them are exchanged by NCCL and those in
    memory by gloo. A group that the caller has set up is used and left as it is.

    Args:
        seed: of Python, numpy and torch. It is the same on every rank, so that all build the same model.

    Yields:
        The rank, the number of ranks and this rank's device.

    Raises:
        SetupError: a machine has GPUs, but fewer than ranks.
    """
    device = _device()
    mine, alone = not dist.is_initialized(), False
    if mine:
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            alone = "LOCAL_WORLD_SIZE" not in os.environ
            os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # torchrec warns where it has to guess
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if mine:
            dist.destroy_process_group()
        if alone:
            del os.environ["LOCAL_WORLD_SIZE"]


def is_restarted() -> bool:
    """Whether torchrun has started the ranks again within a job, after one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise SetupError(
            f"local rank {local_rank} has no GPU, the machine has {torch.cuda.device_count()}; start fewer "
            "processes, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
