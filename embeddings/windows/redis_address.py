"""Where something lies in Redis, and what its failures mean to callers; needs no Redis client.

`redis_connection.py` connects to such a place, and needs the extra `redis`.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from mim_torchrec.errors import ExpectedError, OptionError, Status

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
CLUSTER = "+cluster"


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
        url: of the server, as redis-py reads it, with user, password and TLS options.
        cluster: whether it is a cluster.
        name: what all keys begin with.
    """

    url: str
    cluster: bool
    name: str

    def __str__(self) -> str:
        """The address without the password."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", self.name))


def is_redis(where: str) -> bool:
    """Whether a place is a URL of Redis and not a directory."""
    return "://" in where


def locate(where: str) -> RedisAddress:
    """Read a URL.

    Args:
        where: `redis://`, `rediss://` (TLS) or `unix://`, with `+cluster` behind the scheme for a cluster,
            and the name that all keys begin with behind a `#` (by default `mim`):
            `rediss://user:password@host:6379/0#shop`.

    Raises:
        OptionError: it is no such URL.

    >>> str(locate("rediss+cluster://u:secret@host:7000#shop")), locate("redis://host").name
    ('rediss://host:7000#shop', 'mim')
    """
    parts = urlsplit(where)
    if parts.scheme not in SCHEMES:
        raise OptionError(f"{parts.scheme}:// is none of {', '.join(scheme + '://' for scheme in SCHEMES)}")
    if set("{}") & set(parts.fragment):
        raise OptionError(f"{parts.fragment!r}: a name of keys has no braces")
    scheme = parts.scheme.removesuffix(CLUSTER)
    url = urlunsplit((scheme, parts.netloc, parts.path, parts.query, ""))
    return RedisAddress(url, parts.scheme.endswith(CLUSTER), parts.fragment or "mim")
