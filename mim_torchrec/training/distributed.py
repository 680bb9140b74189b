"""The process group of a stage: the ranks of torchrun or another launcher, or a world of one."""

import json
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from mim_torchrec.errors import SetupError, is_timeout
from mim_torchrec.training.config import Timeouts
from mim_torchrec.training.liveness import Liveness, RankStalled
from mim_torchrec.training.network import check_interface

T = TypeVar("T")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that run the stage together."""

    rank: int
    world_size: int
    device: torch.device
    liveness: Liveness | None = None

    def at(self, place: str) -> None:
        """Say where in the run this rank is, for whoever waits for it; every rank says the same."""
        if self.liveness is not None:
            self.liveness.at(place)

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
def distributed(seed: int, timeouts: Timeouts | None = None) -> Iterator[DistributedContext]:
    """Set up the process group and the seeds, and take the group down at the end.

    Where a launcher such as torchrun has set RANK and WORLD_SIZE the group spans its ranks; otherwise it is a
    world of one, so that code has one path. With GPUs, tensors on them are exchanged by NCCL and those in
    memory by gloo. A group that the caller has set up is used and left as it is.

    Args:
        seed: of Python, numpy and torch. It is the same on every rank, so that all build the same model.
        timeouts: how long ranks wait for each other.

    Yields:
        The rank, the number of ranks and this rank's device.

    Raises:
        SetupError: a machine has GPUs, but fewer than ranks; other machines cannot reach this one.
        RankStalled: ranks were waited for in vain.
    """
    device = _device()
    mine, alone = not dist.is_initialized(), False
    liveness: Liveness | None = None
    if mine:
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            liveness = _join(backend, timeouts or Timeouts(), device)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            alone = "LOCAL_WORLD_SIZE" not in os.environ
            os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # torchrec warns where it has to guess
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size(), device, liveness)
    except RuntimeError as error:
        if liveness is None or not is_timeout(error):
            raise
        raise liveness.stalled(error) from error
    finally:
        if liveness is not None:
            liveness.close()
        if mine:
            dist.destroy_process_group()
        if alone:
            del os.environ["LOCAL_WORLD_SIZE"]


def new_gloo_group() -> dist.ProcessGroup:
    """A further group of all ranks, for tensors in memory, with the timeout of the first one."""
    world = dist.group.WORLD
    assert world is not None, "there is no process group"
    timeout = world._get_backend(torch.device("cpu")).options._timeout
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


def _join(backend: str, timeouts: Timeouts, device: torch.device) -> Liveness:
    """Meet the other ranks, whose number and place the environment has, and report this one to them."""
    check_interface()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = meeting_store(rank, timedelta(seconds=timeouts.init))
    own = dist.PrefixStore("mim", store)
    own.set(f"started/{rank}", json.dumps([_place(device), os.environ.get(RESTARTS, "0")]))
    for other in range(world_size):
        try:
            own.wait([f"started/{other}"])
        except dist.DistStoreError as error:
            absent = [k for k in range(world_size) if not own.check([f"started/{k}"])]
            raise RankStalled(
                f"ranks {absent} of {world_size} have not started within {timeouts.init:g} s (--timeout.init)"
            ) from error
    started = [json.loads(own.get(f"started/{other}")) for other in range(world_size)]
    if RESTARTS in os.environ:  # an agent that has joined later has counted fewer; ranks agree
        os.environ[RESTARTS] = str(max(int(restarts) for _, restarts in started))
    if device.type != "cpu":
        refuse_shared_device([place for place, _ in started], rank)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeouts.step),
        device_id=None if device.type == "cpu" else device,
    )
    return Liveness(own, rank, world_size)


def meeting_store(rank: int, timeout: timedelta) -> dist.Store:
    """The store of the ranks, which the environment names.

    torch's own rendezvous would wait in it for ranks that it could not name.

    Args:
        rank: this process; rank 0 hosts the store where the agents of torchrun share none.
        timeout: of every operation.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)  # torchrun hosts it
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not of_agent,
        wait_for_workers=False,
        timeout=timeout,
        multi_tenant=True,
    )
    if not of_agent:
        return store
    # the store outlives the ranks of an attempt; agents that have joined later would count another one
    return dist.PrefixStore(f"attempt_{os.environ.get(RESTARTS, '0')}", store)


def is_restarted() -> bool:
    """Whether torchrun has started the ranks again within a job, after one of them had died."""
    return int(os.environ.get(RESTARTS, "0")) > 0


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", device_number(torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def device_number(visible: int) -> int:
    """Which of the GPUs that this process sees is its own.

    A launcher such as `srun --gpus-per-task=1` shows every process one GPU, which is number 0 to each.

    Args:
        visible: number of GPUs that this process sees.

    Raises:
        SetupError: this process has none.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if visible == 1:
        return 0  # where ranks share it, `refuse_shared_device` finds out
    if local_rank >= visible:
        raise SetupError(
            f"local rank {local_rank} has no GPU, the machine has {visible}; start fewer processes, or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return local_rank


def _place(device: torch.device) -> str:
    """The host of this rank, and its GPU by the id that no other GPU has."""
    gpu = "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    return f"{socket.gethostname()} {gpu}"


def refuse_shared_device(places: list[str], rank: int) -> None:
    """See that no other rank has this one's GPU.

    Args:
        places: host and GPU of each rank, by rank.
        rank: this process.

    Raises:
        SetupError: ranks share a GPU, which NCCL cannot.
    """
    sharing = [other for other, place in enumerate(places) if place == places[rank]]
    if len(sharing) > 1:
        host = places[rank].split()[0]
        raise SetupError(
            f"ranks {sharing} on {host} have one GPU together; start fewer processes, let the launcher give "
            "each a GPU, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
