"""The network interface by which ranks of several machines reach each other."""

import os
import socket

from mim_torchrec.errors import SetupError
from mim_torchrec.extras import needs

VARIABLE = "GLOO_SOCKET_IFNAME"


def check_interface() -> None:
    """Refuse an address that other machines cannot reach, before ranks wait for each other there.

    Gloo listens at the address that the host's own name has. Debian's installer writes `127.0.1.1` beside
    that name into /etc/hosts, where no other machine reaches it.

    Raises:
        SetupError: ranks are on several machines and the name of this one has a loopback address.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ.get("WORLD_SIZE", "1"))
    if not several or VARIABLE in os.environ:
        return
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "no address"
    if not (address.startswith("127.") or address == "no address"):
        return
    known = ", ".join(f"{name} ({at})" for name, at in interfaces().items()) or "none found"
    raise SetupError(
        f"{host} resolves to {address} on this machine, where ranks on other machines cannot reach it; set "
        f"{VARIABLE} (and NCCL_SOCKET_IFNAME) to the interface of the cluster's network: {known}"
    )


def interfaces() -> dict[str, str]:
    """IPv4 addresses of the interfaces that are not loopback, by name."""
    with needs("train"):
        import psutil
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }
