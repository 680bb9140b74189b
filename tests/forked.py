"""Programs of Python for tests, whose processes come from a fork server: each command without its imports."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = ("mim", "torchrun", "torchx")


@contextmanager
def forked_programs() -> Iterator[dict[str, str]]:
    """Start a fork server and put `python`, `mim`, `torchrun` and `torchx` into a folder, which run in it.

    Returns:
        Variables with which shells, jobs of TorchX and agents of torchrun find them. `sys.executable` of a
        program is the real Python.
    """
    with tempfile.TemporaryDirectory(prefix="mim-fork-") as name:
        folder = Path(name)  # of a short name, because those of sockets are short
        real, socket = Path(sys.executable), folder / "socket"
        with _server(socket):
            for program, path in {
                "python": real,
                **{name: real.with_name(name) for name in INSTALLED},
            }.items():
                words = [sys.executable, "-I", "-S", HERE / "fork_client.py", socket, path, program]
                (folder / program).write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
                (folder / program).chmod(0o755)
            yield {
                "PATH": os.pathsep.join([name, str(real.parent), os.environ["PATH"]]),
                "MIM_PYTHON": str(folder / "python"),
                "PYTHON_EXEC": str(folder / "python"),
            }


@contextmanager
def _server(socket: Path) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": ""}  # a command has its own
    log = socket.with_suffix(".log")
    with log.open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), str(socket)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == b"listening\n", log.read_text()
        yield
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
    assert server.returncode == 0, log.read_text()
