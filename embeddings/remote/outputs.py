"""Directories that a program writes whole, to a local path or to a URL."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.remote.fetching import forget_working_directory, working_directory
from mim_torchrec.embeddings.remote.lease import StoreLease
from mim_torchrec.embeddings.remote.places import StoreError, Url
from mim_torchrec.embeddings.remote.published import OWN, Publisher, read_index
from mim_torchrec.errors import ExpectedError, OutputExists


@contextmanager
def written(place: Path | Url, rank: int = 0, replace: bool = False) -> Iterator[Path]:
    """The local path to write a directory to that belongs at a place; every rank enters it.

    At a URL the directory becomes visible as a whole when the block ends without an error.

    Args:
        place: where it belongs.
        rank: of this process; rank 0 publishes.
        replace: take the place of what is at a URL. What is at a local path is the caller's to look at.

    Raises:
        OutputExists: there is something at the URL and `replace` is False, or it was not published.
        LeaseError: another process writes to the URL.
        StoreError: the store refuses, or two writers could not be told apart.
    """
    if isinstance(place, Path):
        yield place
        return
    url, path = place, working_directory(place)
    lease = StoreLease(url) if rank == 0 else None

    def begin() -> None:
        if lease is None:
            return
        lease.take()
        if not replace and read_index(url).number:
            raise OutputExists(f"{url} exists; choose another directory or remove it")
        forget_working_directory(url)
        path.parent.mkdir(parents=True)

    def publish() -> None:
        if lease is None:
            return
        lease.check()
        publisher = Publisher(url)
        publisher.upload_all(path)
        lease.check()  # again: an upload may take long
        publisher.publish()

    try:
        on_all_ranks(begin)
        on_all_ranks(lambda: look_for(path.parent))
        yield path
        on_all_ranks(publish)
    finally:
        if lease is not None and lease.is_taken:  # else the local directory is that of the other writer
            with suppress(ExpectedError):
                lease.check()
                forget_working_directory(url)
            lease.give_back()


def withdraw(url: Url) -> None:
    """Remove what was published at a URL; nothing where nothing was.

    Raises:
        LeaseError: another process writes there, or has taken this one's place.
    """
    if not any((url / OWN).list()):
        return
    lease = StoreLease(url)
    lease.take()
    try:
        publisher = Publisher(url)
        lease.check()
        publisher.withdraw()
    finally:
        lease.give_back()


def look_for(folder: Path) -> None:
    """See that this rank shares the folder of results with rank 0.

    Raises:
        StoreError: it does not.
    """
    if not folder.is_dir():
        raise StoreError(
            f"{folder} is not on this host: ranks of several hosts make results in a folder that all see; "
            "set MIM_CACHE to one"
        )
