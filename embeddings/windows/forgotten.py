"""Names of the windows whose files a log has removed: a file of lines, read as it grows and trimmed.

    {"seq": 3, "window_id": "w3"}

The file is read once, and afterwards what was added. Whoever forgets windows adds lines and, where there are
many, replaces the file: all names that hold positions become one (`progress.py`), with the number of the last
of them. They do so one after the other, under a lock of the log.
"""

import json
import os
from pathlib import Path

from mim_torchrec.embeddings.files import append_lines, write_bytes
from mim_torchrec.embeddings.windows.progress import Positions, advance, is_covered, name_of, positions_in

MOST_NAMES = 1000  # that hold positions, before they are trimmed


class ForgottenNames:
    """The names of forgotten windows.

    Args:
        path: of the file; without one no window was forgotten.
        start: number ahead of the first window.

    Attributes:
        through: number of the last forgotten window.
        names: numbers by name, of all names that were not trimmed.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._start = path, start
        self._forget_all()

    def _forget_all(self) -> None:
        self.through = self._start
        self.names: dict[str, int] = {}
        self._reached: Positions = {}
        self._last_reached = self._start
        self._offset, self._file = 0, b""

    def seq_of(self, name: str) -> int | None:
        """The number of a window by its name; None where it was not forgotten.

        Of a name that was trimmed it is the number of the last window whose name was.
        """
        if name in self.names:
            return self.names[name]
        return self._last_reached if self._reached and is_covered(name, self._reached) else None

    def read(self) -> None:
        """Learn what was added since the last call; the unfinished line of a killed writer is skipped."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                # a trimmed file is another one and begins with another number
                which = str(facts.st_ino).encode() + file.read(64).strip()[:40]
                if facts.st_size < self._offset or (self._offset and which != self._file):
                    self._forget_all()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            # the files of an unfinished line are still there; a later call forgets them
            try:
                entry = json.loads(line)
                self._learn(entry["seq"], entry["window_id"])
            except ValueError:
                continue
        self._offset += whole
        self._file = which

    def _learn(self, seq: int, name: str) -> None:
        self.names[name] = seq
        self.through = max(self.through, seq)
        positions = positions_in(name)
        if positions is not None:
            advance(self._reached, positions)
            self._last_reached = max(self._last_reached, seq)

    def add(self, names: dict[int, str]) -> None:
        """Add windows by their numbers; trims the names where there are many. Holders of the lock call it.

        Raises:
            DiskFull: there is no room; the file has what it had, or all names.
        """
        append_lines(self._path, [_line(seq, name) for seq, name in sorted(names.items())])
        self.read()
        kept = {name: seq for name, seq in self.names.items() if positions_in(name) is None}
        if len(self.names) - len(kept) <= MOST_NAMES:
            return
        lines = [_line(self._last_reached, name_of(self._reached))]
        lines += [_line(seq, name) for name, seq in kept.items()]
        write_bytes(self._path, ("\n".join(lines) + "\n").encode())
        self._forget_all()
        self.read()


def _line(seq: int, name: str) -> str:
    return json.dumps({"seq": seq, "window_id": name})
