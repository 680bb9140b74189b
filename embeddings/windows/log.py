"""The window log: a directory with a file a window, durable, ordered and idempotent, without a server.

    <log>/log.json                        format version and table_version
    <log>/0000000000000001.safetensors    window 1, and so on

A window is in the log once its file has its name: it is written under another one, brought to the disk and
linked, which fails if the number is taken. So several may append, none overwrites another, and who is killed
leaves at most a hidden file that nobody reads. `compact.py` folds them into a table.
"""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mim_torchrec.embeddings.table.manifest import TableError, VersionMismatch
from mim_torchrec.embeddings.table.shards import fsync
from mim_torchrec.embeddings.windows.window import MalformedWindow, Window, WindowGap

FORMAT_VERSION = 1
ABOUT = "log.json"
SUFFIX = ".safetensors"


class WindowLog:
    """The windows of one table version.

    Args:
        root: directory; made if missing.
        table_version: that all of its windows have.

    Raises:
        VersionMismatch: the log is of another version.
        TableError: `log.json` is of another format.
    """

    def __init__(self, root: str | Path, table_version: str) -> None:
        self.root, self.table_version = Path(root), table_version
        self.root.mkdir(parents=True, exist_ok=True)
        self._seq_of: dict[str, int] = {}
        self._known = 0
        about = self.root / ABOUT
        if not about.exists():
            text = json.dumps({"format_version": FORMAT_VERSION, "table_version": table_version}) + "\n"
            self._publish(about, text.encode())
        try:
            found = json.loads(about.read_text(encoding="utf-8"))
            version, log_of = found["format_version"], found["table_version"]
        except (ValueError, KeyError, TypeError):
            raise TableError(f"{about} does not say what the log is of") from None
        if version != FORMAT_VERSION:
            raise TableError(f"{about}: format_version {version!r}, this release reads {FORMAT_VERSION}")
        if log_of != table_version:
            raise VersionMismatch(f"{self.root} is of table_version {log_of}, expected {table_version}")

    def head(self) -> int:
        """Number of the newest window; 0 where there is none."""
        return max(self._numbers(), default=0)

    def append(
        self,
        window_id: str,
        ids: Tensor,
        vectors: Tensor,
        *,
        dtype: str = "float16",
        removed: Tensor | None = None,
    ) -> int:
        """Add a window, unless the log has one of this name.

        Args:
            window_id: its name.
            ids: (num_items,) int64, each once.
            vectors: (num_items, dim) floating point.
            dtype: storage type.
            removed: (num_removed,) int64, items taken down.

        Returns:
            Its number in the log, which is the earlier one's where there was one.

        Raises:
            TableError: the window is malformed, see `Window`.
            OSError: it could not be written; it is not in the log then.
        """
        while True:
            self._read_names()
            if window_id in self._seq_of:
                return self._seq_of[window_id]
            # whoever was faster took this number, and then linking fails
            seq = self._known + 1
            window = Window.of(ids, vectors, table_version=self.table_version, seq=seq, window_id=window_id,
                               dtype=dtype, removed=removed)  # fmt: skip
            if self._publish(self._path(seq), window.to_bytes()):
                return seq

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
            raise WindowGap(f"{self.root} has no window {seq}; its newest is {self.head()}") from None
        window = Window.from_bytes(data, str(path))
        if window.seq != seq:
            raise MalformedWindow(f"{path} holds window {window.seq}")
        if window.table_version != self.table_version:
            raise VersionMismatch(f"{path} is of {window.table_version}, its log of {self.table_version}")
        return window

    def after(self, seq: int) -> Iterator[Window]:
        """The windows after a number, in order, up to what was the newest when the first was asked for."""
        for number in range(seq + 1, self.head() + 1):
            yield self.read(number)

    def _numbers(self) -> list[int]:
        names = (path.name for path in self.root.iterdir())
        return [int(name[: -len(SUFFIX)]) for name in names if name.endswith(SUFFIX) and name[0].isdigit()]

    def _read_names(self) -> None:
        """Learn the names of windows that came since the last look."""
        for seq in sorted(number for number in self._numbers() if number > self._known):
            path = self._path(seq)
            try:
                with safe_open(path, "pt") as file:
                    self._seq_of[file.metadata()["window_id"]] = seq
            except (SafetensorError, KeyError, TypeError) as error:
                raise MalformedWindow(f"{path} is no window: {error!r}") from None
            self._known = seq

    def _publish(self, path: Path, data: bytes) -> bool:
        """Give a file its name when all of it is on the disk; False where somebody else has."""
        waiting = self.root / f".{uuid.uuid4().hex}"
        try:
            waiting.write_bytes(data)
            fsync(waiting)
            os.link(waiting, path)
        except FileExistsError:
            return False
        finally:
            waiting.unlink(missing_ok=True)
        fsync(self.root)
        return True

    def _path(self, seq: int) -> Path:
        return self.root / f"{seq:016d}{SUFFIX}"
