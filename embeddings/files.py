"""Files and directories that are replaced whole. Every writer of the package goes through this module.

A new version is written under another name beside the target, brought to the disk, and given its name in one
step. So a reader, a kill or a failing call finds the old version or the new one, never a part. Modes follow
the umask, whatever a library chose. A full disk is an error that names the path, the bytes needed and the
bytes free.

Not here: directories that several ranks write together (`training/shared_directory.py`).
"""

import ctypes
import errno
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mim_torchrec.errors import ExpectedError, Status

FULL = (errno.ENOSPC, errno.EDQUOT)
PARTIAL, OLD = ".partial", ".old"
LEFTOVER = re.compile(r"(?P<name>.+?)(\.[0-9a-f]{32})?(?P<kind>\.partial|\.old)")
NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2
AT_FDCWD = -100


class DiskFull(ExpectedError, OSError):
    """A file system or a quota has no room; the message says for what, how much is needed and free."""

    status = Status.ENVIRONMENT


@contextmanager
def full_disk_reported(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT of the block into `DiskFull`.

    Args:
        path: what the block writes.
        needed: its bytes; None where they are not known.
    """
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full(path, needed, error) from error


def disk_full(path: Path, needed: int | None, cause: OSError) -> DiskFull:
    """The error of a path that found no room."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    stat = os.statvfs(folder)
    need = "an unknown number of bytes is" if needed is None else f"{needed} bytes are"
    error = DiskFull(
        f"{path} cannot be written: {cause.strerror}; {need} needed, {stat.f_bavail * stat.f_frsize} bytes "
        "are free; make room and run the same command again"
    )
    error.errno = cause.errno
    return error


def beside(path: Path, suffix: str = PARTIAL) -> Path:
    """A new name in the directory of `path`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{suffix}")


@contextmanager
def atomic_file(path: str | Path, needed: int | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write into that becomes `path` at the end, in the place of what is there.

    Args:
        path: the file.
        needed: its bytes, for the error of a full disk; None where they are not known.

    Raises:
        DiskFull: there is no room. After any error what was at `path` is still there, and nothing new.
    """
    path = Path(path)
    partial = beside(path)
    with full_disk_reported(path, needed):
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Replace a file."""
    with atomic_file(path, len(data)) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Replace a file of indented JSON; what JSON does not know (a Path, say) becomes a string."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, default=str) + "\n"


def replace_files(contents: Mapping[Path, bytes | Path]) -> None:
    """Replace files together, in this order; where one cannot be, all stay.

    A kill between two of the renames leaves the old versions under names that end in `.old`.

    Args:
        contents: by the name of each file its bytes, or a file beside it that has them and loses its name.
    """
    partials = {path: data if isinstance(data, Path) else beside(path) for path, data in contents.items()}
    olds: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, data in contents.items():
            if isinstance(data, Path):
                fsync(data)
                continue
            with full_disk_reported(path, len(data)), partials[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            if path.exists():
                olds[path] = beside(path, OLD)
                os.link(path, olds[path])
        try:
            for path in contents:
                os.replace(partials[path], path)
                done.append(path)
        except BaseException:
            for path in done:
                if path in olds:
                    os.replace(olds[path], path)
                else:
                    path.unlink()
            raise
    finally:
        for path in (*partials.values(), *olds.values()):
            with suppress(OSError):
                path.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        fsync(folder)


def create_file(path: str | Path, data: bytes) -> bool:
    """Write a file that must not be there; several processes may try, and one of them succeeds.

    Returns:
        Whether this one did; False where the name is taken.
    """
    path = Path(path)
    partial = beside(path)
    with full_disk_reported(path, len(data)):
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        fsync(path.parent)
    return True


def append_lines(path: str | Path, lines: list[str]) -> None:
    """Add lines to a file, which is made if missing; they are on the disk when this returns.

    The line break ahead ends a line that a killed writer left unfinished. Readers skip what is no whole line.
    """
    path = Path(path)
    data = ("\n" + "\n".join(lines) + "\n").encode()
    with full_disk_reported(path, len(data)):
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync(path.parent)


@contextmanager
def atomic_directory(path: str | Path, needed: int | None = None) -> Iterator[Path]:
    """A directory to write into that becomes `path` at the end, in the place of what is there.

    Args:
        path: where the directory shall be; its parents are made.
        needed: its bytes, for the error of a full disk; None where they are not known.

    Yields:
        An empty directory beside `path`.

    Raises:
        DiskFull: there is no room. After any error what was at `path` is still there, and nothing new.
    """
    path = Path(path)
    partial = beside(path)
    with full_disk_reported(path, needed):
        try:
            partial.mkdir(parents=True)
            yield partial
            publish_directory(partial, path)
        finally:
            discard_directory(partial)


def publish_directory(partial: Path, path: Path, replace: bool = True) -> None:
    """Give a written directory its name, once everything in it is on the disk.

    Args:
        partial: the directory. What was at `path` has this name afterwards, and may be discarded.
        path: its name.
        replace: take the place of what is there.

    Raises:
        FileExistsError: there is something at `path` and `replace` is False.
    """
    sync_tree(partial)
    recover_directory(path)
    if replace and path.exists():
        exchange(partial, path)
    else:
        rename_new(partial, path)
    fsync(path.parent)


def recover_directory(path: Path) -> None:
    """Give a directory its name again, where a kill hit between the two renames of `exchange`."""
    if not path.exists() and path.parent.is_dir():
        olds = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.") and p.suffix == OLD]
        if olds:
            os.rename(olds[0], path)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a directory, and give names back that a kill took away.

    The caller has to be the only writer of the directory.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        found = LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        target = folder / found["name"]
        if found["kind"] == OLD and not target.exists():
            os.rename(path, target)
        elif path.is_dir():
            discard_directory(path)
        else:
            path.unlink()


def remove_directory(path: Path) -> None:
    """Remove a directory that is there; it loses its name first, so that no half of it passes for a whole."""
    partial = beside(path)
    os.rename(path, partial)
    discard_directory(partial)


def discard_directory(partial: Path) -> None:
    """Remove a directory that has no name yet, or none any more; what cannot be removed stays."""
    shutil.rmtree(partial, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Let two directories change names, in one step where the file system can (Linux, not NFS).

    Elsewhere a kill between two renames leaves `other` under a name that ends in `.old`, which
    `recover_directory` takes back. An error undoes the first rename.
    """
    if _renameat2(one, other, EXCHANGE):
        return
    old = beside(other, OLD)
    os.rename(other, old)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(old, other)
        raise
    os.rename(old, one)


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must be free: a plain rename would replace an empty directory.

    Raises:
        FileExistsError: it is not.
    """
    if _renameat2(source, target, NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def sync_tree(root: Path) -> None:
    """Bring everything in a directory to the disk, with the modes that its own says the umask allows."""
    mode = root.stat().st_mode & 0o777
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            file = Path(folder, name)
            found = file.lstat()
            is_linked = found.st_nlink > 1  # the file is of another directory too
            if found.st_mode & 0o777 != mode & 0o666 and not is_linked:
                os.chmod(file, mode & 0o666)
            fsync(file)
        if Path(folder).stat().st_mode & 0o777 != mode:
            os.chmod(folder, mode)
        fsync(Path(folder))


def fsync(path: str | Path) -> None:
    """Bring a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_bytes(write: Callable[[IO[bytes]], object]) -> bytes:
    """What a function writes into a binary file, for libraries whose own errors hide those of the disk."""
    content = io.BytesIO()
    write(content)
    return content.getvalue()


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Rename with a flag; False where the system or the file system does not know it."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
