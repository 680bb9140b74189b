"""Runs Python programs in processes that have already imported libraries: `fork_server.py SOCKET`.

Each is a process of its own, forked from one that has loaded torch, torchrec and the like: the seconds that a
process needs for that are spent once. It runs in the namespaces of its client, so on their machine.
`fork_client.py` says what a command is. The server ends, and all commands with it, when its standard input
does.
"""

import atexit
import ctypes
import gc
import inspect
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

SIZE = 4
NAMESPACES = ("pid", "net", "uts", "mnt")
CLONE_FS = 0x200
LIBC = ctypes.CDLL(None, use_errno=True)
ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mim_torchrec": ROOT / "mim_torchrec",
    "mim_torchrec.embeddings": ROOT / "embeddings",
    "mim_torchrec.launch": ROOT / "launch",
}
ALSO = ("torch.distributed.run", "torchx.cli.main")
STARTS_THREADS = ("mim_torchrec.pipeline.tracking",)
AFTER_FORK = "jemalloc_bg_thd"
"""A thread that starts again in a forked process: of pyarrow's memory."""


def main(place: str) -> None:
    """Serve until standard input ends; in the process of a command, run it.

    Commands that come while the libraries are loaded wait for them.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    if "MIM_COVERAGE" in os.environ:
        sys.path.insert(0, str(ROOT))
        import_module("tests.line_coverage").measure()
        del sys.path[0]
    load()
    request = serve(listener)
    if request is not None:
        finish(request)


def load() -> None:
    """Import the package, and what it imports of others at once.

    Raises:
        SystemExit: an import has started a thread, which a forked process would lack.
    """
    for module in (*ALSO, *own_modules()):
        with suppress(ImportError):  # of what is not installed; whoever imports it is told so
            import_module(module)
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    if others := [name for name in names if name != AFTER_FORK][1:]:
        raise SystemExit(f"an import has started threads, {others}: this process cannot be forked")
    inspect.stack()  # which torch elastic asks for often: what is not cached is sought in all modules
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all pages


def own_modules() -> list[str]:
    """All modules of the package, but for those that cannot be imported here."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return [name for name in found if name not in STARTS_THREADS]


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a process for every request.

    Returns:
        In such a process its request, in the server None when its standard input has ended.
    """
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
                request, given = received
                try:
                    process = fork_into(given[3])
                except OSError:  # the machine of the client is gone
                    process = -1
                if process == 0:
                    os.setsid()
                    for other in (listener, connection, *running.values(), waiting):
                        other.close()
                    enter(given[4:])
                    for number, stream in enumerate(given[:3]):
                        os.dup2(stream, number)
                for number in given:
                    os.close(number)
                if process == 0:
                    return request
                if process < 0:
                    connection.close()
                    continue
                running[process] = connection
                waiting.register(connection, selectors.EVENT_READ, process)
                waiting.register(os.pidfd_open(process), selectors.EVENT_READ, process)
                tell(connection, number_in_namespace(process))
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
    """A request with its standard streams and namespaces, or None from a client that has ended."""
    size, given, _, _ = socket.recv_fds(connection, SIZE, 3 + len(NAMESPACES))
    length = int.from_bytes(size, "big")
    with connection.makefile("rb") as file:
        text = file.read(length)
    if len(given) < 3 + len(NAMESPACES) or len(text) < length:
        for number in given:
            os.close(number)
        return None
    return json.loads(text), list(given)


def fork_into(namespace: int) -> int:
    """Fork, into a namespace of processes.

    Raises:
        OSError: its first process has ended.
    """
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    elsewhere = not os.path.sameopenfile(own, namespace)
    if elsewhere:
        enter([namespace])
    process = -1
    try:
        process = os.fork()
    finally:
        if process and elsewhere:
            enter([own])
        os.close(own)
    return process


def enter(namespaces: Iterable[int]) -> None:
    """Go on in other namespaces; one of processes is for those that are forked from now on."""
    LIBC.unshare(CLONE_FS)  # what threads of libraries share is not taken into another mount namespace
    for namespace in namespaces:
        if LIBC.setns(namespace, 0):
            error = ctypes.get_errno()
            raise OSError(error, f"a namespace cannot be entered: {os.strerror(error)}")


def number_in_namespace(process: int) -> int:
    """What a process is called where it runs."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("\nNSpid:")[2].partition("\n")[0].split()[-1])


def tell(connection: socket.socket, number: int) -> None:
    """Send a number to a client, which may have ended."""
    with suppress(OSError):
        connection.sendall(f"{number}\n".encode())


def end(process: int) -> None:
    """Kill a command and what it has left in its process group."""
    os.kill(process, signal.SIGKILL)  # which has no group yet, if it has just been forked
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def finish(request: dict[str, Any]) -> NoReturn:
    """Run a command to the end of its process, as Python would, in this process.

    What is loaded is not deallocated before: that copies its pages and takes longer than a short command.
    """
    status: Any = 1
    try:
        start(request)
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, BrokenPipeError):  # it was closed, at either end
            stream.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((status or 0) & 0xFF)


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
    inspect.modulesbyfile[os.path.abspath(runpy.run_path.__code__.co_filename)] = "runpy"  # type: ignore[attr-defined]
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
