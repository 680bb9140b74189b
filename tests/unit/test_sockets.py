"""Ports of the server: a taken one is refused, whoever shares it, and a reserved one can be shared."""

import errno
import socket

import pytest

from mim_torchrec.serving.sockets import bound, reserved


def listening(port: int) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("127.0.0.1", port))
    one.listen()
    return one


@pytest.mark.parametrize("open_port", [bound, reserved])
def test_a_port_that_another_program_listens_on_is_refused(open_port):
    with (
        listening(0) as other,
        pytest.raises(OSError, match="in use") as caught,
        open_port("127.0.0.1", other.getsockname()[1]),
    ):
        pass
    assert caught.value.errno == errno.EADDRINUSE


def test_a_reserved_port_is_shared_by_those_who_say_so():
    with reserved("127.0.0.1", 0) as port, listening(port), listening(port):
        with socket.socket() as alone, pytest.raises(OSError, match="in use"):
            alone.bind(("127.0.0.1", port))
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_a_bound_port_takes_no_connection_before_it_listens():
    with bound("127.0.0.1", 0) as one:
        where = one.getsockname()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(where):
            pass
        one.listen()
        with socket.create_connection(where):
            pass
