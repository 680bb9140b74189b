"""What chaos does to a server under load: its store, its releases, its workers and its clients fail.

Each fault is undone. Then both workers must be ready again and give right scores, without a restart.
"""

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from signal import SIGHUP
from typing import Any

from mim_torchrec.benchmarks.chaos.machine import Machine
from mim_torchrec.benchmarks.chaos.server import (
    BROKEN,
    INFER,
    MODELS,
    READY,
    REQUESTS,
    Clients,
    Served,
    Tally,
)
from mim_torchrec.benchmarks.chaos.stores import Stores
from mim_torchrec.extras import needs

with needs("redis"):
    import redis

RECOVERY = 60.0  # seconds after a fault was undone
CONSECUTIVE = 6  # answers of connections of their own: a worker that is not well would give one of them
MANY = 20  # connections or bodies at once
KILLS_APART = 20.0  # seconds: five deaths within a minute end the service, rightly
PASSWORD = "another"


@dataclass
class ServerOutcome:
    """What came of it.

    Attributes:
        injected: faults by kind.
        unrecovered: faults after which the server was not well within RECOVERY.
        tally: what clients have seen.
        problems: what was not right besides, in words.
        left_out: kinds of faults that cannot be had on this machine, and why.
        late_by_its_own_clock: answers that took longer than the server's longest class of times, as it says
            itself: whose delay it was when clients saw late ones.
        seconds: it took.
    """

    injected: Counter[str] = field(default_factory=Counter)
    unrecovered: int = 0
    tally: Tally = field(default_factory=Tally)
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    late_by_its_own_clock: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """As the report has it."""
        return {
            "injected": self.injected.total(),
            "late_answers": self.tally.late,
            "wrong_scores": self.tally.wrong,
            "unexplained_500": self.tally.unexplained,
            "unrecovered": self.unrecovered,
            "server": {
                "injected": dict(self.injected),
                "left_out": self.left_out,
                "held_up_on_the_way": self.tally.held_up,
                "late_by_its_own_clock": self.late_by_its_own_clock,
                "answers": {str(status): count for status, count in sorted(self.tally.answers.items())},
                "examples": self.tally.examples,
                "seconds": self.seconds,
            },
        }


