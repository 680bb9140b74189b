"""Python without its start-up: `fork_client.py SOCKET REAL NAME WORDS…` lets a fork server run a command.

It stands for the process of the command, from its start to its end: it passes on arguments, environment,
working directory, namespaces, standard streams and signals, and ends as the command ends. If it is killed,
the command is killed. What the server cannot run as Python would is run by the real program.
"""

import json
import os
import signal
import socket
import sys
from typing import NoReturn

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIZE = 4
"""Bytes that hold the length of a message."""
NAMESPACES = ("pid", "net", "uts", "mnt")


def main(place: str, real: str, name: str, *words: str) -> NoReturn:
    """Run a command and end the process.

    Args:
        place: socket of the server.
        real: path of the program.
        name: of the program: python, or one that is installed beside it.
        words: its arguments.
    """
    if name == "python" and not is_known(words):
        os.execv(real, [real, *words])
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        request = {
            "name": name, "path": real, "words": words, "folder": os.getcwd(),
            "environment": dict(os.environ), "umask": os.umask(0), "ignored": ignored,
        }  # fmt: skip
        os.umask(request["umask"])
        text = json.dumps(request).encode()
        spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
        socket.send_fds(server, [len(text).to_bytes(SIZE, "big")], [0, 1, 2, *spaces])
        server.sendall(text)
        answers = server.makefile()
        process = int(answers.readline())
        for number in set(FORWARDED) - set(ignored):
            signal.signal(number, lambda number, _: os.kill(process, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        status = int(answers.readline())
    if status < 0:
        if -status != signal.SIGKILL:  # which has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_known(words: tuple[str, ...]) -> bool:
    """Whether the server runs Python with these words as Python does."""
    while words and words[0] == "-u":
        words = words[1:]
    return bool(words) and (words[0] in ("-", "-c", "-m") or not words[0].startswith("-"))


if __name__ == "__main__":
    main(*sys.argv[1:])
