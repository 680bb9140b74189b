"""Blocks of rows whose intermediate results stay in the cache of a core."""

from collections.abc import Iterator

BLOCK = 1 << 17  # float32 numbers: half a megabyte, so that some such arrays lie in the second cache together


def blocks_of(num_rows: int, width: int) -> Iterator[slice]:
    """Rows of (num_rows, width) numbers, at most BLOCK numbers at once and one row at least.

    >>> list(blocks_of(3, 1 << 16))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    rows = max(1, BLOCK // max(width, 1))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))
