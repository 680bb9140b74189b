"""Programs of Python for tests, whose processes come from a fork server: each command without its imports."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = ("mim", "torchrun", "torchx")
UNSET = ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START", "PYTHONPATH")
"""What a command has of its own, and the server has not."""


@contextmanager
def forked_programs(machines: Mapping[str, Sequence[str]] | None = None) -> Iterator[dict[str, str]]:
    """Start a fork server and put `python`, `mim`, `torchrun` and `torchx` into a folder, which run in it.

    Args:
        machines: where these programs will be started: host names, each with the words before a command that
            run it there. Every one gets a server. By default it is this machine.

    Returns:
        Variables with which shells, jobs of TorchX and agents of torchrun find them. `sys.executable` of a
        program is the real Python.
    """
    with tempfile.TemporaryDirectory(prefix="mim-fork-") as name, ExitStack() as servers:
        folder = Path(name)  # of a short name, because those of sockets are short
        real = Path(sys.executable)
        for host, entered in (machines or {os.uname().nodename: []}).items():
            servers.enter_context(_server(folder / f"{host}.socket", entered))
        for program, path in {"python": real, **{name: real.with_name(name) for name in INSTALLED}}.items():
            words = [sys.executable, "-I", "-S", str(HERE / "fork_client.py")]
            place = f'{shlex.quote(name)}/"$(uname -n)".socket'
            line = f'exec {shlex.join(words)} {place} {shlex.quote(str(path))} {program} "$@"'
            (folder / program).write_text(f"#!/bin/sh\n{line}\n")
            (folder / program).chmod(0o755)
        yield {
            "PATH": os.pathsep.join([name, str(real.parent), os.environ["PATH"]]),
            "MIM_PYTHON": str(folder / "python"),
            "PYTHON_EXEC": str(folder / "python"),
        }


@contextmanager
def _server(socket: Path, entered: Sequence[str]) -> Iterator[None]:
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    log = socket.with_suffix(".log")
    with log.open("w") as errors:
        server = subprocess.Popen(
            [*entered, sys.executable, str(HERE / "fork_server.py"), str(socket)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n", log.read_text()
        yield
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
