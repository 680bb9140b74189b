"""Make each file-system call of a writer fail once, in turn, and see what it leaves.

A writer replaces something old by something new. It is run once to count its calls below a folder: open for
writing, write, fsync, close, rename, link, mkdir, unlink and so on. Then it is run again for every call,
which fails with an error of the disk, half of its bytes written, or at which the process dies. Afterwards a
reader must find the old or the new, and the writer, run once more, must end with the new.

Not here: calls of libraries that are not Python (tokenizers); what they write is brought to the disk by ours.
"""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mim_torchrec.embeddings import files

ABSENT = "absent"
DIRECT = ("fsync", "replace", "rename", "link", "mkdir", "unlink", "remove", "rmdir", "chmod", "sendfile")


class Killed(BaseException):
    """The process died here: neither this call nor a later one has an effect."""


class Faults:
    """Counts the calls below a folder, and makes one of them fail.

    Args:
        root: the folder.
        fail_at: number of the call that fails, from 1; None lets all succeed.
        error: `errno` of the failure; None kills the process.
    """

    def __init__(self, root: Path, fail_at: int | None = None, error: int | None = errno.ENOSPC) -> None:
        self._root, self._fail_at, self._error = str(root), fail_at, error
        self._descriptors: set[int] = set()
        self.calls: list[str] = []
        self.is_dead = False

    def call(self, name: str, path: Any, before_failing: Callable[[], object] = lambda: None) -> None:
        """Count a call, and fail where it is its turn."""
        if self.is_dead:
            raise Killed
        self.calls.append(f"{name} {Path(str(path)).name}")
        if len(self.calls) != self._fail_at:
            return
        before_failing()
        if self._error is None:
            self.is_dead = True
            raise Killed
        raise OSError(self._error, os.strerror(self._error), str(path))

    def concerns(self, path: Any) -> bool:
        """Whether a path, or an open file, is below the folder."""
        if isinstance(path, int):
            return path in self._descriptors
        return os.path.abspath(os.fsdecode(path)).startswith(self._root)

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Put this in the place of the file system's functions."""
        replaced: dict[str, Any] = {name: self._direct(name) for name in DIRECT}
        with mock.patch.multiple(os, open=self._os_open(), close=self._os_close(), **replaced):
            opened = self._io_open()
            with mock.patch.object(io, "open", opened), mock.patch.object(builtins, "open", opened):
                with mock.patch.object(files, "_renameat2", self._exchange()):
                    yield

    def _direct(self, name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def wrapped(path: Any, *arguments: Any, **words: Any) -> Any:
            if self.concerns(words.get("dir_fd") or path):
                self.call(name, path)
                if name == "fsync":  # takes long, and the machine does not lose power here
                    return None
            return plain(path, *arguments, **words)

        return wrapped

    def _os_open(self) -> Callable[..., int]:
        plain = os.open

        def wrapped(path: Any, flags: int, *arguments: Any, **words: Any) -> int:
            inside = self.concerns(words.get("dir_fd") or path)
            if inside:
                self.call("open", path)
            descriptor = plain(path, flags, *arguments, **words)
            if inside:
                self._descriptors.add(descriptor)
            return descriptor

        return wrapped

    def _os_close(self) -> Callable[[int], None]:
        plain = os.close

        def wrapped(descriptor: int) -> None:
            self._descriptors.discard(descriptor)
            plain(descriptor)

        return wrapped

    def _exchange(self) -> Callable[..., bool]:
        plain = files._renameat2

        def wrapped(source: Path, target: Path, flag: int) -> bool:
            if self.concerns(target):
                self.call("renameat2", target)
            return plain(source, target, flag)

        return wrapped

    def _io_open(self) -> Callable[..., Any]:
        plain, faults = io.open, self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if faults.is_dead:
                    return len(data)  # a dead process has no buffers to flush
                half = memoryview(data).cast("B")[: len(data) // 2]
                faults.call("write", self.name, lambda: io.FileIO.write(self, half))
                return super().write(data)

            def close(self) -> None:
                if not self.closed:
                    faults._descriptors.discard(self.fileno())
                    super().close()
                    if not faults.is_dead:
                        faults.call("close", self.name)

        def wrapped(path: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **words: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+") or not self.concerns(path):
                return plain(path, mode, buffering, *arguments, **words)
            self.call("open", path)
            raw = File(os.fspath(path), mode.replace("b", "").replace("t", ""))
            self._descriptors.add(raw.fileno())
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, *arguments, **words)

        return wrapped


@dataclass(frozen=True)
class Writer:
    """Something that replaces old by new below a folder.

    Attributes:
        name: of the writer.
        old: makes what is there before; without faults.
        new: what is tried.
        read: what a reader finds, in comparable form; an error if it is unusable.
    """

    name: str
    old: Callable[[Path], object]
    new: Callable[[Path], object]
    read: Callable[[Path], object]


@dataclass
class Outcome:
    """What came of the faults of one writer.

    Attributes:
        calls: of one undisturbed run.
        injected: faults, of all kinds.
        lost: faults after which a reader finds nothing usable, or the writer does not work again.
        mixed: faults after which a reader finds neither the old nor the new.
        problems: what these were.
    """

    calls: int
    injected: int = 0
    lost: int = 0
    mixed: int = 0
    problems: list[str] = field(default_factory=list)


KINDS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "killed": None}


def try_all(writer: Writer, folder: Path, kinds: tuple[str, ...] = tuple(KINDS)) -> Outcome:
    """Make each call of a writer fail, in every way.

    Args:
        writer: the writer.
        folder: for its files; must not exist.
        kinds: ways to fail.

    Raises:
        ValueError: the writer makes no difference, or no call: there would be nothing to see.
    """
    before, after, place = folder / "before", folder / "after", folder / "place"
    place.mkdir(parents=True)
    writer.old(place)
    shutil.copytree(place, before, symlinks=True)
    old = writer.read(place)
    counted = Faults(place)
    with counted.injected():
        writer.new(place)
    new = writer.read(place)
    shutil.move(place, after)
    if old == new or not counted.calls:
        raise ValueError(f"{writer.name} changes nothing, in {len(counted.calls)} calls")
    outcome = Outcome(calls=len(counted.calls))
    for kind in kinds:
        for number, call in enumerate(counted.calls, 1):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(before, place, symlinks=True)
            outcome.injected += 1
            where = f"{writer.name}: {kind} at call {number}, {call}"
            with Faults(place, number, KINDS[kind]).injected():
                try:
                    writer.new(place)
                except (Exception, Killed):  # what it says is for other tests; here, what it leaves
                    pass
            try:
                found = writer.read(place)
            except Exception as error:
                outcome.lost += 1
                outcome.problems.append(f"{where}: {error!r}")
                continue
            if found not in (old, new):
                outcome.mixed += 1
                outcome.problems.append(f"{where}: {found!r}")
                continue
            try:
                writer.new(place)
                if writer.read(place) != new:
                    raise ValueError("the writer ended without the new version")
            except Exception as error:
                if found != new:  # one that refuses what is there already has done its work
                    outcome.lost += 1
                    outcome.problems.append(f"{where}, then again: {error!r}")
    shutil.rmtree(folder)
    return outcome
