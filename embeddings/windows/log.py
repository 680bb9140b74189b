"""The window log as a directory with one file per window: durable, ordered, idempotent, without a server.

    <log>/log.json                        format version, table_version and start
    <log>/0000000000000001.safetensors    window 1, and so on
    <log>/forgotten.jsonl                 names of windows whose files were removed (`forgotten.py`)

A window is written to a hidden file, flushed to disk and then hard-linked to its number, which fails if the
number is taken. Several writers may append, and none overwrites another. A killed writer leaves at most a
hidden file that no reader opens. `compact.py` writes a table with the windows applied; `forget` then removes
their files. Their names are kept, or the positions that they reach in the source, so that a window that is
delivered again is recognized. No call reads again what it has read before.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mim_torchrec.embeddings.files import PARTIAL, create_file
from mim_torchrec.embeddings.table.manifest import TableError, VersionMismatch
from mim_torchrec.embeddings.windows.forgotten import ForgottenNames
from mim_torchrec.embeddings.windows.window import MalformedWindow, Window, WindowGap
from mim_torchrec.errors import Status

FORMAT_VERSION = 1
ABOUT = "log.json"
FORGOTTEN = "forgotten.jsonl"
SUFFIX = ".safetensors"
BROKEN_OFF = 3600.0  # seconds after which nobody is still writing a file
LOOK_EVERY = 0.02  # seconds between two looks for the next file


class LogMoved(TableError):
    """Others have added windows since one looked."""

    status = Status.STATE


class WindowLog:
    """The windows of one table version.

    Args:
        root: directory.
        table_version: that all of its windows have.
        start: where there is no log, begin one whose first window follows this seq of a base table; None
            makes a missing log an error.

    Raises:
        VersionMismatch: the log is of another version.
        TableError: there is no log, or `log.json` is of another format.
    """

    def __init__(self, root: str | Path, table_version: str, start: int | None = None) -> None:
        self.root, self.table_version = Path(root), table_version
        self._seq_of: dict[str, int] = {}
        about = self.root / ABOUT
        if not about.exists():
            if start is None:
                raise TableError(f"{self.root} is no window log: it has no {ABOUT}")
            self.root.mkdir(parents=True, exist_ok=True)
            facts = {"format_version": FORMAT_VERSION, "table_version": table_version, "start": start}
            create_file(about, (json.dumps(facts) + "\n").encode())
        try:
            found = json.loads(about.read_text(encoding="utf-8"))
            version, log_of, self._start = (found[k] for k in ("format_version", "table_version", "start"))
        except (ValueError, KeyError, TypeError):
            raise TableError(f"{about} does not say what the log is of") from None
        if version != FORMAT_VERSION:
            raise TableError(f"{about}: format_version {version!r}, this release reads {FORMAT_VERSION}")
        if log_of != table_version:
            raise VersionMismatch(f"{self.root} is of table_version {log_of}, expected {table_version}")
        self._known = self._start
        self._forgotten = ForgottenNames(self.root / FORGOTTEN, self._start)

    def __str__(self) -> str:
        return str(self.root)

    def last_seq(self) -> int:
        """Number of the newest window; where the log starts if there never was one."""
        # both: a list of files that others remove meanwhile may lack the newest of them
        return max([*self._numbers(), self._forgotten_through()])

    def first_seq(self) -> int:
        """Number of the oldest window that can be read; one past the newest if there is none."""
        return min(self._numbers(), default=self._forgotten_through() + 1)

    def size(self) -> int:
        """Bytes of the windows that can be read."""
        return sum(self._path(number).stat().st_size for number in self._numbers())

    def append(
        self,
        window_id: str,
        ids: Tensor,
        vectors: Tensor,
        *,
        dtype: str = "float16",
        removed: Tensor | None = None,
        seq: int | None = None,
    ) -> int:
        """Add a window, unless the log has one of this name.

        Args:
            window_id: its name.
            ids: (num_items,) int64, each once.
            vectors: (num_items, dim) floating point.
            dtype: storage type.
            removed: (num_removed,) int64, items deleted.
            seq: the number that it is to have, by one who has to know all windows before his own.

        Returns:
            Its number in the log, which is the earlier one's where there was one; of one whose name was
            trimmed (`forgotten.py`) it is that of the last such window.

        Raises:
            LogMoved: others have added windows, and the next number is not `seq`.
            TableError: the window is malformed, see `Window`.
            OSError: it could not be written; it is not in the log then.
        """
        while True:
            self._read_names()
            known = self._seq_of.get(window_id, self._forgotten.seq_of(window_id))
            if known is not None:
                return known
            # whoever was faster took this number, and then linking fails
            number = self._known + 1
            check_not_moved(str(self), number, seq)
            window = Window.of(ids, vectors, table_version=self.table_version, seq=number,
                               window_id=window_id, dtype=dtype, removed=removed)  # fmt: skip
            if create_file(self._path(number), window.to_bytes()):
                if number > self._forgotten_through():
                    return number
                # others have taken this number and forgotten it since we looked
                self._path(number).unlink()

    def names(self) -> list[str]:
        """Names of all windows that were ever added; of trimmed ones one name with all their positions."""
        self._read_names()
        return list(self._forgotten.names | self._seq_of)

    def read(self, seq: int) -> Window:
        """A window by its number.

        Raises:
            WindowGap: there is none of this number.
            MalformedWindow: the file is damaged, or holds another window.
            VersionMismatch: it is of another version.
        """
        path = self._path(seq)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise missing_window(str(self), seq, self.first_seq(), self.last_seq()) from None
        window = Window.from_bytes(data, str(path))
        if window.seq != seq:
            raise MalformedWindow(f"{path} holds window {window.seq}")
        if window.table_version != self.table_version:
            raise VersionMismatch(f"{path} is of {window.table_version}, its log of {self.table_version}")
        return window

    def wait(self, seq: int, timeout: float) -> bool:
        """Wait until there is a window after a number, at most `timeout` seconds; whether there is one."""
        deadline = time.monotonic() + timeout
        while not self._path(seq + 1).exists():
            if time.monotonic() >= deadline:
                return self.last_seq() > seq
            time.sleep(min(LOOK_EVERY, timeout))
        return True

    def after(self, seq: int) -> Iterator[Window]:
        """The windows after a number, in order, up to the newest one at the first call of `next`.

        Raises:
            WindowGap: windows between the number and the log are gone, or the log ends before the number.
        """
        last = self.last_seq()
        check_not_behind(str(self), last, seq)
        for number in range(seq + 1, last + 1):
            yield self.read(number)

    def forget(self, through: int, min_age: float = 0.0) -> int:
        """Remove windows, oldest first, that a base table holds. Their names are kept (`forgotten.py`).

        Args:
            through: `seq` of the base table.
            min_age: seconds that a window is kept in any case, for readers that are behind.

        Returns:
            How many were removed.

        Raises:
            OSError: the disk is full; whatever was not removed is still whole.
        """
        newest = time.time() - min_age
        with self._exclusively():
            self._read_names()
            name_of = {seq: name for name, seq in self._seq_of.items()}
            recorded = self._forgotten.through  # by one who was killed before the files were removed
            gone = []
            for seq in sorted(number for number in self._numbers() if number <= through):
                try:
                    if self._path(seq).stat().st_mtime > newest:
                        break
                except FileNotFoundError:  # somebody else has forgotten it
                    continue
                gone.append(seq)
            if names := {seq: name_of[seq] for seq in gone if seq > recorded}:
                self._forgotten.add(names)
            for seq in gone:
                self._path(seq).unlink(missing_ok=True)
        self._remove_broken_off()
        return len(gone)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Wait for others who forget windows; a killed one holds nothing up."""
        with (self.root / ABOUT).open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _remove_broken_off(self) -> None:
        """Remove the files that killed writers left."""
        for path in self.root.glob(f"*{PARTIAL}"):
            try:
                if path.stat().st_mtime < time.time() - BROKEN_OFF:
                    path.unlink()
            except FileNotFoundError:  # it was being written, and has got its name
                continue

    def _forgotten_through(self) -> int:
        self._forgotten.read()
        return self._forgotten.through

    def _numbers(self) -> list[int]:
        names = (path.name for path in self.root.iterdir())
        return [int(name[: -len(SUFFIX)]) for name in names if name.endswith(SUFFIX) and name[0].isdigit()]

    def _read_names(self) -> None:
        """Learn the names of windows that came since the last look.

        Raises:
            MalformedWindow: a file is no window.
            VersionMismatch: one is of another version. Whoever appends must not go on behind it: readers
                cannot pass it, and taking it away would leave a gap.
        """
        while True:
            # files before names: what is forgotten in between is in one of the two, or in both
            numbers = sorted(self._numbers())
            self._known = max(self._known, self._forgotten_through())
            oldest = numbers[0] if numbers else self._known + 1
            if any(seq < oldest for seq in self._seq_of.values()):  # these are among the forgotten ones
                self._seq_of = {name: seq for name, seq in self._seq_of.items() if seq >= oldest}
            try:
                for seq in numbers:
                    if seq > self._known:
                        self._seq_of[self._name_in(self._path(seq))] = seq
                        self._known = seq
                return
            except FileNotFoundError:  # forgotten just now: its name is where those are
                continue

    def _name_in(self, path: Path) -> str:
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                version, name = facts["table_version"], facts["window_id"]
        except (SafetensorError, KeyError, TypeError) as error:
            raise MalformedWindow(f"{path} is no window: {error!r}") from None
        if version != self.table_version:
            raise VersionMismatch(
                f"{path} is of table_version {version}, its log of {self.table_version}: take the file away"
            )
        return name

    def _path(self, seq: int) -> Path:
        return self.root / f"{seq:016d}{SUFFIX}"


def missing_window(log: str, seq: int, first: int, last: int) -> WindowGap:
    """The error of a window that is not there."""
    return WindowGap(
        f"{log} has no window {seq}: it keeps {first} to {last}; older ones are in a "
        "base table of a later seq"
    )


def check_not_moved(log: str, next_seq: int, seq: int | None) -> None:
    """Refuse a window that was meant for another number.

    Raises:
        LogMoved: `seq` is given and not the next number.
    """
    if seq is not None and seq != next_seq:
        raise LogMoved(f"{log}: the next window is {next_seq}, not {seq}: others have added windows")


def check_not_behind(log: str, last: int, seq: int) -> None:
    """Refuse a log that is older than what reads it.

    Raises:
        WindowGap: it ends before the windows that the reader has applied.
    """
    if seq > last:
        raise WindowGap(
            f"{log} ends at window {last}, but {seq} windows were applied: it is another log than theirs, or "
            "was lost and begun again. Begin a log at the seq of the newest base table"
        )
