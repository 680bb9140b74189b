"""One TCP connection between two hosts: whether it can be made, how fast it is, and how their clocks differ.

This module needs only Python.
"""

import hmac
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

PATIENCE = 10.0  # seconds for one answer
PINGS = 20
BLOCK = bytes(1 << 20)
BLOCKS, SECONDS = 64, 3.0  # what is sent to measure the speed: so much, or for so long
TOKEN = 32  # characters
NUMBER = struct.Struct("!d")


@dataclass(frozen=True)
class Link:
    """What one host found of another.

    Attributes:
        start: number of the host that connected.
        to: number of the other.
        problem: why there is no connection, "" where there is one.
        bytes_per_second: of one connection.
        round_trip: the shortest, in seconds.
        clock: by how many seconds the other's clock is ahead; right to half a round trip.
    """

    start: int
    to: int
    problem: str = ""
    bytes_per_second: float = 0.0
    round_trip: float = 0.0
    clock: float = 0.0


class Answers:
    """Answers connections of other hosts, in a thread, for a block.

    Args:
        address: to listen at, on a free port.

    Attributes:
        port: the port.
        token: what a connection has to begin with.
    """

    def __init__(self, address: str) -> None:
        self._listening = socket.create_server((address, 0))
        self._listening.settimeout(0.2)
        self.port: int = self._listening.getsockname()[1]
        self.token = secrets.token_hex(TOKEN // 2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def __enter__(self) -> "Answers":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._listening.close()

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(OSError):  # nobody has come, or has left at once
                connection, _ = self._listening.accept()
                with connection:
                    connection.settimeout(PATIENCE)
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        if not hmac.compare_digest(_read(connection, TOKEN), self.token.encode()):
            return
        for _ in range(PINGS):
            _read(connection, 1)
            connection.sendall(NUMBER.pack(time.time()))
        received = 0
        while part := connection.recv(len(BLOCK)):
            received += len(part)
        connection.sendall(NUMBER.pack(received))


def measure(start: int, to: int, address: str, port: int, token: str) -> Link:
    """Connect to the `Answers` of another host.

    Args:
        start: number of this host.
        to: number of the other.
        address: of the other.
        port: likewise.
        token: likewise.

    Returns:
        What was found; a connection that fails is a `problem` and no error.
    """
    try:
        with socket.create_connection((address, port), timeout=PATIENCE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token.encode())
            round_trip, clock = min(_ping(connection) for _ in range(PINGS))
            began = time.perf_counter()
            sent = 0
            while sent < BLOCKS and time.perf_counter() - began < SECONDS:
                connection.sendall(BLOCK)
                sent += 1
            connection.shutdown(socket.SHUT_WR)
            (received,) = NUMBER.unpack(_read(connection, NUMBER.size))
            seconds = time.perf_counter() - began
    except OSError as error:
        return Link(start, to, problem=f"port {port}: {error.strerror or error}")
    return Link(start, to, bytes_per_second=received / seconds, round_trip=round_trip, clock=clock)


def _ping(connection: socket.socket) -> tuple[float, float]:
    """Seconds of a round trip, and seconds by which the other's clock is ahead."""
    sent, began = time.time(), time.perf_counter()
    connection.sendall(b"?")
    (theirs,) = NUMBER.unpack(_read(connection, NUMBER.size))
    round_trip = time.perf_counter() - began
    return round_trip, theirs - (sent + round_trip / 2)


def _read(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes.

    Raises:
        ConnectionError: the other end has closed the connection before.
    """
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the other host has closed the connection")
        data += part
    return data
