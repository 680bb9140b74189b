"""Which ranks divide the rows of a frozen table among them: all, those of a node, or none.

Rows that nothing trains need no synchronization, so a table may be there several times at the cost of memory
only. One copy in the world (``row_wise`` in a plan) takes the least memory. One copy a node
(:func:`node_replicated`) keeps the exchange of rows within nodes. One copy a rank (TorchRec's
``data_parallel()``) exchanges nothing.

In two-dimensional parallelism (``DMPCollection``) the copy in the world is one in each sharding group.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import intra_and_cross_node_pg
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import ParameterShardingGenerator
from torchrec.distributed.types import (
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingEnv2D,
    ShardingType,
)

Copy = Literal["world", "node", "rank"]
# Names that TorchRec reads the number of ranks of a node from.
LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)


@dataclass(frozen=True)
class Placement:
    """The ranks that divide the rows of one copy of a table.

    Attributes:
        copy: one in the world, a node or a rank.
        group: the ranks; None where this process is alone.
        rank: of this process among them.
        size: their number.
    """

    copy: Copy
    group: dist.ProcessGroup | None
    rank: int
    size: int

    @property
    def is_divided(self) -> bool:
        """Whether rows are exchanged at all."""
        return self.size > 1

    @property
    def ranks(self) -> dist.ProcessGroup:
        """The group of a table whose rows are divided."""
        assert self.group is not None
        return self.group

    def block(self, num_embeddings: int) -> int:
        """Rows of each rank but the last."""
        return -(-num_embeddings // self.size)


def copy_of(name: str, plan: ParameterSharding) -> Copy:
    """Return what a plan says of the copies of a table.

    Raises:
        ValueError: the plan is another than the three that there are.
    """
    if plan.sharding_type == ShardingType.ROW_WISE.value:
        return "world"
    if plan.sharding_type == ShardingType.DATA_PARALLEL.value:
        return "rank" if plan.compute_kernel == EmbeddingComputeKernel.DENSE.value else "node"
    raise ValueError(
        f"frozen table {name} is sharded row_wise, not {plan.sharding_type} (or data_parallel, for a copy a "
        f"node or a rank)"
    )


def place(name: str, plan: ParameterSharding, env: ShardingEnv) -> Placement:
    """Return the ranks that divide the rows of a table; on all ranks alike.

    Args:
        name: of the table.
        plan: of it.
        env: the ranks of the model.

    Raises:
        ValueError: no such plan, or nodes are not known.
    """
    copy = copy_of(name, plan)
    if copy == "rank":
        return Placement(copy, None, 0, 1)
    if copy == "node":
        group = node_group(name, env)
        return Placement(copy, group, dist.get_rank(group) if group else 0, group.size() if group else 1)
    group = env.sharding_pg if isinstance(env, ShardingEnv2D) else env.process_group
    return Placement(copy, group, env.rank, env.world_size)


def node_group(name: str, env: ShardingEnv) -> dist.ProcessGroup | None:
    """Return the ranks of this node, None where this process is its only one.

    The groups are those of TorchRec's ``table_row_wise`` sharding: blocks of ``LOCAL_WORLD_SIZE`` ranks.

    Raises:
        ValueError: the number of ranks of a node is not known or does not divide the world, or the model is
            not on all ranks.
    """
    world = env.process_group  # in two-dimensional parallelism too
    if world is None:
        return None
    size = world.size()
    if size != dist.get_world_size():
        raise ValueError(
            f"frozen table {name}: a copy a node needs a model on all {dist.get_world_size()} ranks; it is "
            f"on {size}"
        )
    found = next((int(os.environ[key]) for key in LOCAL_SIZES if key in os.environ), 0)
    if found < 1 or size % found:
        raise ValueError(
            f"frozen table {name}: a copy a node needs LOCAL_WORLD_SIZE, the ranks of each node, of which "
            f"{size} is a multiple; found {found or 'none'} (torchrun sets it)"
        )
    if found == 1:
        return None
    return world if found == size else intra_and_cross_node_pg()[0]


def node_replicated(
    compute_kernel: str = EmbeddingComputeKernel.FUSED.value,
) -> ParameterShardingGenerator:
    """Return a generator for ``construct_module_sharding_plan``: one copy of a frozen table a node.

    Args:
        compute_kernel: which memory the rows are in, as in ``row_wise``: "fused", "fused_uvm" or
            "fused_uvm_caching".
    """

    def generate(
        param: nn.Parameter, local_size: int, world_size: int, device_type: str,
        sharder: ModuleSharder[nn.Module],
    ) -> ParameterSharding:  # fmt: skip
        return ParameterSharding(
            sharding_type=ShardingType.DATA_PARALLEL.value,
            compute_kernel=compute_kernel,
            ranks=list(range(world_size)),
        )

    return generate
