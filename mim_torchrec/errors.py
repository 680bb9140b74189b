"""Expected errors: their base class, their exit statuses, and well-known errors of libraries in one line.

An error is expected when its cause lies outside the program: an option, a file, a version, a disk, a server.
A program ends such an error with one line and the status of its kind (`docs/errors.md`). Any other exception
is a bug, and shows a traceback. This module needs only Python, so that every layer can derive from it.
"""

import errno
import os
import shutil
from enum import IntEnum
from operator import attrgetter
from pathlib import Path


class Status(IntEnum):
    """How a program ends."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    VERSION = 4
    STATE = 5
    ENVIRONMENT = 6
    KEYBOARD = 130
    PIPE = 141
    TERMINATED = 143


class ExpectedError(Exception):
    """An error whose message is all that its reader needs: what is wrong, where, and what to do."""

    status = Status.DATA


class OptionError(ExpectedError, ValueError):
    """An option or an argument has a value that cannot be used, alone or with the others."""

    status = Status.USAGE


def check_sizes(config: object, least: int, *names: str) -> None:
    """Refuse options that are too small; `a.b` is the field `b` of the field `a`, and None passes.

    Raises:
        OptionError: the first option that is below `least`.

    >>> from types import SimpleNamespace as Config
    >>> check_sizes(Config(batch_size=0), 1, "batch_size")
    Traceback (most recent call last):
    mim_torchrec.errors.OptionError: --batch-size is 0; it must be at least 1
    """
    for name in names:
        value = attrgetter(name)(config)
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


class OutputExists(ExpectedError, ValueError):
    """What was to be written is there already, and is not overwritten."""

    status = Status.STATE


class SetupError(ExpectedError, RuntimeError):
    """The machine or the installation lacks something."""

    status = Status.ENVIRONMENT


class Diverged(ExpectedError, FloatingPointError):
    """The loss of a training, its gradient, or what a model computes is not finite."""


LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connectclosedbypeer",
    "broken pipe",
    "socket closed",
    "recvvalue failed",
    "sendbytes failed",
    "nccl communicator was aborted",
    "connection refused",
    "no route to host",
)
TIMEOUT = (
    "timed out waiting",
    "timed out after",
    "timed out connecting",
    "wait timeout after",
    "connect timeout",
    "collective operation timeout",
    "timeout caused pair closure",  # gloo: another wait for the same rank ran into its timeout first
)
ADVICE = {
    errno.ENOENT: (Status.DATA, "check the path"),
    errno.ENOTDIR: (Status.DATA, "check the path"),
    errno.EISDIR: (Status.DATA, "name a file"),
    errno.EEXIST: (Status.STATE, "choose another name or remove it"),
    errno.ENOTEMPTY: (Status.STATE, "choose another name or remove it"),
    errno.EACCES: (Status.ENVIRONMENT, "change its permissions or run as its owner"),
    errno.EPERM: (Status.ENVIRONMENT, "change its permissions or run as its owner"),
    errno.EROFS: (Status.ENVIRONMENT, "write to another file system"),
    errno.ENOSPC: (Status.ENVIRONMENT, "free space or write to another disk"),
    errno.EDQUOT: (Status.ENVIRONMENT, "free space or write to another disk"),
    errno.EMFILE: (Status.ENVIRONMENT, "raise the limit of open files (ulimit -n)"),
    errno.EADDRINUSE: (Status.ENVIRONMENT, "choose another port or end the program that has it"),
}


def is_timeout(error: RuntimeError) -> bool:
    """Whether it is of a collective that waited for another rank for too long."""
    return any(words in str(error).lower() for words in TIMEOUT)


def one_line(text: str) -> str:
    """A message without line breaks.

    >>> one_line("two\\n  errors:\\n\\n- a")
    'two; errors:; - a'
    """
    return "; ".join(line for line in (line.strip() for line in text.splitlines()) if line)


def explain(error: BaseException) -> tuple[str, Status] | None:
    """The line and the exit status of an expected error; None for a bug.

    Errors of libraries count as expected where their cause lies outside the program: files, disks, memory,
    Redis, the hubs of models, and ranks that have ended.

    >>> explain(FileNotFoundError(2, "No such file or directory", "items.parquet"))
    ('items.parquet: No such file or directory; check the path', <Status.DATA: 3>)
    >>> explain(ValueError("a bug")) is None
    True
    """
    text = one_line(str(error)) or type(error).__name__
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, ExpectedError):
        return text, error.status
    if library == "redis":
        return f"Redis: {text}; check the URL, the password and the server", Status.ENVIRONMENT
    if library in ("huggingface_hub", "requests", "httpx"):
        return f"{text}; check the name and the network, or give a local directory", Status.ENVIRONMENT
    if isinstance(error, OSError):
        return _of_system(error, text)
    if isinstance(error, MemoryError):
        return f"out of memory: {text}; lower the batch size or use a larger machine", Status.ENVIRONMENT
    if library == "torch" and isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory: {text}; lower the batch size", Status.ENVIRONMENT
    if isinstance(error, RuntimeError) and is_timeout(error):
        return f"another rank was waited for in vain ({text})", Status.ENVIRONMENT
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in LOST_PEER):
        return (
            f"another rank has ended; see its own message ({text})",
            Status.ENVIRONMENT,
        )
    return None


def _of_system(error: OSError, text: str) -> tuple[str, Status]:
    if error.errno is None:
        return text, Status.ENVIRONMENT
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    what = f"{where}: {error.strerror}" if where else str(error.strerror)
    status, advice = ADVICE.get(error.errno, (Status.ENVIRONMENT, "check the disk and the network"))
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename:
        what += f", {_free(Path(os.fsdecode(error.filename)))} bytes free"
    return f"{one_line(what)}; {advice}", status


def _free(path: Path) -> int:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
