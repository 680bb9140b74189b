"""Directories that all ranks see and write into together, and that replace the old version whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import PARTIAL, discard_directory, full_disk_reported, publish_directory
from mim_torchrec.training.distributed import DistributedContext


@contextmanager
def shared_atomic_directory(path: Path, context: DistributedContext) -> Iterator[Path]:
    """As `embeddings.files.atomic_directory`, for a directory that all ranks see and write into.

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
        on_all_ranks(lambda: publish_shared(path) if context.is_main else None)
    except BaseException:
        discard_directory(partial)
        raise


def partial_of(path: Path) -> Path:
    """Where a directory of ranks is written before it has its name."""
    return path.with_name(path.name + PARTIAL)


def begin_directory(path: Path, context: DistributedContext) -> None:
    """Make the empty directory that ranks write into; every rank calls it.

    Raises:
        OSError: on all ranks, if one cannot write, or does not see what rank 0 has made.
    """
    partial = partial_of(path)

    def begin() -> None:
        if context.is_main:
            discard_directory(partial)
            with full_disk_reported(path):
                partial.mkdir(parents=True)

    def look() -> None:
        if not partial.is_dir():
            raise FileNotFoundError(f"{partial} is not there; all ranks have to share the folder of results")

    on_all_ranks(begin)
    on_all_ranks(look)


def publish_shared(path: Path) -> None:
    """Give a directory of ranks its name, once everything in it is on the disk; rank 0 calls it."""
    partial = partial_of(path)
    with full_disk_reported(path):
        publish_directory(partial, path)
    discard_directory(partial)
