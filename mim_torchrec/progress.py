"""Progress of long work: a bar on a terminal, whole lines of the log elsewhere.

A bar ends without a newline, so in a file or a pipe the next line of any process would continue it. On a
terminal `mim_torchrec.program` clears the bar before it writes a line.
"""

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

LOG_SECONDS = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}{unit} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"

log = logging.getLogger(__name__)


class Progress:
    """How far a piece of work is, as a context manager.

    On a terminal it is tqdm's bar. Elsewhere it is a line of the log `mim_torchrec.progress`, at level INFO,
    at most every `LOG_SECONDS` and at the end.

    Args:
        total: units of the whole work.
        desc: what is done.
        unit: what is counted.
        initial: units that were done before.
        scale: write large numbers as 1.5M.
        show: False shows nothing, as on all ranks but one.
    """

    def __init__(
        self, total: int, desc: str, unit: str, *, initial: int = 0, scale: bool = False, show: bool = True
    ) -> None:
        facts: dict[str, Any] = {"total": total, "unit": unit, "initial": initial, "unit_scale": scale}
        terminal = sys.stderr.isatty()
        self._bar = tqdm(**facts, desc=desc, mininterval=1, disable=not (show and terminal))
        self._is_logged = show and not terminal
        self._facts = facts | {"prefix": desc, "unit": f" {unit}", "bar_format": LINE}
        self._done, self._values = initial, ""
        self._started = self._logged = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count units that were done since the last call."""
        self._done += count
        self._bar.update(count)
        if self._is_logged and time.monotonic() - self._logged >= LOG_SECONDS:
            self._log()

    def note(self, **values: str) -> None:
        """Show values next to the count from the next update on."""
        self._values = ", ".join(f"{name}={value}" for name, value in values.items())
        self._bar.set_postfix_str(self._values, refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._is_logged:
            self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        elapsed = self._logged - self._started
        log.info("%s", tqdm.format_meter(self._done, elapsed=elapsed, postfix=self._values, **self._facts))
