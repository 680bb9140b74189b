"""Files and directories that are either whole or not there."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mim_torchrec.training.distributed import Ranks


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; what JSON does not know (a Path, say) becomes a string."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(partial, path)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write into that becomes `path` at the end, in the place of what is there.

    After an error nothing of it is left, and what was at `path` is still there.

    Args:
        path: where the directory shall be; its parents are made.

    Yields:
        An empty directory beside `path`.
    """
    mark = uuid.uuid4().hex
    partial = path.with_name(f"{path.name}.{mark}.partial")
    old = path.with_name(f"{path.name}.{mark}.old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_directory_of_ranks(path: Path, ranks: Ranks) -> Iterator[Path]:
    """As `whole_directory`, for a directory that all ranks see and write into.

    Args:
        path: where the directory shall be.
        ranks: the process group; every rank calls it.

    Yields:
        The same empty directory on every rank.
    """
    partial = path.with_name(f"{path.name}.partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    yield partial
    ranks.barrier()
    if ranks.is_main:
        old = path.with_name(f"{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
