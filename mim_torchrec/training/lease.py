"""Who writes into a directory of results: one process at a time, known by name.

The holder writes down who it is and gives a sign of life every few seconds. A lease is taken over when its
process is dead, which is seen on its own machine, or when the signs have stopped, which is seen anywhere.
Times are compared by the clock of the file system, so machines need not agree on theirs.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread

from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import beside, create_file
from mim_torchrec.embeddings.holder import EXPIRY, HEARTBEAT, Holder, LeaseError
from mim_torchrec.embeddings.remote.lease import StoreLease
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.training.distributed import DistributedContext


class Lease:
    """The right to write into a directory.

    Args:
        file: of the lease.
        heartbeat: seconds between two signs of life.
        expiry: seconds without one after which it may be taken over.
        of: who has taken it, where another process only checks it; None for this process.
    """

    def __init__(
        self, file: Path, heartbeat: float = HEARTBEAT, expiry: float = EXPIRY, of: Holder | None = None
    ) -> None:
        self._file, self._heartbeat, self._expiry = file, heartbeat, expiry
        self._me = of or Holder.this()
        self._over = Event()
        self._thread: Thread | None = None
        self._successor: Holder | None = None  # that the thread has seen

    @property
    def holder(self) -> Holder:
        """Who takes it, or has taken it."""
        return self._me

    def take(self) -> None:
        """Take the lease, from a process that is dead too.

        A job that was started again on another machine waits for the last sign of life of its own earlier
        process to expire; others do not wait.

        Raises:
            LeaseError: another process has it; the message names it.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        content = (json.dumps(asdict(self._me)) + "\n").encode()
        while not create_file(self._file, content):
            holder, silence = self._found()
            if holder is None:
                continue  # it was given back meanwhile
            if not holder.is_dead() and silence < self._expiry:
                is_own_job = self._me.job and holder.job == self._me.job
                if not is_own_job or holder.machine == self._me.machine:
                    raise LeaseError(
                        f"{self._file.parent} is written by {holder}; its last sign of life was "
                        f"{silence:.0f} s ago. Wait for it, stop it, or choose another --out"
                    )
                self._over.wait(min(self._heartbeat, self._expiry - silence))
                continue
            self._remove(holder)
        self._thread = Thread(target=self._give_signs, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that the lease is still this process's, before a write that counts.

        Raises:
            LeaseError: another process has taken it over, because this one gave no sign of life for too long.
        """
        holder = self._successor or self._holder()
        if holder is None or holder.token != self._me.token:
            who = "nobody" if holder is None else str(holder)
            raise LeaseError(
                f"{self._file} is no longer that of this process: it gave no sign of life for "
                f"{self._expiry:.0f} s and was replaced by {who}. Nothing more is written"
            )

    def give_back(self) -> None:
        """End the lease."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        holder = self._holder()
        if holder is not None and holder.token == self._me.token:
            self._file.unlink(missing_ok=True)

    def _found(self) -> tuple[Holder | None, float]:
        """Who has the lease, and the seconds since its last sign of life; None where nobody has."""
        probe = beside(self._file)
        try:
            holder = self._holder()
            probe.touch()
            return holder, probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:
            return None, 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _holder(self) -> Holder | None:
        """Who has the lease; None where nobody has."""
        try:
            return self._read(self._file.read_text())
        except FileNotFoundError:
            return None

    def _read(self, content: str) -> Holder:
        try:
            return Holder(**json.loads(content))
        except (ValueError, TypeError) as error:
            text = f"{self._file} does not say whose it is ({error}); remove it if nobody writes"
            raise LeaseError(text) from None

    def _remove(self, holder: Holder) -> None:
        """Take the lease of a dead process away, unless somebody else just has."""
        aside = beside(self._file)
        with suppress(FileNotFoundError):
            os.rename(self._file, aside)
            taken = Holder(**json.loads(aside.read_text()))
            if taken.token != holder.token:  # it was a new one already
                with suppress(FileExistsError):
                    os.link(aside, self._file)
            aside.unlink()

    def _give_signs(self) -> None:
        """Renew the lease until it is another's: a process that was stopped may wake up after its expiry."""
        while self._successor is None and not self._over.wait(self._heartbeat):
            # `check` finds a lease that is gone; the file that was read is touched, whoever replaces it
            with suppress(OSError, LeaseError), self._file.open() as file:
                holder = self._read(file.read())
                if holder.token == self._me.token:
                    os.utime(file.fileno())
                else:
                    self._successor = holder


@contextmanager
def leased(file: Path) -> Iterator[Lease]:
    """Hold a lease for a block.

    Raises:
        LeaseError: another process has it.
    """
    lease = Lease(file)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()


@contextmanager
def leased_by_rank_0(place: Path | Url, context: DistributedContext) -> Iterator[Lease | StoreLease | None]:
    """Hold a lease for a block that all ranks enter; rank 0 has it, for all.

    Args:
        place: file of the lease, or the URL of the directory that it is for.
        context: the process group.

    Raises:
        LeaseError: another process has it; on all ranks.
        StoreError: the store at the URL cannot tell two writers apart; on all ranks.
    """
    lease: Lease | StoreLease | None = None
    if context.is_main:
        lease = Lease(place) if isinstance(place, Path) else StoreLease(place)
    try:
        on_all_ranks(lease.take if lease is not None else lambda: None)
        yield lease
    finally:
        if lease is not None:
            lease.give_back()


@contextmanager
def leased_for_all_ranks(file: Path, context: DistributedContext) -> Iterator[Lease]:
    """As `leased_by_rank_0`, with a lease that every rank checks by itself, whatever the others do.

    Raises:
        LeaseError: another process has it; on all ranks.
    """
    with leased_by_rank_0(file, context) as held:
        assert not isinstance(held, StoreLease)
        holder = context.broadcast_object(None if held is None else held.holder)
        yield Lease(file, of=holder) if held is None else held
