"""Who writes to a URL: one process at a time, by objects that are created only where there is none.

    <url>/.mim/lease-<n>.json

The newest one counts. A holder rewrites its own as a sign of life. Another process takes over by creating
the next number, when the holder is known to be dead or its signs have stopped; of several one succeeds. So
nothing is ever taken away from a holder that could still write it. Times are compared by the clock of the
store.
"""

import json
import re
import uuid
from contextlib import suppress
from dataclasses import asdict
from threading import Event, Thread

from mim_torchrec.embeddings.holder import EXPIRY, HEARTBEAT, Holder, LeaseError
from mim_torchrec.embeddings.remote.places import CREATING, NoSuchPlace, StoreError, Url
from mim_torchrec.embeddings.remote.published import OWN, refuse_unsafe
from mim_torchrec.errors import ExpectedError

LEASE = re.compile(r"lease-(\d{6,})\.json")


class StoreLease:
    """The right to write to a URL.

    Args:
        url: of the directory.
        heartbeat: seconds between two signs of life.
        expiry: seconds without one after which it may be taken over.
    """

    def __init__(self, url: Url, heartbeat: float = HEARTBEAT, expiry: float = EXPIRY) -> None:
        self._url, self._heartbeat, self._expiry = url, heartbeat, expiry
        self._me = Holder.this()
        self._number = 0
        self._over = Event()
        self._thread: Thread | None = None

    @property
    def is_taken(self) -> bool:
        """Whether `take` has succeeded."""
        return self._thread is not None

    def take(self) -> None:
        """Take the lease, from a process that is dead too.

        A job that was started again on another machine waits for the last sign of life of its own earlier
        process to expire; others do not wait.

        Raises:
            LeaseError: another process has it; the message names it.
            StoreError: the store has no conditional writes.
        """
        refuse_unsafe(self._url, CREATING)
        while True:
            number, holder = self._found()
            if holder is not None and not holder.is_dead():
                silence = self._silence(number)
                if silence < self._expiry:
                    is_own_job = self._me.job and holder.job == self._me.job
                    if not is_own_job or holder.machine == self._me.machine:
                        raise LeaseError(
                            f"{self._url} is written by {holder}; its last sign of life was {silence:.0f} s "
                            "ago. Wait for it, stop it, or choose another --out"
                        )
                    self._over.wait(min(self._heartbeat, self._expiry - silence))
                    continue
            if self._object(number + 1).create(self._content()):
                break
        self._number = number + 1
        if self._object(self._number).create(self._content()):
            self._object(self._number).remove()
            raise StoreError(
                f"{self._url}: the store ignores conditional writes (If-None-Match), so that two writers "
                "would mix their results; write to a local directory and copy it"
            )
        for name in (self._url / OWN).list():
            found = LEASE.fullmatch(name)
            if found is not None and int(found[1]) < self._number:
                (self._url / OWN / name).remove()
        self._thread = Thread(target=self._give_signs, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that the lease is still this process's, before a write that counts.

        Raises:
            LeaseError: another process has taken it over, because this one gave no sign of life for too long.
        """
        number, holder = self._found()
        if number != self._number:
            who = "nobody" if holder is None else str(holder)
            raise LeaseError(
                f"{self._url} is no longer that of this process: it gave no sign of life for "
                f"{self._expiry:.0f} s and was replaced by {who}. Nothing more is written"
            )

    def give_back(self) -> None:
        """End the lease; its number stays taken, so that a writer that was overtaken finds out."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(ExpectedError):  # else it expires
                self._object(self._number).write_bytes(self._content(released=True))

    def _found(self) -> tuple[int, Holder | None]:
        """Number of the newest lease, 0 where there was none, and who has it, if somebody does."""
        numbers = [int(found[1]) for found in map(LEASE.fullmatch, (self._url / OWN).list()) if found]
        if not numbers:
            return 0, None
        file = self._object(max(numbers))
        try:
            content = json.loads(file.read_bytes())
            return max(numbers), None if content.pop("released") else Holder(**content)
        except NoSuchPlace:
            return self._found()  # a newer one has replaced it
        except (ValueError, TypeError, KeyError) as error:
            text = f"{file} does not say whose it is ({error}); remove it if nobody writes"
            raise LeaseError(text) from None

    def _silence(self, number: int) -> float:
        """Seconds since the last sign of life of a lease, by the clock of the store."""
        probe = self._url / OWN / f"clock-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            return max(0.0, probe.modified() - self._object(number).modified())
        except NoSuchPlace:
            return self._expiry  # it has ended meanwhile
        finally:
            probe.remove()

    def _object(self, number: int) -> Url:
        return self._url / OWN / f"lease-{number:06d}.json"

    def _content(self, released: bool = False) -> bytes:
        return (json.dumps(asdict(self._me) | {"released": released}) + "\n").encode()

    def _give_signs(self) -> None:
        while not self._over.wait(self._heartbeat):
            with suppress(ExpectedError):  # `check` finds a lease that is lost
                self._object(self._number).write_bytes(self._content())
