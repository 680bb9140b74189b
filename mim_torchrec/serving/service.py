"""The model and the vectors that are served, and how a new deployment replaces them without downtime.

A new deployment is opened, brought up to date with its windows and tested before it is served. Requests that
have begun end with their deployment. If the new one fails, the old one stays in service. Windows that cannot
be followed are tried again, less and less often.
"""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.stores.seen import Seen
from mim_torchrec.embeddings.stores.store import (
    ParameterStore,
    SharedStore,
    catch_up,
    check_store,
    follow,
    open_store,
)
from mim_torchrec.embeddings.windows.transport import Transport, open_log
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.guarded import GuardedStore
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.warm_up import warm_up

log = logging.getLogger(__name__)

PAUSES = (0.5, 30.0)  # seconds before windows are tried again: at first, and at most


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is served together: a model and its vectors.

    Args:
        bundle: directory or URL.
        store: directory or URL of the table, or URL of the store; None for Base.
        id_store: URL of the store with the ID tables, None for those of the bundle.
        windows: directory or URL of the log to follow, None for a store that others keep up.
        release: name of the release that it is; None of a deployment that was given by its parts.
    """

    bundle: Path | Url
    store: str | None = None
    id_store: str | None = None
    windows: str | None = None
    release: str | None = None


@dataclass(frozen=True)
class ReleaseState:
    """How far the server is with the current release.

    Attributes:
        wanted: name of the current release; None where it cannot be read.
        served: name of the release that is served.
        problem: why the two differ; None where they do not.
    """

    wanted: str | None
    served: str
    problem: str | None = None


class _Follower:
    """A store as `follow` sees it: windows go through the scorer, which keeps what it derived from rows."""

    def __init__(self, scorer: Scorer, store: ParameterStore, metrics: Metrics) -> None:
        self._scorer, self._store, self._metrics = scorer, store, metrics
        self.table_version, self.dim = store.table_version, store.dim

    @property
    def seq(self) -> int:
        return self._store.seq

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `ParameterStore`."""
        return self._store.lookup(ids)

    def apply(self, window: Window) -> bool:
        """See `ParameterStore`."""
        applied = self._scorer.apply(window)
        self._metrics.window.set(self._store.seq)
        return applied


class Served:
    """A deployment in service.

    Args:
        deployment: what to serve.
        cache: matrices to keep.
        metrics: are told of windows and stores.
        store_timeout: seconds that Redis may take to answer one command; None for those of other programs.
        seen: by place and version, what was read of shared stores before; it is added to.
    """

    def __init__(
        self,
        deployment: Deployment,
        cache: int,
        metrics: Metrics,
        store_timeout: float | None = None,
        seen: dict[tuple[str, str], Seen] | None = None,
    ) -> None:
        self.deployment = deployment
        self._metrics = metrics
        before = {} if seen is None else seen

        def open_guarded(name: str, where: str | Path, table_version: str) -> ParameterStore:
            store = open_store(where, table_version, store_timeout)
            if isinstance(store, SharedStore):
                store.seen = before.setdefault((str(where), table_version), store.seen)
            return GuardedStore(name, store, metrics)

        self.scorer = Scorer(Bundle.open(deployment.bundle), deployment.store, deployment.id_store, cache,
                             opener=open_guarded)  # fmt: skip
        warm_up(self.scorer)
        self.problem: str | None = None
        self._stop = threading.Event()
        self._pause = PAUSES[0]
        if deployment.windows is not None:
            if self.scorer.mm is None:
                raise OptionError(f"{deployment.bundle} is Base, which has no vectors for windows to change")
            follower = _Follower(self.scorer, self.scorer.mm, metrics)
            windows = open_log(deployment.windows, follower.table_version, start=follower.seq)
            catch_up(follower, windows)
            self._note_current()
            thread = threading.Thread(target=self._follow, args=(follower, windows), daemon=True)
            thread.start()

    @property
    def model_version(self) -> str:
        return self.scorer.bundle.model_version

    @property
    def window_seq(self) -> int | None:
        """The last window that the vectors have, None of Base.

        Raises:
            StoreFailed: their store gives no answer.
        """
        return None if self.scorer.mm is None else self.scorer.mm.seq

    def find_problem(self) -> str | None:
        """Why no scores can be given, or why vectors are not kept up; None where all is well.

        Every store is asked, until one does not answer.
        """
        for store in self.scorer.stores:
            try:
                check_store(store)
            except Exception as error:
                return str(error)
        return self.problem

    def close(self) -> None:
        """Follow no windows any more."""
        self._stop.set()

    def _follow(self, follower: _Follower, windows: Transport) -> None:
        while not self._stop.is_set():
            try:
                follow(follower, windows, self._stop, self._note_current)
            except Exception as error:
                # scores go on with the vectors that there are; readiness says so
                problem = f"windows are not followed: {error}"
                if problem != self.problem:
                    log.warning("%s; trying again until it works", problem, exc_info=error)
                self.problem = problem
                self._metrics.windows_followed.set(0)
                self._note_lag(follower, windows)
                self._stop.wait(self._pause)
                self._pause = min(2 * self._pause, PAUSES[1])

    def _note_current(self) -> None:
        """The vectors have all windows of the log."""
        if self.problem is not None:
            log.warning("windows are followed again")
        self.problem, self._pause = None, PAUSES[0]
        self._metrics.windows_followed.set(1)
        self._metrics.window_lag.set(0)
        self._metrics.windows_current.set(time.time())

    def _note_lag(self, follower: _Follower, windows: Transport) -> None:
        try:
            self._metrics.window_lag.set(windows.last_seq() - follower.seq)
        except (OSError, ValueError):  # the log or the store is away or damaged
            self._metrics.window_lag.set(float("nan"))


class Service:
    """What is served now.

    Args:
        deployment: to begin with.
        cache: matrices of histories to keep.
        metrics: are told of swaps, windows and stores.
        store_timeout: as of `Served`.

    Attributes:
        current: what is served.
        release: how far the server is with the current release; None where it follows none.

    Raises:
        OptionError: the deployment cannot be served.
    """

    def __init__(
        self, deployment: Deployment, cache: int, metrics: Metrics, store_timeout: float | None = None
    ) -> None:
        self._cache, self._metrics, self._store_timeout = cache, metrics, store_timeout
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], Seen] = {}
        self.current = Served(deployment, cache, metrics, store_timeout, self._seen)
        self.release: ReleaseState | None = None
        self._note_served()

    def swap(self, deployment: Deployment) -> None:
        """Replace the deployment that is served.

        Raises:
            Exception: it cannot be served; the one before still is.
        """
        with self._lock:
            try:
                made = Served(deployment, self._cache, self._metrics, self._store_timeout, self._seen)
            except BaseException:
                self._metrics.swaps.labels("refused").inc()
                raise
            before, self.current = self.current, made
            before.close()
            self._metrics.swaps.labels("done").inc()
            self._note_served()
            log.info("serving model %s of %s", made.model_version, deployment.bundle)

    def close(self) -> None:
        """End."""
        self.current.close()

    def _note_served(self) -> None:
        now = self.current
        table_version, release = now.scorer.bundle.table_version or "", now.deployment.release or ""
        self._metrics.show(self._metrics.served, now.model_version, table_version, release)
