"""Directories in an object store that are replaced whole: objects first, then the index that lists them.

    <url>/<path with a digest>       a file: metrics.1f0c….json holds metrics.json
    <url>/.mim/index-<n>.json        which files the directory has: size, SHA-256, object
    <url>/.mim/lease-<n>.json        who writes, see `lease.py`

A store has no rename. So no object is ever overwritten: a new content has a new name, and the index with the
next number, created only where there is none of that number, makes all of them visible in one step. The
newest index counts. A writer that was overtaken finds its number taken, and publishes nothing. Objects that
the newest index does not name are removed behind it.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from threading import Lock

from mim_torchrec.embeddings.files import LEFTOVER, sha256
from mim_torchrec.embeddings.remote.places import NoSuchPlace, StoreError, Url
from mim_torchrec.errors import ExpectedError, OutputExists, Status

OWN = ".mim"
INDEX = re.compile(r"index-(\d{6,})\.json")
OBJECT = re.compile(r".+\.[0-9a-f]{16}(\.[^./]+)?")
FORMAT_VERSION = 1
DIGITS = 16  # of the SHA-256, in the name of an object
ATTEMPTS = 5  # to read an index that is replaced meanwhile


class PublishedError(ExpectedError, ValueError):
    """A published directory cannot be read, or was published by somebody else meanwhile."""

    status = Status.STATE


@dataclass(frozen=True)
class File:
    """A file of a published directory: its bytes, their SHA-256, and the object that holds it."""

    size: int
    sha256: str
    object: str


@dataclass(frozen=True)
class Index:
    """What a published directory holds.

    Attributes:
        url: of the directory.
        number: of the index; 0 where nothing was published.
        files: by their path in the directory.
    """

    url: Url
    number: int
    files: Mapping[str, File]

    @property
    def digest(self) -> str:
        """Hash of what the directory holds."""
        words = [f"{path} {file.sha256}" for path, file in sorted(self.files.items())]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()

    def under(self, folder: str) -> "Index":
        """The files in a folder of the directory, by their path in it."""
        prefix = f"{folder}/"
        inside = {p.removeprefix(prefix): f for p, f in self.files.items() if p.startswith(prefix)}
        return Index(self.url, self.number, inside)

    def url_of(self, path: str) -> Url:
        """The object of a file."""
        return self.url / self.files[path].object


def read_index(url: Url) -> Index:
    """The newest index of a directory; an empty one of number 0 where there is none.

    Raises:
        PublishedError: it is damaged.
    """
    for _ in range(ATTEMPTS):
        found = [int(m[1]) for m in map(INDEX.fullmatch, (url / OWN).list()) if m]
        if not found:
            return Index(url, 0, {})
        file = url / OWN / _name(max(found))
        try:
            content = json.loads(file.read_bytes())
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {content['format_version']}, not {FORMAT_VERSION}")
            return Index(url, max(found), {p: File(**f) for p, f in content["files"].items()})
        except NoSuchPlace:  # a newer one has replaced it
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PublishedError(f"{file} cannot be read: {error}; publish the directory again") from None
    raise PublishedError(f"{url} is replaced faster than it can be read; try again")


def find_index(url: Url) -> Index | None:
    """What is published at a URL, be it a directory or a folder of one; None where nothing is.

    Folders above it that the credentials may not list are not searched.
    """
    for above in [url, *url.parents]:
        try:
            index = read_index(above)
        except StoreError as error:
            if above == url or not isinstance(error.__cause__, PermissionError):
                raise
            return None
        if index.number:
            inside = index if above == url else index.under(str(url).removeprefix(f"{above}/"))
            return inside if inside.files else None
    return None


class Publisher:
    """Publishes a local directory at a URL, part by part; one thread at a time.

    Objects that a killed publisher has left are removed.

    Args:
        url: of the directory, whose lease the caller holds.
    """

    def __init__(self, url: Url) -> None:
        self.index = read_index(url)
        self._files: dict[str, File] = dict(self.index.files)
        self._lock = Lock()
        self._remove_leftovers()

    def upload(self, root: Path, parts: Collection[str], as_of: str = "") -> None:
        """Upload files and folders of a local directory; the next index names them.

        A part that is not there any more is left out of the next index.

        Args:
            root: the local directory; nothing in the parts may change meanwhile.
            parts: names in it.
            as_of: folder in the published directory that stands for `root`, with a slash at its end.

        Raises:
            StoreError: a file could not be written.
        """
        with self._lock:
            self._upload(root, parts, as_of)

    def upload_all(self, root: Path, leave_out: Collection[str] = ()) -> None:
        """Upload all of a local directory, which is all that the next index names; else as `upload`."""
        with self._lock:
            self._files = {}
            names = [path.name for path in sorted(root.iterdir()) if path.name not in leave_out]
            self._upload(root, [name for name in names if not LEFTOVER.fullmatch(name)], "")

    def publish(self) -> None:
        """Make what was uploaded visible, if it differs from what is.

        Raises:
            StoreError: the index could not be written; the old one holds.
            PublishedError: another process has published meanwhile.
        """
        with self._lock:
            self._publish()

    def withdraw(self) -> None:
        """Remove what was published; the index goes first."""
        url, before = self.index.url, self.index
        if before.number:
            (url / OWN / _name(before.number)).remove()
        self.index, self._files = Index(url, 0, {}), {}
        self._remove_leftovers()

    def _upload(self, root: Path, parts: Collection[str], as_of: str) -> None:
        url, files = self.index.url, dict(self._files)
        there = {file.object for file in self.index.files.values()} | {f.object for f in files.values()}
        for part in parts:
            for known in [p for p in files if p == as_of + part or p.startswith(f"{as_of}{part}/")]:
                del files[known]
            source = root / part
            found = sorted(source.rglob("*")) if source.is_dir() else [source] if source.is_file() else []
            for file in found:
                if not file.is_file():
                    continue
                path, digest = as_of + file.relative_to(root).as_posix(), sha256(file)
                made = File(file.stat().st_size, digest, object_name(path, digest))
                if made.object not in there:
                    (url / made.object).upload(file)
                files[path] = made
        self._files = files

    def _remove_leftovers(self) -> None:
        url, known = self.index.url, {file.object for file in self.index.files.values()}
        found = url.walk()
        inner = {path.rpartition(f"/{OWN}/")[0] for path in found if f"/{OWN}/" in path}
        for path in found.keys() - known:
            if OBJECT.fullmatch(path) and not any(path.startswith(f"{folder}/") for folder in inner):
                (url / path).remove()

    def _publish(self) -> None:
        before, url = self.index, self.index.url
        if before.number and self._files == dict(before.files):
            return
        number = before.number + 1
        content = {"format_version": FORMAT_VERSION, "files": {p: asdict(f) for p, f in self._files.items()}}
        if not (url / OWN / _name(number)).create((json.dumps(content, indent=1) + "\n").encode()):
            raise PublishedError(
                f"{url} was published by another process meanwhile; nothing of this one is visible there"
            )
        if read_index(url).number != number:  # the number was free again behind newer ones
            raise PublishedError(f"{url} was published by another process meanwhile; its results stay")
        self.index = Index(url, number, self._files)
        kept = {file.object for file in self._files.values()}
        for old in {file.object for file in before.files.values()} - kept:
            (url / old).remove()
        if before.number:
            (url / OWN / _name(before.number)).remove()


def object_name(path: str, digest: str) -> str:
    """Name of the object that holds a file.

    >>> object_name("best/model.json", "0123456789abcdef0123")
    'best/model.0123456789abcdef.json'
    """
    pure = PurePosixPath(path)
    return str(pure.with_name(f"{pure.stem}.{digest[:DIGITS]}{pure.suffix}"))


def refuse_unsafe(url: Url, creating: Collection[str]) -> None:
    """Refuse to write where two writers could not be told apart, or among files of other origin.

    Raises:
        StoreError: the store has no conditional writes.
        OutputExists: there are files that were not published there.
    """
    if url.scheme not in creating:
        raise StoreError(
            f"{url}: results can be written to {', '.join(sorted(creating))}; {url.scheme} has no "
            "conditional writes, so that two writers would mix their results; write to a local directory "
            "and copy it"
        )
    found = url.walk()
    if found and not any(path.startswith(f"{OWN}/") for path in found):
        raise OutputExists(
            f"{url} holds files that were put there by other means, such as {min(found)}; choose another one"
        )


def _name(number: int) -> str:
    return f"index-{number:06d}.json"
