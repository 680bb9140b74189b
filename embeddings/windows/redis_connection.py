"""Connections to Redis, Valkey and clusters of them; needs the extra `redis`.

Where sentinels know the primary, every new connection asks them for it. A connection that is lost, or is to a
primary that has become a replica, is replaced by one to the new primary.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from mim_torchrec.embeddings.windows.redis_address import (
    SENTINEL_PASSWORD,
    RedisAddress,
    RedisFull,
    RedisUnavailable,
)
from mim_torchrec.errors import OptionError
from mim_torchrec.extras import needs

with needs("redis"):
    import redis
    from redis.backoff import ExponentialBackoff, NoBackoff
    from redis.cluster import RedisCluster
    from redis.credentials import CredentialProvider
    from redis.exceptions import RedisError
    from redis.retry import Retry
    from redis.sentinel import Sentinel

ATTEMPTS = 3
TIMEOUT = 5.0  # seconds of one attempt


def connect(location: RedisAddress, timeout: float | None = None) -> Any:
    """A `redis.Redis` or `RedisCluster` that connects at its first use, and again after a lost connection.

    Its type is `Any`: the two share no base class, and redis-py types answers as if they might be decoded.

    Args:
        location: of the server.
        timeout: seconds that a command may take. It is sent again once if the connection was lost, and not if
            the time has passed. None is TIMEOUT, with ATTEMPTS repetitions. All sentinels together may take
            as long again, where a connection is new.
    """
    if timeout is None:
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), ATTEMPTS)
    else:
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
    seconds = timeout or TIMEOUT
    credentials = None if location.password() is None else _Credentials(location)
    make = RedisCluster.from_url if location.cluster else redis.Redis.from_url
    if location.service is not None:
        return _primary(location, seconds, retry, credentials)
    with reachable(location):
        return make(location.url, socket_timeout=seconds, socket_connect_timeout=seconds, retry=retry,
                    credential_provider=credentials)  # fmt: skip


def _primary(
    location: RedisAddress, seconds: float, retry: Retry, credentials: "_Credentials | None"
) -> redis.Redis:
    """A client of the server that sentinels call the primary."""
    assert location.service is not None
    options = redis.connection.parse_url(urlsplit(location.url)._replace(netloc="any").geturl())
    if options.pop("connection_class", None) is not None:
        options["ssl"] = True
    encryption = {name: value for name, value in options.items() if name.startswith("ssl")}
    share = seconds / len(location.sentinels)
    sentinel = Sentinel(
        location.sentinels,
        sentinel_kwargs={
            **encryption, "password": os.environ.get(SENTINEL_PASSWORD), "socket_timeout": share,
            "socket_connect_timeout": share, "retry": Retry(NoBackoff(), 0),
        },
    )  # fmt: skip
    client: redis.Redis = sentinel.master_for(
        location.service, socket_timeout=seconds, socket_connect_timeout=seconds, retry=retry,
        credential_provider=credentials, **options,
    )  # fmt: skip
    return client


class _Credentials(CredentialProvider):
    """User and password, read again for every new connection."""

    def __init__(self, location: RedisAddress) -> None:
        self._location = location

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._location.password() or ""
        return (password,) if self._location.user is None else (self._location.user, password)


@contextmanager
def reachable(location: RedisAddress) -> Iterator[None]:
    """Turn the errors of the client into ours.

    Raises:
        RedisUnavailable: the server is not there.
        RedisFull: it has no memory left.
        OptionError: the URL says that it is a cluster, or none, and it is the other.
    """
    try:
        yield
    except (redis.exceptions.MovedError, redis.exceptions.ClusterCrossSlotError) as error:
        if not location.cluster:
            raise _of_a_cluster(location) from None
        raise RedisUnavailable(f"{location} is not ready: its slots move: {error}") from error
    except redis.exceptions.RedisClusterException as error:
        if "Cluster mode is not enabled" in str(error):
            raise OptionError(f"{location} is no cluster: write redis:// or rediss://") from None
        raise RedisUnavailable(f"{location} does not answer: {error}") from error
    except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ClusterError) as error:
        if isinstance(error, redis.AuthenticationError):
            raise RedisUnavailable(f"{location} refuses the user or the password: {error}") from error
        raise RedisUnavailable(f"{location} does not answer: {error}") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise RedisFull(f"{location} has no memory left: {error}") from error
    except RedisError as error:
        # what a script runs into comes as its own kind of error
        if "OOM " in str(error):
            raise RedisFull(f"{location} has no memory left: {error}") from error
        if any(
            word in str(error) for word in ("LOADING", "CLUSTERDOWN", "READONLY", "MASTERDOWN", "TRYAGAIN")
        ):
            raise RedisUnavailable(f"{location} is not ready: {error}") from error
        raise


def check_kind(client: Any, location: RedisAddress) -> None:
    """See that what is not to be a cluster is none: some keys would lie on this server by chance.

    Raises:
        OptionError: it is a server of a cluster.
    """
    if not location.cluster and client.info("cluster").get("cluster_enabled"):
        raise _of_a_cluster(location)


def _of_a_cluster(location: RedisAddress) -> OptionError:
    return OptionError(f"{location} is a server of a cluster: write redis+cluster:// or rediss+cluster://")
