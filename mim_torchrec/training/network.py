"""The network interface by which ranks of several machines reach each other."""

import os
import socket

from mim_torchrec.errors import SetupError
from mim_torchrec.extras import needs
from mim_torchrec.hosts import is_loopback

VARIABLE = "GLOO_SOCKET_IFNAME"


def check_interface() -> None:
    """Refuse an address that other machines cannot reach, before ranks wait for each other there.

    Gloo listens at the address that the host's own name has. Debian's installer writes `127.0.1.1` beside
    that name into /etc/hosts, where no other machine reaches it.

    Raises:
        SetupError: ranks are on several machines and the name of this one has a loopback address.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ.get("WORLD_SIZE", "1"))
    if several and VARIABLE not in os.environ:
        problem = loopback_problem()
        if problem is not None:
            raise SetupError(problem)


def loopback_problem() -> str | None:
    """What is wrong where gloo would listen at an address of this machine only, and what to set."""
    address, how = own_address()
    if address is not None and not is_loopback(address):
        return None
    known = ", ".join(f"{name} ({at})" for name, at in interfaces().items()) or "none found"
    return (
        f"{how} resolves to {address or 'no address'} on this machine, where ranks on other machines cannot "
        f"reach it; set {VARIABLE} (and NCCL_SOCKET_IFNAME) to the interface of the cluster's network: "
        f"{known}"
    )


def own_address() -> tuple[str | None, str]:
    """The IPv4 address that gloo listens at, None where there is none, and what it is found by."""
    named = os.environ.get(VARIABLE)
    if named:
        return interfaces(with_loopback=True).get(named.split(",")[0]), f"{VARIABLE}={named}"
    host = socket.gethostname()
    try:
        return socket.gethostbyname(host), host
    except OSError:
        return None, host


def interfaces(*, with_loopback: bool = False) -> dict[str, str]:
    """IPv4 addresses of the interfaces by name; those of loopback only where they are asked for."""
    with needs("train"):
        import psutil
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and (with_loopback or not is_loopback(address.address))
    }
