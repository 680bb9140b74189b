"""Files and directories that are either whole or not there."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mim_torchrec.training.distributed import DistributedContext


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; what JSON does not know (a Path, say) becomes a string."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(partial, path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
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
def atomic_directory_on_all_ranks(path: Path, context: DistributedContext) -> Iterator[Path]:
    """As `atomic_directory`, for a directory that all ranks see and write into.

    It gets its name when all ranks have left the block and everything in it is on the disk. What goes wrong
    within the block has to be raised on all ranks, as `on_all_ranks` does.

    Args:
        path: where the directory shall be.
        context: the process group; every rank calls it.

    Yields:
        The same empty directory on every rank.

    Raises:
        OSError: on all ranks, if one cannot write, or does not see what rank 0 has made.
    """
    partial = partial_of(path)
    try:
        begin_directory(path, context)
        yield partial
        context.barrier()
        on_all_ranks(lambda: publish_directory(path) if context.is_main else None, context)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(path: Path) -> Path:
    """Where a directory of ranks is written before it has its name."""
    return path.with_name(f"{path.name}.partial")


def begin_directory(path: Path, context: DistributedContext) -> None:
    """Make the empty directory that ranks write into; every rank calls it.

    Raises:
        OSError: on all ranks, if one cannot write, or does not see what rank 0 has made.
    """
    partial = partial_of(path)

    def begin() -> None:
        if context.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def look() -> None:
        if not partial.is_dir():
            raise FileNotFoundError(f"{partial} is not there; all ranks have to share the folder of results")

    on_all_ranks(begin, context)
    on_all_ranks(look, context)


def publish_directory(path: Path) -> None:
    """Give a directory of ranks its name, once everything in it is on the disk; rank 0 calls it."""
    partial = partial_of(path)
    for folder, _, _ in os.walk(partial):
        sync(Path(folder))
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def on_all_ranks(act: Callable[[], None], context: DistributedContext) -> None:
    """Act on all ranks; where one cannot write or read, all raise OSError that names it."""
    problem = None
    try:
        act()
    except OSError as error:
        problem = f"rank {context.rank}: {error}"
    problems = [found for found in context.all_gather_objects(problem) if found is not None]
    if problems:
        raise OSError("; ".join(problems))


def remove(path: Path) -> None:
    """Remove a directory that is there; it loses its name first, so that no half of it passes for a whole."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    shutil.rmtree(old)


def sync(folder: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
