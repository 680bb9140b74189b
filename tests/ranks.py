"""Run a function on several gloo ranks, each a real process.

The processes come from a fork server that has loaded the package once, so that only the first call of a test
session waits for it.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import chdir
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(minutes=10)  # a rank takes long to start where other tests run


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` on every rank of a gloo process group; returns what each rank returned, by rank.

    Args:
        fn: defined at the top of a module, so that it can be found by name in another process.
        world_size: number of processes.
        args: what can be pickled.

    Raises:
        RankError: a rank raised. The tracebacks of all that did are in the message, the first one first:
            the others may only have lost it. Those that still ran are ended.
    """
    start_fork_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            mp.start_processes(
                _rank, args=(fn, world_size, folder, args), nprocs=world_size, start_method="forkserver"
            )
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            found = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
            raise RankError("\n".join(file.read_text() for file in found) or str(error)) from None
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def start_fork_server() -> None:
    """Start the fork server of `multiprocessing`, unless it runs."""
    set_forkserver_preload(["tests.preloaded"])
    with chdir(Path(__file__).parents[1]):
        ensure_running()


class RankError(RuntimeError):
    """A rank ended with an error."""


def _rank(rank: int, fn: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        torch.save(fn(*args), folder / f"{rank}.pt")
    except BaseException:
        # written while the connections are still up, so before the others notice
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
