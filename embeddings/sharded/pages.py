"""What the kernel is told about rows that are mapped into memory: how they will be read."""

import ctypes
import mmap
import os

from torch import Tensor

READ_AT_RANDOM = mmap.MADV_RANDOM
READ_SOON = mmap.MADV_WILLNEED


def advise(rows: Tensor, advice: int) -> None:
    """Tell the kernel how mapped rows will be read; it does not change what is read.

    Args:
        rows: contiguous rows in mapped memory.
        advice: ``READ_AT_RANDOM``: a row that is absent is read with its page alone. By default the kernel
            reads what lies around it as well, up to several megabytes. ``READ_SOON``: read all of it, in the
            background.

    Raises:
        OSError: the kernel refuses.
    """
    if not rows.numel():
        return
    start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_size_t(rows.data_ptr() + rows.nbytes - start)
    if libc.madvise(ctypes.c_void_p(start), length, advice):
        error = ctypes.get_errno()
        raise OSError(error, f"madvise: {os.strerror(error)}")
