"""Results in order, computed by threads ahead of their consumer.

Pillow and NumPy leave the interpreter free while they decode and resize, so that threads are enough: a
process of its own would load torch once more and send every image through a pipe.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from mim_torchrec.errors import OptionError

Input = TypeVar("Input")
Output = TypeVar("Output")


def ahead(
    function: Callable[[Input], Output], inputs: Iterable[Input], *, threads: int, depth: int
) -> Iterator[Output]:
    """Yield ``function(input)`` for every input, in the order of the inputs.

    Args:
        function: safe to call from several threads at once; what it raises is raised here, in its turn.
        inputs: what it is called with; taken no more than ``depth`` ahead of the results.
        threads: that call it; 0 calls it here, when its result is asked for.
        depth: results that are waiting or being computed, at most.

    Raises:
        OptionError: ``threads`` is negative or ``depth`` is not positive.
    """
    if threads < 0 or depth < 1:
        raise OptionError(f"{threads} threads that are {depth} results ahead: at least 0, and at least 1")
    return _ahead(function, iter(inputs), threads, depth) if threads else map(function, inputs)


def _ahead(
    function: Callable[[Input], Output], inputs: Iterator[Input], threads: int, depth: int
) -> Iterator[Output]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    waiting: deque[Future[Output]] = deque()
    try:
        waiting.extend(pool.submit(function, one) for one in islice(inputs, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, one) for one in islice(inputs, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
