"""Where something lies: a local path, or a URL of a store that fsspec knows, such as s3://bucket/folder.

`Place` is the type of such a field of a configuration, `LocalPath` that of a field which must be local. A
`Url` is no path: what would use one as a local path fails, and does not make a folder named `s3:`. `file://`
is a local path. Credentials and endpoints come from the environment, as the store's own tools read them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, cast

import tyro

from mim_torchrec.errors import ExpectedError, OptionError, Status, one_line

URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
CREATING = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Schemes whose package of fsspec creates an object only where there is none, in one request."""
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}


class NoSuchPlace(ExpectedError, FileNotFoundError):
    """There is nothing at a URL, not even its bucket; or its scheme is unknown."""

    status = Status.DATA

    def __str__(self) -> str:
        return str(self.args[0])


class StoreError(ExpectedError, OSError):
    """An object store refuses, does not answer, or cannot do what is needed."""

    status = Status.ENVIRONMENT


@dataclass(frozen=True)
class Stat:
    """Size of an object in bytes, and what changes with its content: an ETag, a time."""

    size: int
    mark: str


class Url:
    """A place in an object store.

    Args:
        text: `scheme://bucket/folder`.

    >>> str(Url("s3://bucket/shop/") / "items"), Url("s3://bucket/shop").name
    ('s3://bucket/shop/items', 'shop')
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        found = URL.fullmatch(text)
        if found is None:
            raise OptionError(f"{text!r} is no URL")
        self._text = f"{found['scheme']}://{found['rest'].rstrip('/')}"

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Url({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self._text == other._text

    def __lt__(self, other: "Url") -> bool:
        return self._text < other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[type["Url"], tuple[str]]:
        return Url, (self._text,)

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self._text}/{name}")

    @property
    def scheme(self) -> str:
        """What stands before ``://``."""
        return self._text.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self._text.partition("://")[2]).name

    @property
    def parents(self) -> list["Url"]:
        """The folders that it lies in, the nearest first; the last one is the bucket."""
        scheme, _, rest = self._text.partition("://")
        parts = rest.split("/")
        return [Url(f"{scheme}://{'/'.join(parts[:k])}") for k in range(len(parts) - 1, 0, -1)]

    def stat(self) -> Stat:
        """Size and mark of an object. Raises NoSuchPlace if there is none."""
        with self.reported() as (store, path):
            return _stat(store.info(path))

    def modified(self) -> float:
        """When an object was written, by the clock of the store, in seconds."""
        with self.reported() as (store, path):
            return store.modified(path).timestamp()

    def open(self) -> IO[bytes]:
        """An object to read at any position; nothing is read ahead."""
        with self.reported() as (store, path):
            return cast(IO[bytes], store.open(path, "rb", cache_type="none"))

    def read_bytes(self) -> bytes:
        """The content of an object. Raises NoSuchPlace if there is none."""
        with self.reported() as (store, path):
            return store.cat_file(path)

    def write_bytes(self, data: bytes) -> None:
        """Write an object, in the place of one that is there."""
        with self.reported() as (store, path):
            store.pipe_file(path, data)

    def create(self, data: bytes) -> bool:
        """Write an object that must not be there; of several writers one succeeds.

        Returns:
            Whether this one did; False where there is one.
        """
        with self.reported() as (store, path):
            try:
                store.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True

    def upload(self, file: Path) -> None:
        """Write an object from a local file."""
        with self.reported() as (store, path):
            store.put_file(str(file), path)

    def download(self, file: Path) -> None:
        """Write a local file from an object."""
        with self.reported() as (store, path):
            store.get_file(path, str(file))

    def remove(self) -> None:
        """Remove an object, if there is one."""
        with suppress(NoSuchPlace), self.reported() as (store, path):
            store.rm_file(path)

    def list(self) -> dict[str, Stat]:
        """Objects directly beneath, by name; {} where there is nothing."""
        try:
            with self.reported() as (store, path):
                found = store.ls(path, detail=True)
        except NoSuchPlace:
            return {}
        return {PurePosixPath(f["name"]).name: _stat(f) for f in found if f["type"] == "file"}

    def walk(self) -> dict[str, Stat]:
        """All objects beneath, by their path from here; {} where there is nothing."""
        with self.reported() as (store, path):
            found = store.find(path, detail=True)
        prefix = f"{path.strip('/')}/"
        names = {name.strip("/"): info for name, info in found.items() if info["type"] == "file"}
        return {n.removeprefix(prefix): _stat(info) for n, info in names.items() if n.startswith(prefix)}

    @contextmanager
    def reported(self) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it; errors of what is done with it become one line each.

        Raises:
            NoSuchPlace: fsspec does not know the scheme, or there is nothing.
            StoreError: a package is missing, or the store refuses or does not answer.
        """
        try:
            yield self._store()
        except ExpectedError:
            raise
        except FileNotFoundError as error:
            what = "no such bucket" if "bucket does not exist" in str(error) else "not found"
            raise NoSuchPlace(f"{self}: {what}; check the URL") from error
        except PermissionError as error:
            raise StoreError(
                f"{self}: access denied ({one_line(str(error))}); check the credentials and their rights"
            ) from error
        except (OSError, _client_error()) as error:
            text = one_line(str(error)) or type(error).__name__
            raise StoreError(
                f"{self}: {text}; check the credentials, the endpoint and the network"
            ) from error

    def _store(self) -> tuple[Any, str]:
        import fsspec  # comes with torch; imports nothing of a store

        if self.scheme not in fsspec.available_protocols():
            raise NoSuchPlace(f"{self}: fsspec knows no scheme {self.scheme!r}; check the URL")
        try:
            store, path = fsspec.core.url_to_fs(self._text)
        except ImportError as error:
            if self.scheme in ("s3", "s3a"):
                text = "no module 's3fs': python -m pip install 'mim-torchrec[s3]'"
            else:
                package = PACKAGES.get(self.scheme)
                text = f"python -m pip install {package}" if package else one_line(str(error))
            raise StoreError(f"{self}: {text}") from error
        store.invalidate_cache()  # others write too
        return store, path


def _stat(info: dict[str, Any]) -> Stat:
    mark = next(
        (info[k] for k in ("ETag", "etag", "md5Hash", "mtime", "created", "LastModified") if k in info), ""
    )
    if isinstance(
        mark, datetime
    ):  # a store may list seconds, and answer with a time when it is asked for one
        mark = mark.timestamp()
    return Stat(int(info["size"]), str(mark).strip('"'))


def _client_error() -> type[BaseException]:
    """Base of the errors of the client of S3 that are no OSError, if it is there."""
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return OSError
    return BotoCoreError


def place(text: "str | Path | Url") -> "Path | Url":
    """The place that a word names.

    >>> place("s3://bucket/shop"), place("file:///shop"), place("runs/shop")
    (Url('s3://bucket/shop'), PosixPath('/shop'), PosixPath('runs/shop'))
    """
    if isinstance(text, Path | Url):
        return text
    found = URL.fullmatch(text)
    if found is None:
        return Path(text)
    if found["scheme"].lower() in ("file", "local"):
        return Path(found["rest"])
    return Url(text)


def in_object_store(where: str | Path | Url) -> bool:
    """Whether a place that may also be in Redis, or in a store of one's own, is in one that fsspec knows.

    >>> [in_object_store(where) for where in ("s3://bucket/log", "redis://host/0#log", "runs/log")]
    [True, False, False]
    """
    import fsspec

    found = place(where)
    known = set(fsspec.available_protocols()) - {"http", "https"}
    return isinstance(found, Url) and found.scheme in known


def stat_of(file: Path | Url) -> tuple[int, int | str]:
    """Size of a file in bytes, and what changes with its content."""
    if isinstance(file, Url):
        found = file.stat()
        return found.size, found.mark
    local = file.stat()
    return local.st_size, local.st_mtime_ns


def local_path(text: str | Path) -> Path:
    """The path that a word names.

    Raises:
        OptionError: it is a URL of an object store.
    """
    found = place(text)
    if isinstance(found, Url):
        raise OptionError(f"{found} is in an object store; a local folder is needed here")
    return found


class _Word:
    """How pydantic reads a field: as a word of the command line."""

    def __init__(self, parse: Any) -> None:
        self._parse = parse

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._parse)


Place = Annotated[
    Path | Url,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: place(words[0]),
        is_instance=lambda value: isinstance(value, Path | Url),
        str_from_instance=lambda value: [str(value)],
    ),
    _Word(place),
]
"""A field that may be a URL."""

LocalPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: local_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
    _Word(local_path),
]
"""A field that must be a local path."""
