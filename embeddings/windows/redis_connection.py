"""Connections to Redis, Valkey and clusters, and the errors that callers get when these fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.exceptions import RedisError
from redis.retry import Retry

from mim_torchrec.errors import ExpectedError, OptionError, Status

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
CLUSTER = "+cluster"
ATTEMPTS = 3
TIMEOUT = 5.0  # seconds of one attempt


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


def connect(location: RedisAddress) -> Any:
    """A `redis.Redis` or `RedisCluster` that connects at its first use, and again after a lost connection.

    Its type is `Any`: the two share no base class, and redis-py types answers as if they might be decoded.
    """
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), ATTEMPTS)
    make = RedisCluster.from_url if location.cluster else redis.Redis.from_url
    with reachable(location):
        return make(location.url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=retry)


@contextmanager
def reachable(location: RedisAddress) -> Iterator[None]:
    """Turn the errors of the client into ours.

    Raises:
        RedisUnavailable: the server is not there.
        RedisFull: it has no memory left.
    """
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ClusterError) as error:
        if isinstance(error, redis.AuthenticationError):
            raise
        raise RedisUnavailable(f"{location} does not answer: {error}") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise RedisFull(f"{location} has no memory left: {error}") from error
    except RedisError as error:
        # what a script runs into comes as its own kind of error
        if "OOM " in str(error):
            raise RedisFull(f"{location} has no memory left: {error}") from error
        if any(word in str(error) for word in ("LOADING", "CLUSTERDOWN", "READONLY", "MASTERDOWN")):
            raise RedisUnavailable(f"{location} is not ready: {error}") from error
        raise
