"""Bearer tokens of requests, from a file that is read again when it changes."""

import logging
import os
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path

from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the file
SCHEME = "bearer "


class TokenFile:
    """Tokens of a file, a line each.

    The file is looked at once a second, when a request comes, and on `reread`. One that cannot be read, or
    has no token, leaves the tokens as they were.

    Args:
        path: of the file.
        on_read: is told whenever tokens were read.

    Raises:
        OptionError: the file has no token.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, on_read: Callable[[], None] = lambda: None) -> None:
        self._path, self._on_read = path, on_read
        self._seen: tuple[int, int, int] | None = None
        self._looked = 0.0
        self._problem: str | None = None
        self._known: tuple[bytes, ...] = ()
        self._read()
        mode = path.stat().st_mode
        if mode & stat.S_IROTH:
            log.warning("%s: every user of this machine can read the tokens: chmod o-r %s", path, path)

    def accepts(self, header: str) -> bool:
        """Whether the header Authorization carries a token of the file."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self.reread()
        if header[: len(SCHEME)].lower() != SCHEME:
            return False
        token = header[len(SCHEME) :].strip().encode()
        # every token is compared, in constant time
        return any([secrets.compare_digest(token, one) for one in self._known])

    def reread(self) -> None:
        """Read the file if it has changed."""
        self._looked = time.monotonic()
        try:
            if self._seen != _identity(self._path):
                self._read()
                log.info("%s was read again: %d tokens", self._path, len(self._known))
            self._problem = None
        except (OSError, OptionError, UnicodeDecodeError) as error:
            if str(error) != self._problem:
                log.warning("%s; the tokens are as before", error)
            self._problem = str(error)

    def _read(self) -> None:
        seen = _identity(self._path)  # before: a change while it is read is noticed by the next look
        lines = self._path.read_text(encoding="utf-8").split("\n")
        found = tuple(line.strip().encode() for line in lines if line.strip())
        if not found:
            raise OptionError(f"{self._path} has no token")
        self._known, self._seen, self._looked = found, seen, time.monotonic()
        self._on_read()


def _identity(path: Path) -> tuple[int, int, int]:
    """Changes when a file is written or replaced."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ino, found.st_size
