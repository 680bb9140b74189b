"""The machine of a server, as far as faults change it for the server alone: its clock and its disk.

libfaketime answers for the clock of the day; the monotonic clock goes on. A mount namespace has a small disk
at the folder for temporary files, which the kernel removes with the last process in it.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK = "16m"
MOUNTED = f'mount -t tmpfs -o size={DISK} tmpfs "$0" && exec "$@"'


class Machine:
    """Where a server runs.

    Args:
        root: where everything lies.

    Attributes:
        left_out: faults that cannot be had here, and why.
    """

    def __init__(self, root: Path) -> None:
        self._disk, self._clock = root / "disk", root / "clock"
        self._disk.mkdir(parents=True)
        self.jump(0)
        self.left_out: dict[str, str] = {}
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        self._library = str(found[0]) if found else None
        if self._library is None:
            self.left_out["clock jump"] = "libfaketime is not there: apt-get install faketime"
        words = ["unshare", "--mount", "sh", "-c", MOUNTED, str(self._disk), "true"]
        self._has_disk = shutil.which("unshare") is not None and not subprocess.call(
            words, stderr=subprocess.DEVNULL
        )
        if not self._has_disk:
            self.left_out["full disk"] = "a disk of its own needs root"

    def command(self, words: list[str]) -> list[str]:
        """The command line that starts a program here."""
        if not self._has_disk:
            return words
        return ["unshare", "--mount", "sh", "-c", MOUNTED, str(self._disk), *words]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of programs here."""
        found = {**os.environ, "TMPDIR": str(self._disk)}
        if self._library is not None:
            found |= {"LD_PRELOAD": self._library, "FAKETIME_TIMESTAMP_FILE": str(self._clock),
                      "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
        return found

    def jump(self, seconds: int) -> None:
        """Set the clock of the day so many seconds beside the right time."""
        self._clock.write_text(f"{seconds:+d}\n")

    @contextmanager
    def full_disk(self, pid: int) -> Iterator[None]:
        """Within it, nothing more can be written to the disk of a process that was started here."""
        ballast = Path(f"/proc/{pid}/root{self._disk.absolute()}") / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:  # it is full
                    pass
            yield
        finally:
            ballast.unlink(missing_ok=True)  # the process may have ended, and its disk with it
