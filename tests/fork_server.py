"""Runs Python programs in processes that have already imported libraries: `fork_server.py SOCKET`.

Each is a process of its own, forked from one that has loaded torch, torchrec and the like: the seconds that a
process needs for that are spent once. `fork_client.py` says what a command is. The server ends, and
all commands with it, when its standard input does. Coverage is not measured here: tests that call the same
programs in their own process measure it.
"""

import ast
import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

SIZE = 4
ROOT = Path(__file__).parents[1]
FOLDERS = ("mim_torchrec", "embeddings", "launch")
ALSO = ("torch.distributed.run", "torchx.cli.main")
LEFT_OUT = ("mim_torchrec", "mlflow")
AFTER_FORK = "jemalloc_bg_thd"
"""A thread that starts again in a forked process: of pyarrow's memory."""


def main(place: str) -> None:
    """Serve until standard input ends; in the process of a command, run it."""
    load()
    request = serve(place)
    if request is not None:
        start(request)


def load() -> None:
    """Import what the package imports of others. Itself it is imported by every process, as it always is.

    Raises:
        SystemExit: an import has started a thread, which a forked process would lack.
    """
    for module, names in sorted(foreign_imports()):
        found = import_module(module)
        for name in names:  # some packages load what is in them when it is asked for
            getattr(found, name, None)
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    if others := [name for name in names if name != AFTER_FORK][1:]:
        raise SystemExit(f"an import has started threads, {others}: this process cannot be forked")
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all pages


def foreign_imports() -> set[tuple[str, tuple[str, ...]]]:
    """Modules of other packages that ours import when they are imported, and the names that they take."""
    found: set[tuple[str, tuple[str, ...]]] = {(module, ()) for module in ALSO}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            body = ast.parse(path.read_text()).body
            body += [line for part in body if isinstance(part, ast.With) for line in part.body]
            for line in body:
                if isinstance(line, ast.Import):
                    found |= {(alias.name, ()) for alias in line.names}
                elif isinstance(line, ast.ImportFrom) and line.module is not None:
                    found.add((line.module, tuple(alias.name for alias in line.names)))
    return {one for one in found if one[0].partition(".")[0] not in LEFT_OUT}


def serve(place: str) -> dict[str, Any] | None:
    """Fork a process for every request.

    Returns:
        In such a process its request, in the server None when its standard input has ended.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    running: dict[int, socket.socket] = {}  # connections, by process
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                for process in running:
                    end(process)
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                received = receive(connection)
                if received is None:
                    connection.close()
                    continue
                request, streams = received
                process = os.fork()
                if process == 0:
                    os.setsid()
                    for other in (listener, connection, *running.values(), waiting):
                        other.close()
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    return request
                for stream in streams:
                    os.close(stream)
                running[process] = connection
                waiting.register(connection, selectors.EVENT_READ, process)
                waiting.register(os.pidfd_open(process), selectors.EVENT_READ, process)
                tell(connection, process)
            elif key.fileobj in running.values():  # the client was killed
                waiting.unregister(key.fileobj)
                end(key.data)
            else:
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                _, status = os.waitpid(key.data, 0)
                connection = running.pop(key.data)
                if connection in waiting.get_map():
                    waiting.unregister(connection)
                tell(connection, os.waitstatus_to_exitcode(status))
                connection.close()


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A request with its standard streams, or None from a client that has ended."""
    size, streams, _, _ = socket.recv_fds(connection, SIZE, 3)
    length = int.from_bytes(size, "big")
    with connection.makefile("rb") as file:
        text = file.read(length)
    if len(streams) < 3 or len(text) < length:
        for stream in streams:
            os.close(stream)
        return None
    return json.loads(text), list(streams)


def tell(connection: socket.socket, number: int) -> None:
    """Send a number to a client, which may have ended."""
    with suppress(OSError):
        connection.sendall(f"{number}\n".encode())


def end(process: int) -> None:
    """Kill a command and what it has left in its process group."""
    os.kill(process, signal.SIGKILL)  # which has no group yet, if it has just been forked
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def start(request: dict[str, Any]) -> NoReturn:
    """Run a command as Python would, in this process."""
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    words = request["words"]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    while request["name"] == "python" and words[0] == "-u":
        unbuffered, words = True, words[1:]
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if unbuffered:
        raw = io.FileIO(1, "w", closefd=False)
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)  # type: ignore[type-var]
    reseed()
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = added
    if request["name"] == "python":
        run_python(words)
    run_installed(request["name"], request["path"], words)


def reseed() -> None:
    """What is drawn without a seed differs between processes."""
    import numpy as np

    np.random.seed()


def run_python(words: list[str]) -> NoReturn:
    """`python WORDS`, after its options."""
    kind, *rest = words
    if kind == "-m":
        module, *arguments = rest
        sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
        if not hasattr(sys.modules.get(module), "__path__"):
            sys.modules.pop(module, None)  # Python runs it as new, too
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *arguments = rest
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        run_text(code, "<string>")
    elif kind == "-":
        sys.argv, sys.path[0] = ["-", *rest], ""
        run_text(sys.stdin.read(), "<stdin>")
    else:
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")
    raise SystemExit


def run_text(text: str, name: str) -> None:
    """Run a program in a new module `__main__`."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(text, name, "exec"), vars(module))


def run_installed(name: str, path: str, words: Iterable[str]) -> NoReturn:
    """A program that is installed beside Python."""
    sys.modules["__main__"] = ModuleType("__main__")
    sys.argv, sys.path[0] = [path, *words], os.path.dirname(path)
    (found,) = entry_points(group="console_scripts", name=name)
    sys.modules.pop(found.module, None)  # TorchX's has looked at the arguments when it was imported
    raise SystemExit(found.load()())


if __name__ == "__main__":
    main(*sys.argv[1:])
