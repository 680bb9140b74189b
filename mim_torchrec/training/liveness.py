"""Which ranks still run: every rank reports itself, so that whoever waits can say for whom.

A collective that waits for a stopped rank says nothing, and an error after its timeout names nobody. Here a
thread of every rank writes a counter, its host and its place in the run into the store of the process group.
A rank whose counter stands still has stopped or lost its link; one whose place is behind is still busy.
"""

import json
import logging
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from mim_torchrec.errors import ExpectedError, Status

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two reports of a rank."""
SILENCE = 5.0
"""Seconds without a report after which a rank counts as silent."""


class RankStalled(ExpectedError, RuntimeError):
    """Ranks waited for others for longer than they may."""

    status = Status.ENVIRONMENT


@dataclass(frozen=True)
class Report:
    """The last that a rank said of itself."""

    count: int = 0
    host: str = "unknown"
    places: int = 0
    place: str = "the start"

    def __str__(self) -> str:
        return f"on host {self.host}, last seen at {self.place}"


class Liveness:
    """Reports this rank, and says which others are silent or behind.

    Args:
        store: of the process group; this object gets a connection of its own.
        rank: this process.
        world_size: how many there are.
        patience: seconds in one place after which whoever is waited for is logged, again and again.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, patience: float = 30.0) -> None:
        self._store, self._rank, self._world_size, self._patience = store.clone(), rank, world_size, patience
        self._store.set_timeout(timedelta(seconds=SILENCE))
        self._host = socket.gethostname()
        self._own = (0, Report().place)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._report(1)
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Say where in the run this rank is, as "epoch 0, step 12"; ranks go through the same places."""
        self._own = (self._own[0] + 1, place)

    def waits_for(self) -> str:
        """Who is waited for here, in words; takes `SILENCE` seconds. Empty if no rank is silent or behind."""
        try:
            before = self._reports()
            time.sleep(SILENCE)
            after = self._reports()
        except (dist.DistError, RuntimeError) as error:
            return f"the store of the ranks, which does not answer ({error})"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        silent = [rank for rank in others if after[rank].count == before[rank].count]
        behind = [rank for rank in others if rank not in silent and after[rank].places < self._own[0]]
        said = [f"rank {rank} {after[rank]}, which does not report any more" for rank in silent]
        return "; ".join(said or [f"rank {rank} {after[rank]}" for rank in behind])

    def stalled(self, error: RuntimeError) -> RankStalled:
        """The error of a collective that ran into its timeout, with who was waited for."""
        found = self.waits_for() or "a rank that reports itself; its own log says what it does"
        return RankStalled(f"{self._own[1]}: timed out waiting for {found} ({error})")

    def close(self) -> None:
        """Report no more."""
        self._ended.set()
        self._thread.join(timeout=SILENCE)

    def _run(self) -> None:
        count, since, seen = 1, time.monotonic(), self._own
        while not self._ended.wait(INTERVAL):
            count += 1
            try:
                self._report(count)
            except (dist.DistError, RuntimeError):
                continue  # whoever hosted the store has ended; the next collective says so
            if self._own != seen:
                since, seen = time.monotonic(), self._own
            elif time.monotonic() - since > self._patience:
                since = time.monotonic()
                found = self.waits_for()
                if found:
                    log.warning("%s: waiting for %s", self._own[1], found)

    def _report(self, count: int) -> None:
        places, place = self._own
        with self._lock:
            self._store.set(f"liveness/{self._rank}", json.dumps([count, self._host, places, place]))

    def _reports(self) -> list[Report]:
        keys = [f"liveness/{rank}" for rank in range(self._world_size)]
        with self._lock:
            return [
                Report(*json.loads(self._store.get(key))) if self._store.check([key]) else Report()
                for key in keys
            ]
