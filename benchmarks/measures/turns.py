"""Times of alternatives that take turns, so that a machine whose speed drifts slows all of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock_of(device: torch.device) -> Callable[[], float]:
    """What tells the seconds of work on a device: those of the CPU, or on a GPU those that pass."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def when_done(clock: Callable[[], float]) -> float:
    """The clock, read when GPUs have done what was launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def in_turns(
    steps: Sequence[Callable[[int], Any]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.process_time,
) -> list[list[float]]:
    """Seconds of each step in each round; who begins changes from round to round.

    Args:
        steps: each called with the number of the round.
        rounds: that are timed.
        warmup: before those.
        clock: what tells the seconds; by default those of the CPU.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for k in range(warmup + rounds):
        order = range(len(steps)) if k % 2 else reversed(range(len(steps)))
        for place in order:
            started = when_done(clock)
            steps[place](k)
            ended = when_done(clock)
            if k >= warmup:
                seconds[place].append(ended - started)
    return seconds


def seconds_by_name(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, always in the order given.

    Args:
        runs: by name.
        rounds: that are timed.
        warmup: rounds before those.
        before: what is done before each run and not timed.
        clock: what tells the seconds; by default those that pass.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            if before is not None:
                before()
            started = when_done(clock)
            run()
            ended = when_done(clock)
            if turn >= warmup:
                seconds[name].append(ended - started)
    return seconds
