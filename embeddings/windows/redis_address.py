"""Where something lies in Redis, and what its failures mean to callers; needs no Redis client.

`redis_connection.py` connects to such a place, and needs the extra `redis`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from mim_torchrec.errors import ExpectedError, OptionError, Status

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
CLUSTER, SENTINEL = "+cluster", "+sentinel"
SENTINEL_PORT = 26379
PASSWORD, PASSWORD_FILE = "MIM_REDIS_PASSWORD", "MIM_REDIS_PASSWORD_FILE"
"""Variables of the environment with the password of servers whose URL names no file, or with a file of it."""
SENTINEL_PASSWORD = "MIM_REDIS_SENTINEL_PASSWORD"
"""Variable of the environment with the password of sentinels; without it they need none."""


class RedisUnavailable(ExpectedError, ConnectionError):
    """The server cannot be reached, or is still loading. The request can be repeated."""

    status = Status.ENVIRONMENT


class RedisFull(ExpectedError, OSError):
    """The server has no memory left for the write. Existing data is intact."""

    status = Status.ENVIRONMENT


@dataclass(frozen=True)
class RedisAddress:
    """Where something lies in Redis.

    Args:
        url: of the server, as redis-py reads it, with TLS options and without user and password. Where
            sentinels know the server, its host is theirs, with a comma between two.
        cluster: whether it is a cluster.
        name: what all keys begin with.
        user: of its ACL, None for the default one.
        password_file: with the password; None for that of the environment.
        service: what sentinels call the server; None where the URL is its own.
    """

    url: str
    cluster: bool
    name: str
    user: str | None = None
    password_file: Path | None = None
    service: str | None = None

    def __str__(self) -> str:
        """The address without user and options."""
        parts = urlsplit(self.url)
        scheme, path = parts.scheme, parts.path
        if self.service is not None:
            scheme, path = scheme + SENTINEL, f"/{self.service}{path}"
        return urlunsplit((scheme, parts.netloc, path, "", self.name))

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """Host and port of every sentinel."""
        found = [urlsplit(f"//{host}") for host in urlsplit(self.url).netloc.split(",")]
        return [(one.hostname or "localhost", one.port or SENTINEL_PORT) for one in found]

    def password(self) -> str | None:
        """The password as it is now: it may be changed while a program runs. None where there is none.

        Raises:
            OptionError: its file cannot be read, or there is a user and no password.
        """
        file = self.password_file or os.environ.get(PASSWORD_FILE)
        if file is None:
            found = os.environ.get(PASSWORD)
            if found is None and self.user is not None:
                raise OptionError(f"{self} has the user {self.user} and no password: {_WHERE}")
            return found
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{self}: its password cannot be read: {error}") from None


_WHERE = f"give it in {PASSWORD} or in a file that {PASSWORD_FILE} or ?password_file= of the URL names"


def refuse_password(where: str) -> None:
    """See that a URL holds no password: URLs stand in the list of processes, in logs and in release files.

    Raises:
        OptionError: it holds one.
    """
    parts = urlsplit(where)
    if parts.password is not None or "password" in dict(parse_qsl(parts.query)):
        host = parts.netloc.rpartition("@")[2]
        raise OptionError(
            f"the URL of {parts.scheme}://{host} holds a password, which others can read: {_WHERE}"
        )


def is_redis(where: str) -> bool:
    """Whether a place is a URL of Redis and not a directory."""
    return "://" in where


def locate(where: str) -> RedisAddress:
    """Read a URL.

    Args:
        where: `redis://`, `rediss://` (TLS) or `unix://`, with `+cluster` behind the scheme for a cluster,
            and the name that all keys begin with behind a `#` (by default `mim`):
            `rediss://user@host:6379/0?password_file=/run/secrets/redis#shop`. With `+sentinel` behind the
            scheme, the hosts are those of sentinels, and the path begins with what they call the server:
            `redis+sentinel://one:26379,two:26379/mymaster/0#shop`.

    Raises:
        OptionError: it is no such URL, it holds a password, or sentinels are not told which server is meant.

    >>> str(locate("rediss+cluster://rim@host:7000#shop")), locate("redis://host").name
    ('rediss://host:7000#shop', 'mim')
    >>> locate("redis+sentinel://one,two:7000/mymaster").sentinels
    [('one', 26379), ('two', 7000)]
    """
    parts = urlsplit(where)
    if parts.scheme not in SCHEMES:
        raise OptionError(f"{parts.scheme}:// is none of {', '.join(scheme + '://' for scheme in SCHEMES)}")
    if set("{}") & set(parts.fragment):
        raise OptionError(f"{parts.fragment!r}: a name of keys has no braces")
    refuse_password(where)
    options = dict(parse_qsl(parts.query))
    file = options.pop("password_file", None)
    scheme, host = parts.scheme.partition("+")[0], parts.netloc.rpartition("@")[2]
    path, service = parts.path, None
    if parts.scheme.endswith(SENTINEL):
        service, _, database = path.strip("/").partition("/")
        if not service:
            raise OptionError(f"{parts.scheme}://{host} names no server: write /<what sentinels call it>")
        path = f"/{database}" if database else ""
    return RedisAddress(
        url=urlunsplit((scheme, host, path, urlencode(options), "")),
        service=service,
        cluster=parts.scheme.endswith(CLUSTER),
        name=parts.fragment or "mim",
        user=unquote(parts.username) if parts.username else None,
        password_file=None if file is None else Path(file),
    )
