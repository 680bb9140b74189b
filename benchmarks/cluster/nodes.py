"""Machines of a cluster as namespaces of this one: network, host name, processes and /etc/hosts of their own.

Everything lives in namespaces without a name, which the kernel removes with their last process, and every
process dies with the one that made it (`PR_SET_PDEATHSIG`, process namespaces). A killed program therefore
leaves nothing behind: no interface, no mount, no process. The host's files are not changed.

    host ── veth ── hub: a bridge in a namespace ──┬── node 1
                                                   └── node 2
"""

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from random import SystemRandom

from mim_torchrec.errors import SetupError

TOOLS = ("ip", "nsenter", "setpriv", "unshare")
PATIENCE = 300.0
"""Seconds for anything that takes a moment on an idle machine."""
IN_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child=KILL")


def why_no_nodes() -> str:
    """Why this machine can have no nodes in namespaces, "" if it can."""
    if os.geteuid() != 0:
        return "nodes in namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"nodes in namespaces need {', '.join(missing)} (Debian: iproute2, util-linux)"
    words = ["unshare", *IN_NAMESPACES, "ip", "link", "add", "mim0", "type", "bridge"]
    tried = subprocess.run(words, capture_output=True, text=True)
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else ""


class Node:
    """A machine: one process in namespaces of its own, and those that it starts.

    Args:
        name: its host name.
        address: on the cluster's network.
        hosts: the file that is its /etc/hosts.
        command: what runs on it, once its network is there.
        log: gets what the command says.
    """

    def __init__(self, name: str, address: str, hosts: Path, command: list[str], log: Path) -> None:
        self.name, self.address = name, address
        # bash stays, because the first process of a node has to wait for those that lose their parent
        prepare = 'hostname "$0" && mount --bind "$1" /etc/hosts && read -r'
        script = prepare + ' || exit 1; "${@:2}" </dev/null; exit $?'
        words = ["unshare", *IN_NAMESPACES, "--propagation", "private", "bash", "-c", script, name]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                dying_with_us([*words, str(hosts), *command]),
                stdin=subprocess.PIPE, stdout=stream, stderr=stream,
            )  # fmt: skip
        self._log = log
        wait_until(lambda: _has_own_network(self._process.pid), self._process, log)

    @property
    def pid(self) -> int:
        """A process in its network."""
        return self._process.pid

    def go(self) -> None:
        """Let the command start."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.close()

    def is_up(self) -> bool:
        """Whether its command runs."""
        return self._process.poll() is None

    def lose(self) -> None:
        """End everything on it at once, without a word to anybody: a power cut."""
        if not self.is_up():
            return
        os.kill(self._first(), signal.SIGKILL)  # with which all end
        self._process.wait()

    def _first(self) -> int:
        """Its first process."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0]) if children else self.pid


class Network:
    """A network between this machine and nodes in namespaces.

    Args:
        folder: gets the nodes' /etc/hosts and logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hosts = folder / "hosts"
        self.nodes: dict[str, Node] = {}
        self._hub = subprocess.Popen(dying_with_us(["unshare", "--net", "sleep", "infinity"]))
        try:
            wait_until(lambda: _has_own_network(self._hub.pid), self._hub)
            subnet = _free_subnet()
            self._addresses = [str(address) for address in subnet.hosts()]
            self.address, self._prefix = self._addresses.pop(0), subnet.prefixlen
            outside = f"mim{uuid.uuid4().hex[:8]}"
            self._in_hub("link", "add", "hub", "type", "bridge")
            self._in_hub("link", "set", "hub", "up")
            self._attach(outside, os.getpid(), "host")
            _ip("addr", "add", f"{self.address}/{self._prefix}", "dev", outside)
            _ip("link", "set", outside, "up")
            self.interface = outside
        except BaseException:
            self.close()
            raise

    def addresses(self, names: list[str]) -> dict[str, str]:
        """Give nodes addresses and write them into the /etc/hosts that all nodes see."""
        found = dict(zip(names, self._addresses, strict=False))
        known = {"localhost": "127.0.0.1", "controller": self.address, **found}
        self.hosts.write_text("".join(f"{address} {name}\n" for name, address in known.items()))
        return found

    def start(self, name: str, address: str, command: list[str]) -> Node:
        """Start a node; a lost one of the same name comes back."""
        node = Node(name, address, self._folder / "hosts", command, self._folder / f"{name}.log")
        self.nodes[name] = node
        self._attach("eth0", node.pid, name)
        for words in (
            ("addr", "add", f"{address}/{self._prefix}", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip(*words, pid=node.pid)
        node.go()
        return node

    def close(self) -> None:
        """End all nodes and the network."""
        for node in self.nodes.values():
            node.lose()
        self._hub.kill()
        self._hub.wait()

    def _attach(self, interface: str, pid: int, port: str) -> None:
        """Put one end of a pair of interfaces where a process is, the other one onto the bridge."""
        known = json.loads(self._in_hub("-json", "link", "show"))
        if any(link["ifname"] == port for link in known):  # of a node that was lost a moment ago
            self._in_hub("link", "delete", port)
        pair = ["link", "add", port, "type", "veth", "peer", "name", interface, "netns", str(pid)]
        self._in_hub(*pair)
        self._in_hub("link", "set", port, "master", "hub", "up")

    def _in_hub(self, *words: str) -> str:
        return _ip(*words, pid=self._hub.pid)


def wait_until(
    condition: Callable[[], object],
    process: "subprocess.Popen[bytes] | None" = None,
    log: Path | None = None,
    patience: float = PATIENCE,
) -> None:
    """Ask a condition again and again until it holds.

    Raises:
        SetupError: the process that shall make it true has ended, or it takes too long.
    """
    until = time.monotonic() + patience
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > until:
            said = log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
            what = f"ended with {process.returncode}" if ended and process is not None else "takes too long"
            raise SetupError(f"a process of the cluster {what}: {said}")
        time.sleep(0.02)


def dying_with_us(words: list[str]) -> list[str]:
    """A command that is killed when the thread that starts it ends, however it ends."""
    return ["setpriv", "--pdeathsig", "KILL", *words]


def _has_own_network(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return False


def _free_subnet() -> ipaddress.IPv4Network:
    """254 private addresses that no interface of this machine has."""
    taken = [
        ipaddress.ip_network(f"{address['local']}/{address['prefixlen']}", strict=False)
        for link in json.loads(_ip("-json", "-4", "addr", "show"))
        for address in link["addr_info"]
    ]
    while True:
        random = SystemRandom()
        subnet = ipaddress.IPv4Network(f"10.{random.randrange(64, 128)}.{random.randrange(256)}.0/24")
        if not any(subnet.overlaps(other) for other in taken):
            return subnet


def _ip(*words: str, pid: int | None = None) -> str:
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net"] if pid is not None else []
    done = subprocess.run([*inside, "ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
