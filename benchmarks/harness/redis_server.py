"""Real Redis servers on free loopback ports, for benchmarks and tests; every write is on the disk at once."""

import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mim_torchrec.extras import needs

with needs("redis"):
    import redis
    from redis.crc import key_slot

MISSING = "this needs a Redis server: apt-get install redis-server"


def free_port() -> int:
    """A port that nothing listens on.

    It and the port 10,000 above it (the bus of a cluster) are below those that Linux gives to outgoing
    connections: none of them takes the port while a server that was stopped is started again.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with socket.socket() as taken:
            try:
                taken.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class RedisServer:
    """A server that can be stopped and started again with what it had.

    Args:
        folder: gets its files.
        options: further words of the command line.
        tls: speak TLS on the port.
        url: what clients connect to, `{port}` where the port goes.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        tls: bool = False,
        url: str = "redis://127.0.0.1:{port}",
    ) -> None:
        assert shutil.which("redis-server"), MISSING
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self._options, self._port_option, self._url = options, "--tls-port" if tls else "--port", url
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """What clients connect to."""
        return self._url.format(port=self.port)

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
                 "--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0",
                 self._port_option, str(self.port), *self._options]  # fmt: skip
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(["redis-server", *words], stdout=log, stderr=log)
        while True:
            try:
                self.client().ping()
                return
            except (redis.ConnectionError, redis.TimeoutError):
                assert self._process.poll() is None, (self.folder / "log.txt").read_text()

    def client(self) -> redis.Redis:
        """A client of it."""
        return redis.Redis.from_url(self.url)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, the server is stopped: it takes connections and answers none."""
        assert self._process is not None  # it was started when it was made
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None  # it was started when it was made
        self._process.kill()
        self._process.wait()

    def copy(self, other: "RedisServer") -> None:
        """Become a replica of another, and wait until all that it has is here."""
        self.client().replicaof("127.0.0.1", other.port)
        other.client().wait(1, 0)

    def cut_off(self) -> None:
        """Be a replica no more: what comes to the primary from now on is not here."""
        self.client().replicaof("NO", "ONE")

    def take_the_place_of(self, other: "RedisServer") -> None:
        """Be found where another was, which is killed: a failover. The other can start where this one was."""
        other.kill()
        self.client().config_set("port", other.port)
        self.port, other.port = other.port, self.port


class RedisCluster:
    """Servers that share the slots of a cluster.

    Args:
        folder: gets their files.
        size: how many there are.
    """

    SLOTS = 16384

    def __init__(self, folder: Path, size: int) -> None:
        words = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
        self.servers: list[RedisServer] = []
        try:
            for k in range(size):
                self.servers.append(RedisServer(folder / str(k), *words))
            self._divide(size)
        except BaseException:
            self.kill()
            raise

    def _divide(self, size: int) -> None:
        """Give each server its slots, and wait until they know each other."""
        for server, part in zip(self.servers, range(size), strict=True):
            first, last = part * self.SLOTS // size, (part + 1) * self.SLOTS // size - 1
            server.client().execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            server.client().execute_command("CLUSTER SET-CONFIG-EPOCH", part + 1)
            server.client().execute_command("CLUSTER MEET", "127.0.0.1", self.servers[0].port)
        self.url = f"redis+cluster://127.0.0.1:{self.servers[0].port}"
        for server in self.servers:
            client = server.client()
            while client.cluster("INFO")["cluster_state"] != "ok":
                client.wait(1, 20)  # for a replica that there is not, 20 ms

    def move(self, slot: int) -> None:
        """Move a slot, with what it holds, from the server that has it to the next one."""
        owners = [server for server in self.servers if slot in _slots_of(server)]
        source = owners[0]
        target = self.servers[(self.servers.index(source) + 1) % len(self.servers)]
        here, there = source.client(), target.client()
        ids = [str(client.execute_command("CLUSTER MYID"), "ascii") for client in (here, there)]
        there.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        here.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        # not CLUSTER GETKEYSINSLOT, whose answer the client takes for text
        keys = [key for key in here.scan_iter(count=1000) if key_slot(key) == slot]
        for start in range(0, len(keys), 100):
            part = keys[start : start + 100]
            here.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *part)
        for client in (there, here):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])

    def kill(self) -> None:
        """End all of them at once."""
        for server in self.servers:
            server.kill()


def _slots_of(server: RedisServer) -> set[int]:
    """Slots that a server of a cluster has, as it says itself."""
    nodes = server.client().cluster("NODES").values()
    (own,) = (node["slots"] for node in nodes if "myself" in node["flags"])
    return {slot for first, *last in own for slot in range(int(first), int(last[0] if last else first) + 1)}
