"""What of a memory-mapped table lies in the page cache, and how to empty it of that table."""

import ctypes
import mmap
import os
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mim_torchrec.embeddings.sharded.pages import advise


def drop_pages(files: Iterable[Path], mapped: Sequence[Tensor]) -> None:
    """Take files out of the page cache.

    Args:
        files: complete and synced to the disk; no other process maps them.
        mapped: rows of all private mappings that this process has of the files, because pages that are mapped
            stay; what was written into them is lost.
    """
    for rows in mapped:
        advise(rows, mmap.MADV_DONTNEED)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_bytes(mapped: Sequence[Tensor]) -> int:
    """Bytes of mapped rows that lie in the page cache.

    Raises:
        OSError: the kernel does not say.
    """
    libc, total = ctypes.CDLL(None, use_errno=True), 0
    for rows in mapped:
        start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = rows.data_ptr() + rows.nbytes - start
        pages = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore failed")
        total += int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE
    return total


def major_faults() -> int:
    """Page faults of this process so far that had to read a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
