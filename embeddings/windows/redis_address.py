"""Where something lies in Redis, and what its failures mean to callers; needs no Redis client.

`redis_connection.py` connects to such a place, and needs the extra `redis`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from mim_torchrec.errors import ExpectedError, OptionError, Status

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
CLUSTER = "+cluster"
PASSWORD, PASSWORD_FILE = "MIM_REDIS_PASSWORD", "MIM_REDIS_PASSWORD_FILE"
"""Variables of the environment with the password of servers whose URL names no file, or with a file of it."""


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
        url: of the server, as redis-py reads it, with TLS options and without user and password.
        cluster: whether it is a cluster.
        name: what all keys begin with.
        user: of its ACL, None for the default one.
        password_file: with the password; None for that of the environment.
    """

    url: str
    cluster: bool
    name: str
    user: str | None = None
    password_file: Path | None = None

    def __str__(self) -> str:
        """The address without user and options."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path, "", self.name))

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
            `rediss://user@host:6379/0?password_file=/run/secrets/redis#shop`.

    Raises:
        OptionError: it is no such URL, or it holds a password.

    >>> str(locate("rediss+cluster://rim@host:7000#shop")), locate("redis://host").name
    ('rediss://host:7000#shop', 'mim')
    """
    parts = urlsplit(where)
    if parts.scheme not in SCHEMES:
        raise OptionError(f"{parts.scheme}:// is none of {', '.join(scheme + '://' for scheme in SCHEMES)}")
    if set("{}") & set(parts.fragment):
        raise OptionError(f"{parts.fragment!r}: a name of keys has no braces")
    refuse_password(where)
    options = dict(parse_qsl(parts.query))
    file = options.pop("password_file", None)
    scheme, host = parts.scheme.removesuffix(CLUSTER), parts.netloc.rpartition("@")[2]
    return RedisAddress(
        url=urlunsplit((scheme, host, parts.path, urlencode(options), "")),
        cluster=parts.scheme.endswith(CLUSTER),
        name=parts.fragment or "mim",
        user=unquote(parts.username) if parts.username else None,
        password_file=None if file is None else Path(file),
    )
