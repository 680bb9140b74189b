"""Work that every rank of a group does, and that fails on all ranks where it fails on one."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, by rank; without a process group, this process's alone."""
    if not dist.is_initialized():
        return [value]
    every: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do work on every rank; where OSError or ValueError stops it on one, all ranks raise.

    So no rank waits in a collective for one that has failed.

    Args:
        work: what this rank does.
        group: the ranks; None is the default group, or this process alone where there is none.

    Raises:
        OSError, ValueError: those of the first rank that failed, with its number, on all ranks.
    """
    result: T | None = None
    failed: OSError | ValueError | None = None
    try:
        result = work()
    except (OSError, ValueError) as error:
        failed = error
    every = gather(failed, group)
    for rank, found in enumerate(every):
        if found is not None:
            raise (_of_rank(rank, found) if len(every) > 1 else found) from failed
    return cast(T, result)


def rank_0_first(work: Callable[[], T]) -> T:
    """Do work on rank 0, and then on the others, which find what rank 0 has made.

    Raises:
        OSError, ValueError: as of `on_all_ranks`.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    found = on_all_ranks(lambda: [work()] if is_first else [])
    return on_all_ranks(lambda: found[0] if found else work())


def _of_rank(rank: int, error: OSError | ValueError) -> OSError | ValueError:
    text = f"rank {rank}: {error}"
    try:
        named = type(error)(text)
    except TypeError:  # its parts are not known here
        named = OSError(text) if isinstance(error, OSError) else ValueError(text)
    if isinstance(error, OSError) and isinstance(named, OSError):
        named.errno = error.errno
    return named
