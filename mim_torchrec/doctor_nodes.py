"""`mim doctor --nodes`: do the hosts of a job reach each other, how fast, and do their clocks agree?

Run by torchrun on every host, as a stage is run:

    python -m torch.distributed.run --nnodes 2 --nproc_per_node 1 … -m mim_torchrec.doctor --nodes

The first process of every host listens where gloo would listen and connects to all other hosts, one after the
other. Then all ranks form the process group of a stage and sum a number. The first rank prints what was
found; a host that does not reach the first one prints that itself. A token of the job lets nobody else in.
Not checked: the connections of NCCL beyond that sum, InfiniBand, shared file systems.
"""

import json
import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from mim_torchrec.builds import PACKAGES
from mim_torchrec.errors import OptionError, explain
from mim_torchrec.findings import Finding
from mim_torchrec.links import Answers, Link, measure
from mim_torchrec.training.config import Timeouts
from mim_torchrec.training.distributed import distributed, meeting_store
from mim_torchrec.training.network import VARIABLE, interfaces, loopback_problem, own_address

START = 60.0  # seconds in which all hosts have to come
TURN = 60.0  # seconds of one connection to every other host
CLOCKS = 1.0  # seconds by which clocks may differ
SHOWN = 10  # pairs that are named
HOW = "python -m torch.distributed.run --nnodes 2 … -m mim_torchrec.doctor --nodes, on every host"
PORTS = "open all TCP ports between the hosts on this network, or name another interface"


