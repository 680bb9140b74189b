"""Ports of the server: opened before anything is loaded, so that a taken one is an error at once."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

BACKLOG = 2048


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has a port, and does not listen yet.

    Raises:
        OSError: another program has the port.
    """
    # asyncio sends without delay only what it knows to be TCP
    with socket.socket(_family(host), socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        yield listening


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """A port that only processes of ours bind, which share it (SO_REUSEPORT).

    Raises:
        OSError: another program has the port.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind((host, port))  # refused while anybody listens there, also with SO_REUSEPORT
        port = alone.getsockname()[1]
    with socket.socket(_family(host), socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
        yield port


def address(host: str, port: int) -> str:
    """As it stands in URLs.

    >>> address("::1", 80), address("127.0.0.1", 80)
    ('[::1]:80', '127.0.0.1:80')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
