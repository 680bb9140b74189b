"""Serve the current release of a folder: swap whenever another one is promoted, and try again what failed."""

import logging
import threading
import time
from dataclasses import replace

from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.releases import ReleaseError, Releases
from mim_torchrec.serving.service import Deployment, ReleaseState, Service

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the current release
PAUSES = (1.0, 60.0)  # seconds before a release that failed is tried again: at first, and at most


def deployment_of(releases: Releases, name: str) -> Deployment:
    """What a release serves.

    Raises:
        ReleaseError: there is no such release, or it cannot be read.
    """
    return replace(releases.read(name).deployment(), release=name)


class ReleaseFollower:
    """Keeps a service at the current release.

    Args:
        releases: the folder.
        served: name of the release that is served.
        service: that serves it.
        metrics: are told what is wanted.
    """

    def __init__(self, releases: Releases, served: str, service: Service, metrics: Metrics) -> None:
        self._releases, self._service, self._metrics = releases, service, metrics
        self._wake = threading.Event()
        self._pause, self._next_try = PAUSES[0], 0.0
        self._note(ReleaseState(served, served))

    def wake(self) -> None:
        """Look at once, and try again at once what failed."""
        self._next_try = 0.0
        self._wake.set()

    def run(self) -> None:
        """Look at the folder until the process ends."""
        while True:
            self._wake.wait(LOOK_EVERY)
            self._wake.clear()
            self.look()

    def look(self) -> None:
        """Look at the folder once, and swap if another release is current."""
        state = self._service.release
        assert state is not None  # __init__ has set it
        wanted: str | None = None
        try:
            wanted, _ = self._releases.current()
            if wanted is None:
                raise ReleaseError(f"{self._releases.root} has no current release any more")
            if wanted == state.served:
                if state.problem is not None:
                    log.warning("release %s is current, and served", wanted)
                self._pause, self._next_try = PAUSES[0], 0.0
                self._note(ReleaseState(wanted, wanted))
                return
            if wanted != state.wanted:
                self._pause, self._next_try = PAUSES[0], 0.0
            if time.monotonic() < self._next_try:
                return
            self._service.swap(deployment_of(self._releases, wanted))
            self._pause, self._next_try = PAUSES[0], 0.0
            self._note(ReleaseState(wanted, wanted))
        except Exception as error:
            said = wanted or "that is current"
            problem = f"release {said} cannot be served, {state.served} still is: {error}"
            if problem != state.problem:
                log.warning("%s; trying again until it works", problem, exc_info=error)
            self._next_try = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, PAUSES[1])
            self._note(ReleaseState(wanted, state.served, problem))

    def _note(self, state: ReleaseState) -> None:
        self._service.release = state
        self._metrics.show(self._metrics.wanted, state.wanted or "")
