"""Keep warnings of libraries off the screen, each by its words, where it arises."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*messages: str) -> Iterator[None]:
    """Within the block, ignore warnings that begin with one of the messages.

    Not for code that several threads run at once: Python's filters are of the process.

    >>> with quiet("old"):
    ...     warnings.warn("old things")
    """
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield
