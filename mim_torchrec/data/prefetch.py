"""What an iterator yields, made by a thread ahead of its consumer.

Arrow, NumPy and torch leave the interpreter free while they read, decode, gather and search, which is nearly
all that a reader does. So a thread is enough: a worker process would load torch, hold vocabularies of its
own, and send every batch through a pipe.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

from mim_torchrec.errors import OptionError

Item = TypeVar("Item")
_END = object()


def prefetched(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield the items of an iterator, which a thread advances from now on.

    Args:
        items: advanced by one thread only, and closed by it where it can be and the consumer stops. What it
            raises is raised here, in its turn.
        depth: items that wait, at most; 0 advances the iterator here, when one is asked for.

    Raises:
        OptionError: `depth` is negative.
    """
    if depth < 0:
        raise OptionError(f"{depth} batches cannot be prefetched; it has to be at least 0")
    if not depth:
        return items
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    return _taken(items, pool, deque(pool.submit(next, items, _END) for _ in range(depth)))


def _taken(items: Iterator[Item], pool: ThreadPoolExecutor, waiting: deque[Future[object]]) -> Iterator[Item]:
    try:
        while (found := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield cast(Item, found)
            del found  # so that what the consumer lets go is free
    finally:
        for future in waiting:
            future.cancel()
        close = getattr(items, "close", None)
        if close is not None:
            pool.submit(close).result()
        pool.shutdown()
