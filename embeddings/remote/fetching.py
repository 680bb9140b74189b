"""Inputs that are mapped into memory or loaded by other libraries, from an object store to the local disk.

    <cache>/fetched/<key>/<name>     a directory as it was published, see `published.py`, or as it lies there
    <cache>/fetched/<key>.lock       held while it is fetched: once per host
    <cache>/fetched/<key>.use        held by the processes that use it, until they end

The key is of the URL and of what lies there, so a new content is fetched beside the old one. Sizes are
compared, and digests where there is an index. `MIM_CACHE` names the cache. Where `MIM_CACHE_GIB` is set, what
was used least recently and is not in use is removed before more is fetched. Any of it may be removed by hand
while nothing runs.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mim_torchrec.embeddings.files import atomic_directory, discard_directory, full_disk_reported, sha256
from mim_torchrec.embeddings.remote.places import NoSuchPlace, StoreError, Url, place
from mim_torchrec.embeddings.remote.published import OWN, Index, find_index
from mim_torchrec.errors import ExpectedError, OptionError

CACHE, LIMIT = "MIM_CACHE", "MIM_CACHE_GIB"


class FetchError(ExpectedError, ValueError):
    """What was fetched is not what was published."""


def cache_folder() -> Path:
    """The local cache: `MIM_CACHE`, or `mim-torchrec` in the cache folder of the user."""
    if found := os.environ.get(CACHE):
        return Path(found).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mim-torchrec"


def fetched(where: str | Path | Url, only: Collection[str] = ()) -> Path:
    """The local directory that holds what lies at a place; a local place is its own.

    Args:
        where: a directory.
        only: files and folders in it that are needed; by default all. One that is not there is left out.

    Raises:
        NoSuchPlace: there is nothing at the URL.
        FetchError: an object is damaged, or the directory was replaced meanwhile.
        DiskFull: the cache has no room.
    """
    url = place(where)
    if isinstance(url, Path):
        return url
    index = find_index(url)
    files = _listed(url) if index is None else {p: (f.size, f.sha256) for p, f in index.files.items()}
    wanted = {path: facts for path, facts in files.items() if _is_wanted(path, only)}
    if not wanted:
        raise NoSuchPlace(f"{url}: no such directory, or it has none of {', '.join(only) or 'its files'}; "
                          "check the URL")  # fmt: skip
    words = [str(url), *(f"{path} {size} {mark}" for path, (size, mark) in sorted(wanted.items()))]
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]
    folder = cache_folder() / "fetched"
    folder.mkdir(parents=True, exist_ok=True)
    _hold(folder / f"{key}.use", fcntl.LOCK_SH)
    target = folder / key / url.name
    with _locked(folder / f"{key}.lock"):
        if not target.is_dir():
            needed = sum(size for size, _ in wanted.values())
            _make_room(folder, needed)
            with full_disk_reported(target, needed), atomic_directory(target, needed) as partial:
                for path, (size, mark) in wanted.items():
                    _fetch(url, index, path, size, mark, partial / path)
    os.utime(folder / f"{key}.use")
    return target


def fetch_file(index: Index, path: str, target: Path) -> None:
    """Fetch one file of a published directory.

    Raises:
        FetchError: the object is not there any more, or is damaged.
    """
    file = index.files[path]
    _fetch(index.url, index, path, file.size, file.sha256, target)


def refuse_half_written(url: Url) -> None:
    """See that no one has begun to publish a directory that has no index yet.

    Raises:
        FetchError: somebody has.
    """
    if any(name.startswith("lease-") for name in (url / OWN).list()):
        raise FetchError(
            f"{url} is being written, or its writer has ended before it was whole; wait, or write it again"
        )


def _listed(url: Url) -> dict[str, tuple[int, str]]:
    """What somebody has put there by other means: path to size and mark."""
    refuse_half_written(url)
    return {path: (stat.size, stat.mark) for path, stat in url.walk().items()}


def _is_wanted(path: str, only: Collection[str]) -> bool:
    return not only or any(path == name or path.startswith(f"{name}/") for name in only)


def _fetch(url: Url, index: Index | None, path: str, size: int, mark: str, target: Path) -> None:
    source = url / path if index is None else index.url_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.download(target)
    except NoSuchPlace:
        raise FetchError(
            f"{source} is gone: {url} was replaced meanwhile; run the same command again"
        ) from None
    if target.stat().st_size != size:
        raise FetchError(f"{source} has {target.stat().st_size} bytes, not {size}; publish it again")
    if index is None:
        if source.stat().mark != mark:
            raise FetchError(f"{source} was replaced meanwhile; run the same command again")
    elif sha256(target) != mark:
        raise FetchError(f"{source} is damaged: its SHA-256 is not {mark}; publish it again")


def _make_room(folder: Path, needed: int) -> None:
    """Remove what was used least recently, until `needed` bytes more are within the limit."""
    text = os.environ.get(LIMIT)
    if not text:
        return
    try:
        limit = float(text) * 2**30
    except ValueError:
        raise OptionError(f"{LIMIT} is {text!r}; it must be a number of GiB") from None
    sizes = {path: _size(path) for path in folder.iterdir() if path.is_dir()}
    for path in sorted(sizes, key=lambda path: _last_use(folder, path)):
        if sum(sizes.values()) + needed <= limit:
            return
        mark = _hold(folder / f"{path.name}.use", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if mark is not None:
            discard_directory(path)
            del sizes[path]
            os.close(mark)
    if sum(sizes.values()) + needed > limit:
        raise StoreError(
            f"{folder} has {sum(sizes.values())} bytes in use, {needed} more are needed: "
            f"over {LIMIT}={text}; raise it"
        )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _last_use(folder: Path, entry: Path) -> float:
    mark = folder / f"{entry.name}.use"
    return mark.stat().st_mtime if mark.exists() else 0.0


def _hold(file: Path, kind: int) -> int | None:
    """Lock a file until this process ends, or its descriptor is closed; None where another one has it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = _hold(file, fcntl.LOCK_EX)
    assert descriptor is not None  # it was waited for
    try:
        yield
    finally:
        os.close(descriptor)


def working_directory(url: Url) -> Path:
    """The local directory in which results are made that are published at a URL; the same on every rank."""
    key = hashlib.sha256(str(url).encode()).hexdigest()[:24]
    return cache_folder() / "work" / key / url.name


def forget_working_directory(url: Url) -> None:
    """Remove it."""
    shutil.rmtree(working_directory(url).parent, ignore_errors=True)
