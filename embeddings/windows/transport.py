"""Transport of windows from encoders to all readers of vectors: a directory, or a Redis stream."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mim_torchrec.embeddings.remote.places import in_object_store
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.redis_address import is_redis
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError


class Transport(Protocol):
    """A durable, ordered, idempotent log of windows of one table version; see `WindowLog`."""

    table_version: str

    def last_seq(self) -> int: ...
    def first_seq(self) -> int: ...
    def size(self) -> int: ...
    def append(
        self,
        window_id: str,
        ids: Tensor,
        vectors: Tensor,
        *,
        dtype: str = ...,
        removed: Tensor | None = ...,
        seq: int | None = ...,
    ) -> int: ...
    def names(self) -> list[str]: ...
    def read(self, seq: int) -> Window: ...
    def wait(self, seq: int, timeout: float) -> bool: ...
    def after(self, seq: int) -> Iterator[Window]: ...
    def forget(self, through: int, min_age: float = ...) -> int: ...


def open_log(where: str | Path, table_version: str, start: int | None = None) -> Transport:
    """Open a log, or begin one.

    Args:
        where: a directory, or a URL of Redis (see `redis_address.locate`).
        table_version: that all of its windows have.
        start: where there is no log, begin one whose first window follows this seq of a base table; None
            makes a missing log an error.

    Raises:
        VersionMismatch: the log is of another version.
        TableError: there is no log.
        OptionError: it is in an object store.
        RedisUnavailable: the server does not answer.
        MissingExtra: a URL, and the extra `redis` is not installed.
    """
    if in_object_store(where):
        raise OptionError(
            f"{where}: a window log lies in a directory, where a hard link gives a window its number, or in "
            "Redis; an object store has no link. Give a directory that all see, or a Redis URL"
        )
    if is_redis(str(where)):
        from mim_torchrec.embeddings.windows.redis_log import RedisWindowLog  # needs the extra `redis`

        return RedisWindowLog(str(where), table_version, start)
    return WindowLog(where, table_version, start)
