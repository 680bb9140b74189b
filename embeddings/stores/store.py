"""The interface of a parameter store (§3.5, CMD): look rows up by id, and apply windows."""

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.places import in_object_store
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.stores.seen import Seen
from mim_torchrec.embeddings.table.manifest import TableLost
from mim_torchrec.embeddings.windows.transport import Transport
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError
from mim_torchrec.extensions import load_class

log = logging.getLogger(__name__)

WAIT = 0.5  # seconds between two looks at whether to stop


class ParameterStore(Protocol):
    """Vectors of one table version by item id, which windows change.

    Attributes:
        table_version: of the encoder that made the vectors.
        dim: length of a vector.
    """

    table_version: str
    dim: int

    @property
    def seq(self) -> int:
        """The last window that was applied everywhere."""

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors by id.

        Args:
            ids: (num_ids,) int64.

        Returns:
            float32 (num_ids, dim), zero where the store has none, and bool (num_ids,), whether it has one.

        Raises:
            RedisUnavailable: the store cannot be reached.
        """

    def apply(self, window: Window) -> bool:
        """Apply a window by the rule `is_due`; False where that has been done.

        Raises:
            VersionMismatch: the window is of another encoder.
            WindowGap: windows before it are missing.
            TableError: its vectors do not fit.
        """


@runtime_checkable
class SharedStore(Protocol):
    """A store whose rows others change as well; it can tell what has become of them.

    A store of your own need not be one. What is derived from its rows is then kept until a window changes
    them that came through `apply`.

    Attributes:
        seen: what lookups have read so far. One that replaces another of the same place can be given its.
    """

    seen: Seen

    def check(self) -> None:
        """See that lookups give what they gave before, or something newer.

        Raises:
            TableLost: rows were lost, or are older than they were.
            RedisUnavailable: the store cannot be reached.
        """


def check_store(store: ParameterStore) -> None:
    """See that a store gives rows, as far as it can tell.

    Raises:
        Exception: it does not; see `SharedStore.check` and `ParameterStore.lookup`.
    """
    if isinstance(store, SharedStore):
        store.check()
    else:
        _ = store.seq


def catch_up(store: ParameterStore, windows: Transport) -> int:
    """Apply the windows that a log has after a store's watermark; returns how many were applied."""
    return sum(store.apply(window) for window in windows.after(store.seq))


def follow(
    store: ParameterStore, windows: Transport, stop: Event, on_current: Callable[[], None] = lambda: None
) -> None:
    """Apply windows as they come, until told to stop.

    A server or disk that is gone or full is waited for, and so is a table or a log that a server has lost: it
    may be loaded again.

    Args:
        store: to apply them to.
        windows: the log.
        stop: ends it.
        on_current: called whenever the store has all windows of the log.

    Raises:
        WindowGap: the log has forgotten windows that the store lacks: load a newer base table.
        VersionMismatch: a window is of another encoder.
        TableError: a window is damaged or does not fit.
    """
    away = False
    while not stop.is_set():
        try:
            if windows.wait(store.seq, WAIT):
                catch_up(store, windows)
            on_current()
            if away:
                log.warning("reached again; windows applied up to %d", store.seq)
            away = False
        except (OSError, TableLost) as error:  # RedisUnavailable, RedisFull, a directory that is away
            if not away:
                log.warning("%s; trying again until it works", error)
            away = True
            stop.wait(WAIT)


def is_remote(where: str | Path) -> bool:
    """Whether a place is the URL of a store, which others keep up, and not the directory of a table."""
    return "://" in str(where) and not in_object_store(where)


def open_store(
    where: str | Path, table_version: str | None = None, timeout: float | None = None
) -> ParameterStore:
    """Open a store.

    Args:
        where: directory of a table, or its URL in an object store; or URL of Redis into which a table was
            loaded; or a URL whose scheme is `package.module:ClassName` of a store of your own, with a class
            method `open(where, table_version)`.
        table_version: that it must have; a store behind a URL holds any number of them.
        timeout: seconds that Redis may take to answer one command, which is then not sent again; None waits
            and repeats as long as programs do that nobody waits for. A store of your own has its own.

    Raises:
        VersionMismatch: it is of another version.
        TableError: there is none.
        ValueError: a URL without a table_version, or of a class that there is not.
        MissingExtra: a URL of Redis, and the extra `redis` is not installed.
    """
    if not is_remote(where):
        return EmbeddedStore.open(fetched(where), table_version)
    if table_version is None:
        raise OptionError(f"{where} may hold several versions: say which table_version is meant")
    scheme = str(where).partition("://")[0]
    if ":" in scheme:
        opener: Any = load_class(scheme)
        return opener.open(str(where), table_version)
    from mim_torchrec.embeddings.stores.redis_store import RedisStore  # needs the extra `redis`

    return RedisStore.open(str(where), table_version, timeout)
