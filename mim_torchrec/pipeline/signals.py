"""Signals that end a run: noted, so that the run can cancel its jobs at a point of its own choice."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from mim_torchrec.errors import ExpectedError, Status

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class RunInterrupted(ExpectedError, RuntimeError):
    """A run was told to end; its jobs have been cancelled."""

    status = Status.TERMINATED


class Signals:
    """Notes SIGTERM, SIGINT and SIGHUP while it is open; ignored ones stay so, as under `nohup` or by `&`.

    Handlers that others install meanwhile, as TorchX's local scheduler does, are replaced by `take`.

    Attributes:
        received: the first signal that came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in ENDING}
            self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def take(self) -> None:
        """Note these signals, whoever has handled them since."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
