"""Two machines in one: network namespaces with a link between them, each with a name of its own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

LINK = "mim0"
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


@dataclass(frozen=True)
class Node:
    """One of the machines.

    Attributes:
        name: of the host and of its namespace.
        address: at the link.
    """

    name: str
    address: str


@contextmanager
def linked_nodes() -> Iterator[list[Node]]:
    """Two machines with a link between them; skips the test where they cannot be made."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    nodes = [Node(f"mim-{os.getpid()}-{number}", f"10.77.0.{1 + number}") for number in range(2)]
    first, second = (node.name for node in nodes)
    made = subprocess.run(["ip", "netns", "add", first], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", second)
        ip("link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
        for node in nodes:
            quiet = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"  # neighbor discovery would be counted
            ip("netns", "exec", node.name, "sh", "-c", quiet)
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", LINK)
            ip("-n", node.name, "link", "set", LINK, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True)


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def hosts_file(path: Path, addresses: Mapping[str, str]) -> Path:
    """Write an /etc/hosts: addresses by name."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def start_on(
    node: Node, hosts: Path, *command: str, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command on a machine, in a session of its own; it and its children are one process group.

    Args:
        node: the machine.
        hosts: its /etc/hosts.
        command: what is run.
        log: takes what the command writes.
        environment: variables beyond those of this process.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    with log.open("w") as file:
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{node.name}", "unshare", "--uts", "--mount", "--propagation",
             "private", "sh", "-c", ENTER, "sh", node.name, str(hosts), *command],
            env={**inherited, **(environment or {})}, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def lose(node: Node) -> None:
    """End every process of a machine at once."""
    own = os.stat(f"/run/netns/{node.name}").st_ino

    def runs_there(process: int) -> bool:
        with suppress(OSError):  # it has just ended
            return os.stat(f"/proc/{process}/ns/net").st_ino == own
        return False

    while found := [
        pid for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))) if runs_there(pid)
    ]:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def torchrun(
    endpoint: str, nodes: str, *words: str, address: str = "", more: tuple[str, ...] = ()
) -> list[str]:
    """The command of a torchrun agent with one process, known to the others by an address."""
    more = (*(["--local_addr", address] if address else []), *more)
    return [
        sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint,
        "--rdzv_id", "a-test", "--nnodes", nodes, "--nproc_per_node", "1", *more, *words,
    ]  # fmt: skip
