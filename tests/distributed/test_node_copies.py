"""Bytes that cross between two nodes, for one copy of a frozen table in the world and for one a node.

Each node is a network namespace with two ranks; the counters of the link between the two are the bytes.
Needs the rights to make namespaces.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.sharding_plan import row_wise
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.placement import node_replicated
from mim_torchrec.embeddings.table.format import TableWriter
from tests.distributed.test_frozen_placement import sharded
from tests.frozen import FEATURES, Unpooled
from tests.namespaces import LINK, linked_nodes
from tests.ranks import run_ranks

DIM, ITEMS, STEPS = 64, 5000, 5
CLONE_NEWNET = 0x40000000


@pytest.fixture
def nodes():
    """Names of two namespaces with a link between them."""
    with linked_nodes() as found:
        yield [node.name for node in found]


def _enter(name: str, store: Path) -> dist.FileStore:
    """Move this rank to a node, and form the process group again over the link; returns its store, a file."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all are connected
    dist.destroy_process_group()
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    os.environ |= {"GLOO_SOCKET_IFNAME": LINK, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    shared = dist.FileStore(str(store), world_size)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=world_size)
    return shared


def _meet(store: dist.FileStore, where: str) -> None:
    """Wait for all ranks without a byte on the link."""
    store.set(f"{where}-{dist.get_rank()}", "here")
    store.wait([f"{where}-{rank}" for rank in range(dist.get_world_size())])


def _bytes_of_link() -> int:
    """Bytes that this node has sent and received."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == LINK:
            fields = counters.split()
            return int(fields[0]) + int(fields[8])
    raise AssertionError(f"no {LINK} in /proc/net/dev")


def _bytes_of_lookups(nodes: list[str], folder: Path, copy: str) -> tuple[int, int, str]:
    """Bytes between nodes in some lookups, bytes of the rows that this rank needs, and the table's digest."""
    store = _enter(nodes[dist.get_rank() // 2], folder / f"store-{copy}")
    table = open_table(folder / "table")
    model = sharded(Unpooled(table), row_wise() if copy == "world" else node_replicated())
    load_table(model, table)
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randint(1, ITEMS, (2 * ITEMS,), generator=generator)
    features = KeyedJaggedTensor(FEATURES, rows, lengths=torch.full((2,), ITEMS))
    for _ in range(STEPS):  # connections are made, and what they sent has arrived
        model(features)
    _meet(store, "before")
    before = _bytes_of_link()
    _meet(store, "start")
    for _ in range(STEPS):
        model(features)
    _meet(store, "after")
    crossed = _bytes_of_link() - before
    _meet(store, "end")
    return crossed, STEPS * rows.unique().numel() * table.manifest.row_bytes, table_digest(model)


def test_rows_of_a_copy_a_node_do_not_cross_between_nodes(nodes, tmp_path):
    writer = TableWriter(tmp_path / "table", table_version="v1", dim=DIM, encoder={})
    writer.write_shard(torch.arange(ITEMS), torch.randn(ITEMS, DIM))
    writer.finish()
    world, node = (run_ranks(_bytes_of_lookups, 4, nodes, tmp_path, copy) for copy in ("world", "node"))
    for (of_world, needed, _), (of_node, *_) in zip(world, node, strict=True):
        print(f"bytes between nodes: {of_world:,} of a copy in the world, {of_node:,} of a copy a node")
        assert of_world > needed  # a node's two ranks get half of their rows from the other, and give as many
        assert of_node < 1000  # no row; a frame or two of the kernel's own
    assert len({digest for *_, digest in node}) == 1