class ServerFaults:
    """Faults of a server, one after the other.

    Args:
        served: the server.
        machine: it runs on.
        clients: who ask it meanwhile.
        rng: what comes next.
    """

    def __init__(self, served: Served, machine: Machine, clients: Clients, rng: Random) -> None:
        self._served, self._machine, self._clients, self._rng = served, machine, clients, rng
        self._stores = served.stores
        self._current, self._last_kill = MODELS[0], -KILLS_APART
        self.outcome = ServerOutcome(tally=clients.tally, left_out=machine.left_out)
        self._kinds: dict[str, tuple[Callable[[], Any], int]] = {
            "store stopped": (self._stop, 2), "store killed": (self._kill_store, 1),
            "store emptied": (self._empty, 2), "store with another password": (self._password, 1),
            "store without memory": (self._memory, 1), "current.json damaged": (self._damage, 2),
            "damaged release": (self._broken, 1), "model swapped": (self._swap, 3),
            "half-open connection": (self._half_open, 4), "damaged body": (self._bodies, 4),
            "worker killed": (self._kill_worker, 1), "reload": (self._hang_up, 1),
            "failover": (self._fail_over, 1), "failover to an older copy": (self._fail_back, 2),
            "server of a cluster stopped": (self._stop_node, 1),
            "server of a cluster killed": (self._kill_node, 1),
            "server of a cluster emptied": (self._empty_node, 2), "slot moved": (self._move_slot, 1),
            "clock jump": (self._jump, 2), "full disk": (self._fill_disk, 1),
        }  # fmt: skip
        for name in machine.left_out:
            del self._kinds[name]

    def run(self, least: int) -> ServerOutcome:
        """Every kind once, then any until there were so many."""
        begun, rng = time.monotonic(), self._rng
        names = list(self._kinds)
        waiting = rng.sample(names, len(names))
        while waiting or self.outcome.injected.total() < least:
            weights = [weight for _, weight in self._kinds.values()]
            name = waiting.pop() if waiting else rng.choices(names, weights)[0]
            if name == "worker killed" and time.monotonic() < self._last_kill + KILLS_APART:
                continue
            self._stores.advance()
            self._kinds[name][0]()
            if name not in ("half-open connection", "damaged body"):
                self.outcome.injected[name] += 1
            if not self._is_well():
                self.outcome.unrecovered += 1
                self.outcome.problems.append(f"not well {RECOVERY:g} s after: {name}")
            self._clients.breaks_are_expected = False
        self.outcome.seconds = time.monotonic() - begun
        return self.outcome

    def _is_well(self) -> bool:
        """Whether both workers are ready, and give scores of the current model, within RECOVERY."""
        end, found = time.monotonic() + RECOVERY, 0
        while found < CONSECUTIVE:
            if time.monotonic() > end:
                return False
            http = self._clients.connection()
            try:
                http.request("GET", READY)
                answer = http.getresponse()
                answer.read()
                status, version = self._clients.ask(self._rng.randrange(REQUESTS), http)
                right = answer.status == status == 200 and version == self._served.version(self._current)
            except (OSError, HTTPException):
                right = False
            finally:
                http.close()
            found = found + 1 if right else 0
        return True

    def _stop(self) -> None:
        with self._stores.primary.paused():
            self._clients.await_answers(4)

    def _kill_store(self) -> None:
        self._stores.primary.kill()
        self._clients.await_answers(4)
        self._stores.primary.start()

    def _empty(self) -> None:
        self._ask_every_worker()  # what a worker has never seen it cannot miss
        self._stores.primary.client().flushall()
        self._clients.await_answers(4)
        self._stores.fill_again()

    def _fail_over(self) -> None:
        self._stores.copy()
        self._stores.fail_over()

    def _fail_back(self) -> None:
        self._stores.copy()
        for _ in range(self._rng.randint(1, 2)):
            self._stores.advance()
        self._ask_every_worker()
        self._stores.fail_over()
        self._clients.await_answers(6)
        self._stores.catch_up()

    def _ask_every_worker(self) -> None:
        """Have a request scored by each of them."""
        end, waiting = time.monotonic() + RECOVERY, set(self._served.workers)
        while waiting and time.monotonic() < end:
            with _connection(self._clients) as http:
                http.connect()
                worker = self._served.worker_of(http.sock.getsockname()[1])
                status, _ = self._clients.ask(self._rng.randrange(REQUESTS), http)
                if status == 200:
                    waiting.discard(worker)

    def _stop_node(self) -> None:
        with self._rng.choice(self._stores.cluster.servers).paused():
            self._clients.await_answers(4)

    def _kill_node(self) -> None:
        node = self._rng.choice(self._stores.cluster.servers)
        node.kill()
        self._clients.await_answers(4)
        node.start()

    def _empty_node(self) -> None:
        self._rng.choice(self._stores.cluster.servers).client().flushall()
        self._clients.await_answers(4)
        self._stores.fill_cluster()

    def _move_slot(self) -> None:
        self._stores.cluster.move(self._stores.slot_of_a_shard(self._rng))

    def _password(self) -> None:
        client, url = self._stores.primary.client(), self._stores.primary.url
        client.config_set("requirepass", PASSWORD)
        client.client_kill_filter(_type="normal", skipme=True)
        self._clients.await_answers(4)
        with redis.Redis.from_url(url, password=PASSWORD) as allowed:
            allowed.config_set("requirepass", "")

    def _memory(self) -> None:
        client = self._stores.primary.client()
        client.config_set("maxmemory", 1)
        self._clients.await_answers(4)
        client.config_set("maxmemory", 0)

    def _jump(self) -> None:
        self._machine.jump(self._rng.choice([-1, 1]) * self._rng.choice([2, 3600, 10**7]))
        self._clients.await_answers(10)
        self._machine.jump(0)

    def _fill_disk(self) -> None:
        with self._machine.full_disk(self._served.pid):
            self._swap()
            self._clients.await_answers(20)

    def _damage(self) -> None:
        path = Path(self._served.releases.root) / "current.json"
        was = path.read_bytes()
        path.write_bytes(self._rng.choice([b"", b"{", b"[1]", b"\xff", was[: len(was) // 2]]))
        self._clients.await_answers(10)
        path.write_bytes(was)

    def _broken(self) -> None:
        self._served.releases.promote(BROKEN)
        self._clients.await_answers(10)
        self._served.releases.promote(self._current)

    def _swap(self) -> None:
        self._current = MODELS[1 - MODELS.index(self._current)]
        self._served.releases.promote(self._current)

    def _hang_up(self) -> None:
        self._served.signal(SIGHUP)

    def _kill_worker(self) -> None:
        self._last_kill = time.monotonic()
        self._clients.breaks_are_expected = True
        self._served.kill_worker(self._rng)

    def _half_open(self) -> None:
        host, port = self._served.address.split(":")
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
        with ExitStack() as held:
            for _ in range(MANY):
                one = held.enter_context(socket.create_connection((host, int(port)), timeout=30))
                one.sendall(head[: self._rng.randrange(len(head) + 1)])
                self.outcome.injected["half-open connection"] += 1
            self._clients.await_answers(4)

    def _bodies(self) -> None:
        with _connection(self._clients) as http:
            for _ in range(MANY):
                right = self._rng.choice(self._served.bodies)
                body = right[: self._rng.randrange(len(right) - 1)] + self._rng.randbytes(
                    self._rng.randrange(9)
                )
                http.request("POST", INFER, body)
                answer = http.getresponse()
                said = answer.read()
                self.outcome.injected["damaged body"] += 1
                if answer.status not in (400, 503, 504):
                    self.outcome.problems.append(f"a damaged body is answered {answer.status}: {said!r}")


@contextmanager
def _connection(clients: Clients) -> Iterator[HTTPConnection]:
    http = clients.connection()
    try:
        yield http
    finally:
        http.close()


def run_server(root: Path, least: int, seed: int, slack: float) -> ServerOutcome:
    """Faults of a server under load.

    Args:
        root: where everything lies.
        least: faults to inject.
        seed: of faults and requests.
        slack: see `Clients`.
    """
    machine = Machine(root / "machine")
    stores = Stores(root / "redis")
    try:
        served = Served(root, stores, machine, seed)
        try:
            with Clients(served, 3, seed, slack) as clients:
                outcome = ServerFaults(served, machine, clients, Random(seed)).run(least)
            outcome.late_by_its_own_clock = served.late_by_its_own_clock()
        finally:
            problem = served.end()
        if problem is not None:
            outcome.problems.append(problem)
        return outcome
    finally:
        stores.kill()