@dataclass(frozen=True)
class Node:
    """A host of the job.

    Attributes:
        name: of the host.
        machine: its boot and its network namespace.
        address: where it listens, and `port`.
        problem: why others cannot reach it there, "" where they can.
        interfaces: that it has.
        versions: of Python and of the packages that have to agree.
        token: that it wants to be told.
    """

    name: str
    machine: str
    address: str
    port: int
    problem: str
    interfaces: str
    versions: str
    token: str

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def examine() -> Iterator[Finding]:
    """Check the hosts of a job; every rank calls this, the first one gets the findings.

    Raises:
        OptionError: this process is no rank of a job.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise OptionError(f"--nodes checks the hosts of a job; start it by {HOW}")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    number = int(os.environ.get("GROUP_RANK", rank // local))
    count = int(os.environ.get("GROUP_WORLD_SIZE", world_size // local))
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = dist.PrefixStore("doctor", meeting_store(rank, timedelta(seconds=START)))
    except dist.DistError as error:
        text = (
            f"{socket.gethostname()} does not reach the first rank at {meeting}: {str(error).splitlines()[0]}"
        )
        yield Finding("meeting", False, text, PORTS)
        return
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        yield from _of_host(store, number, count, meeting)
    try:
        store.wait(["verdict"], timedelta(seconds=START + TURN * count))
        verdict = store.get("verdict")
    except dist.DistError as error:
        text = f"rank {rank} on {socket.gethostname()} has lost the first rank: {str(error).splitlines()[0]}"
        yield Finding("meeting", False, text, "see the log of the first rank")
        return
    if verdict == b"sound":
        yield from _of_group(rank, world_size)
    elif rank == 0:
        _absent(store, "left", world_size - 1, START)  # it hosts the store
    else:
        store.set(f"left/{rank - 1}", "")


def _of_host(store: dist.Store, number: int, count: int, meeting: str) -> Iterator[Finding]:
    """Check this host against all others; the first host gets the findings."""
    address, how = own_address()
    with Answers(address or "127.0.0.1") as answers:
        node = Node(
            name=socket.gethostname(), machine=_machine(), address=address or "no address", port=answers.port,
            problem=loopback_problem() or "", versions=_versions(), token=answers.token,
            interfaces=", ".join(f"{name} ({at})" for name, at in interfaces().items()),
        )  # fmt: skip
        store.set(f"node/{number}", json.dumps(asdict(node)))
        absent = _absent(store, "node", count, START)
        if absent:
            if number == 0:
                yield Finding(
                    "meeting", False, f"hosts {absent} of {count} have not come to {meeting}", PORTS
                )
                store.set("verdict", "unsound")
            return
        nodes = [Node(**json.loads(store.get(f"node/{k}"))) for k in range(count)]
        links: list[Link] = []
        for turn in range(1, count):  # in each, a host connects to one and answers one
            other = (number + turn) % count
            links.append(measure(number, other, nodes[other].address, nodes[other].port, nodes[other].token))
            store.set(f"turn-{turn}/{number}", "")
            _absent(store, f"turn-{turn}", count, TURN)
        store.set(f"links/{number}", json.dumps([asdict(link) for link in links]))
        absent = _absent(store, "links", count, TURN)
    if number == 0:
        met = f"{count} hosts at {meeting}: {', '.join(map(str, nodes))}"
        if absent:
            yield Finding("meeting", False, f"{met}; hosts {absent} have ended", "see their own logs")
        else:
            yield Finding("meeting", True, met)
        reported = [k for k in range(count) if k not in absent]
        links = [Link(**one) for k in reported for one in json.loads(store.get(f"links/{k}"))]
        findings = list(judge(nodes, links))
        yield from findings
        sound = not absent and all(finding.ok for finding in findings)
        store.set("verdict", "sound" if sound else "unsound")


def judge(nodes: list[Node], links: list[Link]) -> Iterator[Finding]:
    """What the measurements mean.

    Args:
        nodes: by number.
        links: every ordered pair of them that reported.

    Yields:
        A finding for the versions, the interfaces, the connections, their speed, and the clocks.
    """
    versions = sorted({node.versions for node in nodes})
    if len(versions) == 1:
        yield Finding("versions", True, versions[0])
    else:
        said = "; ".join(
            f"{', '.join(node.name for node in nodes if node.versions == one)}: {one}" for one in versions
        )
        yield Finding("versions", False, f"hosts differ: {said}", "install one lock file on all hosts")
    several = len({node.machine for node in nodes}) > 1
    for node in nodes:
        if several and node.problem:
            yield Finding("interface", False, f"{node.name}: {node.problem}", f"set {VARIABLE} there")
    failed = [link for link in links if link.problem]
    for link in failed[:SHOWN]:
        to = nodes[link.to]
        fix = f"{PORTS} of {to.name} by {VARIABLE}: {to.interfaces or 'it has no other'}"
        yield Finding("connection", False, f"{nodes[link.start].name} -> {to}: {link.problem}", fix)
    if len(failed) > SHOWN:
        yield Finding("connection", False, f"{len(failed) - SHOWN} more pairs fail", PORTS)
    whole = [link for link in links if not link.problem]
    if not whole:
        return
    if not failed:
        yield Finding("connection", True, f"{len(whole)} connections between {len(nodes)} hosts")
    slowest = min(whole, key=lambda link: link.bytes_per_second)
    rates = [link.bytes_per_second for link in whole]
    yield Finding(
        "bandwidth",
        True,
        f"one TCP connection: median {_gigabits(median(rates))}, slowest {_gigabits(min(rates))} "
        f"({_pair(nodes, slowest)}); round trip at most {max(one.round_trip for one in whole) * 1e3:.2f} ms",
    )
    widest = max(whole, key=lambda link: abs(link.clock))
    beyond = abs(widest.clock) > CLOCKS + widest.round_trip
    yield Finding(
        "clocks", not beyond,
        f"differ by {abs(widest.clock) * 1e3:.1f} ms at most ({_pair(nodes, widest)})",
        "synchronize them, for example by chrony" if beyond else "",
    )  # fmt: skip


def _of_group(rank: int, world_size: int) -> Iterator[Finding]:
    """Form the process group of a stage; all ranks sum their numbers."""
    try:
        with distributed(0, Timeouts(init=START, step=TURN)) as context:
            total = torch.full((1,), context.rank + 1.0, device=context.device)
            dist.all_reduce(total)
            context.barrier()
    except (RuntimeError, OSError) as error:
        found = explain(error)
        yield Finding("group", False, f"rank {rank}: {found[0] if found else error}", "see the other ranks")
        return
    if rank == 0:
        right = total.item() == world_size * (world_size + 1) / 2
        yield Finding("group", right, f"{world_size} ranks summed a number on {context.device.type}",
                      "" if right else f"the sum is {total.item()}; report this")  # fmt: skip


def _absent(store: dist.Store, key: str, count: int, seconds: float) -> list[int]:
    """Hosts that have not set a key in time."""
    try:
        store.wait([f"{key}/{k}" for k in range(count)], timedelta(seconds=seconds))
        return []
    except dist.DistError:
        return [k for k in range(count) if not store.check([f"{key}/{k}"])]


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def _versions() -> str:
    found = []
    for package in ("mim-torchrec", *PACKAGES):
        try:
            found.append(f"{package} {version(package)}")
        except ModuleNotFoundError:  # one of the two builds of fbgemm
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])


def _pair(nodes: list[Node], link: Link) -> str:
    return f"{nodes[link.start].name} -> {nodes[link.to].name}"


def _gigabits(rate: float) -> str:
    return f"{rate * 8 / 1e9:.2f} Gbit/s"
