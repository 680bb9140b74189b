"""Stores as a server asks them: measured, and refused at once while they fail (a circuit breaker).

A store that does not answer costs the thread that scores its timeout. After FAILURES failures in a row it is
not asked for PAUSE seconds, and requests are refused at once. Then one request tries again. Readiness always
checks, so a store that is back is used again as soon as readiness was asked.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mim_torchrec.embeddings.stores.seen import Seen
from mim_torchrec.embeddings.stores.store import ParameterStore, SharedStore, check_store
from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.serving.metrics import Metrics

log = logging.getLogger(__name__)

FAILURES = 2
PAUSE = 0.5


class StoreFailed(ConnectionError):
    """A store gives no rows now: it cannot be reached, or has lost its data. The request can be repeated."""


class GuardedStore:
    """A `ParameterStore` around another.

    Args:
        name: for messages and metrics.
        store: the other.
        metrics: are told of latencies, failures and state.
    """

    def __init__(self, name: str, store: ParameterStore, metrics: Metrics) -> None:
        self.name, self.table_version, self.dim = name, store.table_version, store.dim
        self._store, self._metrics = store, metrics
        # a store that is not shared changes by `apply` alone
        self.seen = store.seen if isinstance(store, SharedStore) else Seen()
        self._lock = threading.Lock()
        self._failures = 0
        self._reason = ""
        self._next_try = 0.0
        metrics.store_up.labels(name).set(1)

    @property
    def seq(self) -> int:
        """See `ParameterStore`.

        Raises:
            StoreFailed: the store gives no answer.
        """
        try:
            return self._store.seq
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """See `SharedStore`.

        Raises:
            StoreFailed: the store gives no answer, or lookups will not be answered rightly.
        """
        with self._asked():
            check_store(self._store)

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `ParameterStore`.

        Raises:
            StoreFailed: the store gives no rows, or has not lately.
        """
        with self._lock:
            if self._failures >= FAILURES:
                now = time.monotonic()
                if now < self._next_try:
                    raise StoreFailed(f"the store of {self.name} fails: {self._reason}")
                self._next_try = now + PAUSE  # the others wait for what this one finds
        with self._metrics.spans.part(f"lookup {self.name}", ids=ids.numel()), self._asked():
            started = time.perf_counter()
            found = self._store.lookup(ids)
            self._metrics.store_seconds.labels(self.name).observe(time.perf_counter() - started)
            return found

    def apply(self, window: Window) -> bool:
        """See `ParameterStore`; its errors are those of the store."""
        return self._store.apply(window)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._failed(error) from error
        self._answered()

    def _failed(self, error: Exception) -> StoreFailed:
        self._metrics.store_errors.labels(self.name, cause_of(error)).inc()
        with self._lock:
            self._failures += 1
            self._reason = str(error)
            self._next_try = time.monotonic() + PAUSE
            is_first = self._failures == 1
        if is_first:
            self._metrics.store_up.labels(self.name).set(0)
            expected = isinstance(error, (OSError, TableError))
            log.warning("the store of %s fails: %s", self.name, error, exc_info=None if expected else error)
        return StoreFailed(f"the store of {self.name} fails: {error}")

    def _answered(self) -> None:
        with self._lock:
            had_failed, self._failures = self._failures > 0, 0
        if had_failed:
            self._metrics.store_up.labels(self.name).set(1)
            log.warning("the store of %s answers again", self.name)


def cause_of(error: Exception) -> str:
    """Why a store failed, for metrics: "unavailable", "lost" or "other".

    >>> cause_of(TableError("no table")), cause_of(ConnectionRefusedError())
    ('lost', 'unavailable')
    """
    if isinstance(error, TableError):
        return "lost"
    return "unavailable" if isinstance(error, OSError) else "other"
