"""Memory that the processes started by this one see change: what a live index keeps of new items.

It is an anonymous file (`memfd_create`) that all of them map: it needs no name, no folder and no space on
/dev/shm, takes memory by the page that is written, and is freed with the last process.
"""

import mmap
import os
import weakref
from multiprocessing import context, reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedMemory:
    """Zeroed bytes that child processes share, whether they are forked, spawned or come from a fork server.

    Args:
        size: bytes.
        descriptor: of the file, where another process has made it.

    It can be given to a process when that is started, and cannot be pickled otherwise.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = size
        if descriptor is None:
            descriptor = os.memfd_create("item-index")
            os.ftruncate(descriptor, size)
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)  # arrays keep the map
        self._map = mmap.mmap(descriptor, size)

    def array(self, dtype: type[np.generic], start: int, count: int) -> NDArray[Any]:
        """Return ``count`` numbers from byte ``start`` on, in place."""
        return np.frombuffer(self._map, dtype, count, start)

    def __reduce__(self) -> tuple[Any, ...]:
        context.assert_spawning(self)
        return _attach, (self.size, reduction.DupFd(self._descriptor))


def _attach(size: int, descriptor: Any) -> SharedMemory:
    return SharedMemory(size, descriptor.detach())
