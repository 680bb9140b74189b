"""A function on several ranks, each a new process."""

import os
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mim_torchrec import program

KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


def launch(ranks: int, function: Callable[..., Any], *arguments: Any, keep: bool = False) -> list[Any]:
    """Run a function in new processes, the ranks of one group; returns what each returned.

    Args:
        ranks: how many.
        function: to run on each.
        arguments: of it.
        keep: let glibc keep freed memory. Otherwise whoever needs a large result after one that was given
            back pays for new pages, which costs several times a lookup and is no matter of the lookup.
    """
    os.environ |= {"OMP_NUM_THREADS": "1"} | (KEEP_FREED if keep else {})
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=function.__name__, max_restarts=0, start_method="spawn",
    )  # fmt: skip
    results = elastic_launch(config, _on_rank)(function, *arguments)
    for name in KEEP_FREED:
        os.environ.pop(name, None)
    return [results[rank] for rank in range(ranks)]


def _on_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    program.log_to_stderr()
    return function(*arguments)
