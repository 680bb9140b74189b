"""The stores of a server under chaos: vectors in Redis with a standby, ID tables in a cluster.

Windows change the vectors all the time. Which vectors a request may be answered with is known: those that
were there when it was sent, or newer ones.
"""

from pathlib import Path
from random import Random

import torch
from torch import Tensor

from mim_torchrec.benchmarks.harness.redis_server import RedisCluster, RedisServer
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.serving.bundle import Bundle

CHANGED = 100  # items that every window changes
STATES = 3  # vectors that these have in turn


class Stores:
    """Servers, what lies in them, and the windows so far.

    Args:
        root: where they keep their files.

    Attributes:
        primary: has the vectors; clients connect to its address, whoever is there.
        standby: takes its place.
        cluster: has the ID tables.
        begun: number of the last window that was begun.
        done: number of the last window that is there.
    """

    def __init__(self, root: Path) -> None:
        self._running: list[RedisServer | RedisCluster] = []
        try:
            self.primary = self._started(RedisServer(root / "primary"))
            self.standby = self._started(RedisServer(root / "standby"))
            self.cluster = RedisCluster(root / "cluster", 2)
            self._running.append(self.cluster)
        except BaseException:
            self.kill()
            raise
        self.begun = self.done = 0

    def _started(self, server: RedisServer) -> RedisServer:
        self._running.append(server)
        return server

    def fill(self, table: Table, bundles: list[Bundle]) -> None:
        """Write all tables, and the windows so far."""
        self._table = table
        self._bundles = bundles
        RedisStore.load(self.primary.url, table)
        self.fill_cluster()
        self.catch_up()

    def fill_again(self) -> None:
        """The same, where the primary has lost everything."""
        self.fill(self._table, self._bundles)

    def fill_cluster(self) -> None:
        """Write the ID tables, or what is lost of them."""
        for bundle in self._bundles:
            for name in bundle.tables:
                RedisStore.load(self.cluster.url, bundle.table(name))

    def advance(self) -> None:
        """Apply the next window."""
        store = RedisStore.open(self.primary.url, self._table.manifest.table_version)
        self.begun += 1
        store.apply(self._window(self.begun))
        self.done = self.begun

    def catch_up(self) -> None:
        """Apply the windows that the primary lacks."""
        store = RedisStore.open(self.primary.url, self._table.manifest.table_version)
        for seq in range(store.seq + 1, self.begun + 1):
            store.apply(self._window(seq))

    def copy(self) -> None:
        """Let the standby have what the primary has now, and nothing that comes later."""
        self.standby.copy(self.primary)
        self.standby.cut_off()

    def fail_over(self) -> None:
        """Let the standby take the place of the primary, with what it has."""
        self.standby.take_the_place_of(self.primary)
        self.primary, self.standby = self.standby, self.primary
        self.standby.start()

    def slot_of_a_shard(self, rng: Random) -> int:
        """A slot of the cluster that holds rows."""
        clients = [server.client() for server in self.cluster.servers]
        keys = [key for client in clients for key in client.scan_iter()]
        return int(clients[0].execute_command("CLUSTER KEYSLOT", rng.choice(keys)))

    def kill(self) -> None:
        """End all of them at once."""
        for one in self._running:
            one.kill()

    def _window(self, seq: int) -> Window:
        return Window.of(torch.arange(CHANGED), state_vectors(seq, self._table.manifest.dim), seq=seq,
                         table_version=self._table.manifest.table_version, window_id=f"w{seq}",
                         dtype="float32")  # fmt: skip


def state_vectors(seq: int, dim: int) -> Tensor:
    """Vectors of the first CHANGED items after a window, (CHANGED, dim); 0 is the base table."""
    return torch.randn(CHANGED, dim, generator=torch.Generator().manual_seed(seq % STATES))
