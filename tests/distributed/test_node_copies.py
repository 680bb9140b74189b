"""Bytes that cross between two nodes, for one copy of a frozen table in the world and for one a node.

Each node is a network namespace with two ranks; the counters of the link between the two are the bytes.
Needs the rights to make namespaces.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.sharding_plan import row_wise
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.placement import node_replicated
from mim_torchrec.embeddings.table.format import TableWriter
from tests.distributed.test_frozen_exchange import FEATURES, Unpooled
from tests.distributed.test_frozen_placement import sharded
from tests.ranks import run_ranks

DIM, ITEMS, STEPS, LINK = 64, 5000, 5, "mim0"
CLONE_NEWNET = 0x40000000


@pytest.fixture
def nodes():
    """Two namespaces with a link between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"mim-{os.getpid()}-{node}" for node in range(2)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        _ip("netns", "add", names[1])
        _ip("link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for node, name in enumerate(names):
            quiet = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"  # neighbor discovery would be counted
            _ip("netns", "exec", name, "sh", "-c", quiet)
            _ip("-n", name, "addr", "add", f"10.77.0.{1 + node}/24", "dev", LINK)
            _ip("-n", name, "link", "set", LINK, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _enter(name: str, store: Path) -> None:
    """Move this rank to a node, and form the process group again over the link."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all are connected
    dist.destroy_process_group()
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    os.environ |= {"GLOO_SOCKET_IFNAME": LINK, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size
    )


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
    _enter(nodes[dist.get_rank() // 2], folder / f"store-{copy}")
    table = open_table(folder / "table")
    model = sharded(Unpooled(table), row_wise() if copy == "world" else node_replicated())
    load_table(model, table)
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randint(1, ITEMS, (2 * ITEMS,), generator=generator)
    features = KeyedJaggedTensor(FEATURES, rows, lengths=torch.full((2,), ITEMS))
    model(features)  # connections are made
    group = find_frozen(model, "mm")[0].placements["mm"].group
    for _ in range(STEPS):  # what the start sent has arrived by then
        model(features)
    dist.barrier(group)
    before = _bytes_of_link()
    for _ in range(STEPS):
        model(features)
    dist.barrier(group)
    crossed = _bytes_of_link() - before
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
