"""Run a function on several gloo ranks, each a real process.

The processes come from a fork server that has loaded torchrec once, so that only the first call of a test
session waits for it.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=120)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` on every rank of a gloo process group; returns what each rank returned, by rank.

    Args:
        fn: defined at the top of a module, so that it can be found by name in another process.
        world_size: number of processes.
        args: what can be pickled.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; its traceback is in the message. The
            other ranks are ended.
    """
    set_forkserver_preload(["torchrec"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, args=(fn, world_size, Path(folder), args), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, fn: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        torch.save(fn(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
