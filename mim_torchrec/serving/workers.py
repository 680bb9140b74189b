"""Several processes that serve: one port, one page cache of mapped files, one set of metrics.

The parent loads libraries and forks. Each worker opens the deployment itself: threads, connections and locks
of what is opened would not survive a fork, and mapped files are shared by the page cache. The parent passes
SIGTERM and SIGHUP on. A worker that dies is replaced; many deaths in a short time end the service. Workers
end when their parent has gone.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from mim_torchrec import program
from mim_torchrec.errors import SetupError, Status

log = logging.getLogger(__name__)

DEATHS, WITHIN = 5, 60.0  # so many deaths within so many seconds end the service
PAUSES = (1.0, 30.0)  # seconds before a worker that could not begin is tried again: at first, and at most
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Ready = Callable[[str], None]


class Workers:
    """Processes that do the same.

    Args:
        count: of processes.
        work: what each does until SIGTERM; it calls its argument once when it serves, with a line to print.
        name: what error messages of a worker begin with.
        on_death: is told the process id of a worker that has died.
    """

    def __init__(
        self, count: int, work: Callable[[Ready], None], name: str, on_death: Callable[[int], None]
    ) -> None:
        self._count, self._work, self._name, self._on_death = count, work, name, on_death
        self._running: set[int] = set()
        self._serving: set[int] = set()
        self._ending = False

    def run(self, say: Callable[[str], None]) -> None:
        """Run until SIGTERM.

        Args:
            say: is told the line of the first worker when all of them serve.

        Raises:
            SetupError: workers die again and again.
            SystemExit: one could not begin; it has said why.
        """
        self._watched, self._held = os.pipe()
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            # alone: what is wrong with the deployment is said once
            line = self._served(*self._start())
            started = [self._start() for _ in range(1, self._count)] if line is not None else []
            lines = [line, *[self._served(pid, pipe) for pid, pipe in started]]
            if line is not None and None not in lines:
                say(line)
                self._replace_the_dead()
            elif not self._ending:
                self._refuse()
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._watched)
            os.close(self._held)

    def _start(self) -> tuple[int, int]:
        """Begin a worker: its process id, and a pipe that has its line when it serves."""
        pipe, theirs = os.pipe()
        with _signals_held():
            pid = os.fork()
            if pid == 0:
                os.close(pipe)
                self._be_worker(theirs)
            self._running.add(pid)
        os.close(theirs)
        if self._ending:
            os.kill(pid, signal.SIGTERM)
        return pid, pipe

    def _be_worker(self, pipe: int) -> None:
        """Never returns."""
        status: object = Status.BUG
        try:
            for number in PASSED_ON:
                # a reload changes nothing before anything is loaded
                signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            os.close(self._held)
            threading.Thread(target=_end_with_parent, args=(self._watched,), daemon=True).start()

            def ready(line: str) -> None:
                os.write(pipe, f"{line}\n".encode())
                os.close(pipe)

            program.run(lambda _: self._work(ready), [], self._name)
        except SystemExit as end:
            status = end.code
        finally:
            # not what the parent would do at its end
            os._exit(status if isinstance(status, int) else Status.BUG)

    def _served(self, pid: int, pipe: int) -> str | None:
        """The line of a worker, once it serves; None where it has ended before."""
        with open(pipe, encoding="utf-8") as lines:
            line = lines.read().rstrip("\n")
        if line:
            self._serving.add(pid)
        return line or None

    def _refuse(self) -> NoReturn:
        """End as the worker that could not begin."""
        pid, status = os.waitpid(-1, 0)
        self._forget(pid)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            raise SetupError(f"a worker {_said(code)} before it served: see the log of the machine")
        raise SystemExit(code)

    def _replace_the_dead(self) -> None:
        deaths: deque[float] = deque(maxlen=DEATHS)
        pause = 0.0
        while not self._ending:
            if len(self._running) < self._count:
                self._rest(pause)
                if self._ending:
                    return
                if self._served(*self._start()) is not None:
                    pause = 0.0
                    continue
                # what it needs may be away for a while, and others still serve
                pause = min(max(PAUSES[0], 2 * pause), PAUSES[1])
            pid, status = os.waitpid(-1, 0)
            served, said = pid in self._serving, _said(os.waitstatus_to_exitcode(status))
            self._forget(pid)
            if self._ending:
                return
            if not self._running:
                raise SetupError(f"no worker is left: the last {said}")
            if not served:
                log.warning("worker %d %s before it served; another is tried in %g s", pid, said, pause)
                continue
            now = time.monotonic()
            deaths.append(now)
            if len(deaths) == DEATHS and now - deaths[0] < WITHIN:
                raise SetupError(f"{DEATHS} workers have ended within {WITHIN:g} s; the last {said}")
            log.warning("worker %d %s; another takes its place", pid, said)

    def _rest(self, seconds: float) -> None:
        """Wait; a handler may end it, which must take no lock that this holds."""
        end = time.monotonic() + seconds
        while not self._ending and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _forget(self, pid: int) -> None:
        self._running.discard(pid)
        self._serving.discard(pid)
        self._on_death(pid)

    def _end(self) -> None:
        """End what runs, and wait for it."""
        self._pass_on(signal.SIGTERM, None)
        while self._running:
            pid, _ = os.waitpid(-1, 0)
            self._running.discard(pid)

    def _pass_on(self, number: int, _: object) -> None:
        if number != signal.SIGHUP:
            self._ending, number = True, signal.SIGTERM
        for pid in self._running:
            with suppress(ProcessLookupError):  # it has just been waited for
                os.kill(pid, number)


@contextmanager
def _signals_held() -> Iterator[None]:
    """No handler runs between a fork and what both sides do first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is written: it ends when the parent has gone
    os.kill(os.getpid(), signal.SIGTERM)


def _said(code: int) -> str:
    """How a process ended.

    >>> _said(-9), _said(3)
    ('was ended by SIGKILL', 'ended with status 3')
    """
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
