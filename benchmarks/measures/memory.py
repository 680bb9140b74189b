"""Private memory of a process, for benchmarks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def private_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, by default this one, that no file backs."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


@contextmanager
def peak_private_bytes() -> Iterator[Callable[[], int]]:
    """Within it, a function that returns the largest private memory so far, sampled every 5 ms."""
    peak, done = private_bytes(), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: max(peak, private_bytes())
    finally:
        done.set()
        thread.join()
