"""The model and the vectors that are served, and how a new deployment replaces them without downtime.

A new deployment is opened, brought up to date with its windows and tested before it is served. Requests that
have begun end with their deployment. If the new one fails, the old one stays in service.
"""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.stores.store import ParameterStore, catch_up, follow
from mim_torchrec.embeddings.windows.transport import Transport, open_log
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.scorer import Scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is served together: a model and its vectors.

    Args:
        bundle: directory or URL.
        store: directory or URL of the table, or URL of the store; None for Base.
        id_store: URL of the store with the ID tables, None for those of the bundle.
        windows: directory or URL of the log to follow, None for a store that others keep up.
    """

    bundle: Path | Url
    store: str | None = None
    id_store: str | None = None
    windows: str | None = None


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
        metrics: are told of windows.
    """

    def __init__(self, deployment: Deployment, cache: int, metrics: Metrics) -> None:
        self.deployment = deployment
        self.scorer = Scorer(Bundle.open(deployment.bundle), deployment.store, deployment.id_store, cache)
        self.problem: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if deployment.windows is not None:
            if self.scorer.mm is None:
                raise OptionError(f"{deployment.bundle} is Base, which has no vectors for windows to change")
            follower = _Follower(self.scorer, self.scorer.mm, metrics)
            windows = open_log(deployment.windows, follower.table_version, start=follower.seq)
            catch_up(follower, windows)
            self._thread = threading.Thread(target=self._follow, args=(follower, windows), daemon=True)
            self._thread.start()

    @property
    def model_version(self) -> str:
        return self.scorer.bundle.model_version

    def close(self) -> None:
        """Follow no windows any more."""
        self._stop.set()

    def _follow(self, follower: _Follower, windows: Transport) -> None:
        try:
            follow(follower, windows, self._stop)
        except Exception as error:
            # scores go on with the vectors that there are; readiness says so
            self.problem = f"windows are no longer followed: {error}"
            log.exception("windows are no longer followed")


class Service:
    """What is served now.

    Args:
        deployment: to begin with.
        cache: matrices of histories to keep.
        metrics: are told of swaps and windows.

    Raises:
        OptionError: the deployment cannot be served.
    """

    def __init__(self, deployment: Deployment, cache: int, metrics: Metrics) -> None:
        self._cache, self._metrics = cache, metrics
        self._lock = threading.Lock()
        self.current = Served(deployment, cache, metrics)

    def swap(self, deployment: Deployment) -> None:
        """Replace the deployment that is served.

        Raises:
            Exception: it cannot be served; the one before still is.
        """
        with self._lock:
            try:
                made = Served(deployment, self._cache, self._metrics)
            except BaseException:
                self._metrics.swaps.labels("refused").inc()
                raise
            before, self.current = self.current, made
            before.close()
            self._metrics.swaps.labels("done").inc()
            log.info("serving model %s of %s", made.model_version, deployment.bundle)

    def close(self) -> None:
        """End."""
        self.current.close()
