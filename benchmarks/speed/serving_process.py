"""A server as an operator has it: its start, its memory and its end, its workers, several users a request."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section
from mim_torchrec.benchmarks.measures.memory import private_bytes

PATIENCE = 60.0  # seconds: eight long requests of a preset that is not linear take their time
WORKERS, USERS = (1, 2), (1, 8)
MOST_MIB, MOST_START, MOST_EXIT = 350.0, 3.0, 2.0
Columns = Mapping[str, list[int]]


class Served:
    """A server in a process of its own.

    Args:
        bundle: what it serves.
        table: its vectors.
        threads: of a worker.
        workers: of the server.
    """

    def __init__(self, bundle: Path, table: Path, *, threads: int, workers: int = 1) -> None:
        words = ["--bundle", str(bundle), "--store", str(table), "--port", "0", "--workers", str(workers)]
        words += ["--threads", str(threads), "--limits.deadline-ms", str(1000 * PATIENCE)]
        self._process = subprocess.Popen([sys.executable, "-m", "mim_torchrec.serving.main", *words],
                                         stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert self._process.stdout is not None  # it is a pipe
        line = self._process.stdout.readline()
        if "serving" not in line:
            raise RuntimeError("the server did not start; its messages are above")
        self.address = f"{line.split()[-1]}/v2/models/mim/infer"

    @property
    def pid(self) -> int:
        """Of its process, or of the parent of its workers."""
        return self._process.pid

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def as_message(users: Sequence[Columns]) -> bytes:
    """A request as the protocol has it.

    Args:
        users: ids and times by name, of each user.
    """
    columns = {name: [value for user in users for value in user[name]] for name in users[0]}
    if len(users) > 1:
        for role in ("candidate", "behavior"):
            columns[f"{role}.lengths"] = [len(user[f"{role}_item_id"]) for user in users]
    inputs = [
        {"name": name, "shape": [len(data)], "datatype": "INT64", "data": data}
        for name, data in columns.items()
    ]
    return json.dumps({"inputs": inputs}).encode()


def load(address: str, bodies: Sequence[bytes], clients: int) -> tuple[list[float], float]:
    """Seconds of every request, and requests per second of all clients together.

    Clients are threads with a connection each, and do little themselves: they share the machine with the
    server.
    """
    where = urlsplit(address)
    host = where.hostname
    assert host is not None, f"no host in {address}"

    def client(own: Sequence[bytes]) -> list[float]:
        seconds = []
        with closing(HTTPConnection(host, where.port, timeout=PATIENCE)) as http:
            http.connect()
            http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for body in own:
                started = time.perf_counter()
                http.request("POST", where.path, body, {"Content-Type": "application/json"})
                answer = http.getresponse()
                text = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"the server answers {answer.status}: {text.decode()}")
                seconds.append(time.perf_counter() - started)
        return seconds

    client(bodies[:1])
    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        found = list(pool.map(client, [bodies[k::clients] for k in range(clients)]))
        spent = time.perf_counter() - started
    return [second for own in found for second in own], len(bodies) / spent


def compare_processes(
    bundle: Path,
    table: Path,
    columns: Callable[[int], Columns],
    *,
    threads: int,
    requests: int,
    clients: int,
) -> dict[str, Any]:
    """Start, memory and end of a server; its requests per second by workers, its users by users a request.

    Args:
        bundle: what is served.
        table: its vectors.
        columns: of a user, by a seed.
        threads: of the one server; a worker beside others has one.
        requests: to send.
        clients: at once.
    """
    bodies = [as_message([columns(seed)]) for seed in range(requests)]
    begun = time.perf_counter()
    with Served(bundle, table, threads=threads) as server:
        load(server.address, bodies[:1], 1)
        found: dict[str, Any] = {"start_s": time.perf_counter() - begun, "users_per_request": {}}
        for users in USERS:
            made = [
                as_message([columns(users * k + user) for user in range(users)])
                for k in range(max(1, requests // users))
            ]
            _, per_second = load(server.address, made, 1)
            found["users_per_request"][str(users)] = users * per_second
        found["rss_mib"] = private_bytes(server.pid) / 2**20
        ended = time.perf_counter()
    found["exit_s"] = time.perf_counter() - ended
    found["workers"] = {}
    for workers in WORKERS:
        with Served(bundle, table, threads=1, workers=workers) as server:
            found["workers"][str(workers)] = {"requests_per_s": load(server.address, bodies, clients)[1]}
    return found


def process_targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the figures are to show."""
    claims = {
        f"private memory of a server: at most {MOST_MIB:.0f} MiB": ("rss_mib", MOST_MIB),
        f"from its start to its first score: at most {MOST_START:.0f} s": ("start_s", MOST_START),
        f"from SIGTERM to its end, after the last answer: at most {MOST_EXIT:.0f} s": ("exit_s", MOST_EXIT),
    }
    return [target(claim, report[name], report[name] <= most) for claim, (name, most) in claims.items()]


def process_section(report: Mapping[str, Any]) -> Section:
    """The table of the report."""
    rows = [
        ["from its start to its first score, s", f"{report['start_s']:.1f}"],
        ["memory that no file backs, MiB", f"{report['rss_mib']:.0f}"],
        ["from SIGTERM to its end, s", f"{report['exit_s']:.2f}"],
    ]
    for count, figures in report["workers"].items():
        rows.append([f"requests/s, workers of one thread: {count}", f"{figures['requests_per_s']:.0f}"])
    for count, value in report["users_per_request"].items():
        rows.append([f"users/s, one client, users a request: {count}", f"{value:.0f}"])
    return Section(
        "A server from its start to its end",
        text=[f"1,000 behaviors. {os.cpu_count()} cores, which clients share with the server."],
        columns=["what", "figure"], rows=rows,
    )  # fmt: skip
