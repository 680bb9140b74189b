"""What a planner counts of frozen tables: a forward pass, stored rows, and all copies of them.

TorchRec's estimators price a frozen table as a trained one: with a backward pass, with sums that are pooled
before they travel, and with one copy. :class:`FrozenEnumerator` prices frozen tables as they are and leaves
all others to TorchRec. Distinct rows are not known to a planner, so the exchange is priced as if no row were
asked for twice.
"""

import copy
from dataclasses import replace

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Shard,
    ShardEstimator,
    ShardingOption,
    Topology,
)
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder, ShardingType

from mim_torchrec.embeddings.sharded.frozen import FrozenModule, iterate_frozen

ROW_WISE, DATA_PARALLEL = ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value
DENSE = EmbeddingComputeKernel.DENSE.value


class FrozenEnumerator(EmbeddingEnumerator):
    """Enumerates the options of frozen tables, with their copies and prices, and TorchRec's of all others.

    Give it to ``EmbeddingShardingPlanner(topology=..., constraints=..., enumerator=...)``.

    Args:
        topology: of the cluster, the same as the planner's.
        batch_size: of each rank.
        constraints: by table, the same as the planner's; see ``frozen_constraint`` for frozen tables.
        estimator: of the tables that are not frozen; None are TorchRec's.
        use_exact_enumerate_order: as in TorchRec.

    ``enumerate`` raises ValueError for a frozen table whose constraint allows more than one sharding type,
    one of which is ``data_parallel``.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int = BATCH_SIZE,
        constraints: dict[str, ParameterConstraints] | None = None,
        estimator: ShardEstimator | list[ShardEstimator] | None = None,
        use_exact_enumerate_order: bool = False,
    ) -> None:
        super().__init__(topology, batch_size, constraints, estimator, use_exact_enumerate_order)
        self._given = dict(constraints or {})
        self._kernels: dict[str, list[str]] = {}  # of the tables with several copies
        node = _one_node(topology)
        self._prices_of_world = _estimators(topology, constraints)
        self._prices_of_node = _estimators(node, constraints)
        self._node_size = node.world_size

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        frozen = {name for each in iterate_frozen(module) for name in each.frozen_tables()}
        constraints = dict(self._given)
        for name in frozen & self._given.keys():
            types = self._given[name].sharding_types or []
            if DATA_PARALLEL not in types:
                continue
            if len(types) > 1:
                raise ValueError(f"frozen table {name}: constrain it to one sharding type of {types}")
            self._kernels[name] = self._given[name].compute_kernels or [DENSE]
            on_device = [EmbeddingComputeKernel.FUSED.value]
            kernels = on_device if self._kernels[name] == [DENSE] else self._kernels[name]
            # Enumerated as row-wise, which sharders of frozen tables know, and copied afterwards.
            constraints[name] = replace(self._given[name], sharding_types=[ROW_WISE], compute_kernels=kernels)
        self._constraints = constraints
        return super().enumerate(module, sharders)

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        others = []
        for option in sharding_options:
            if isinstance(option.module[1], FrozenModule):
                self._price(option)
            else:
                others.append(option)
        super().populate_estimates(others)

    def _price(self, option: ShardingOption) -> None:
        if option.sharding_type == ROW_WISE and option.name in self._kernels:
            option.sharding_type = DATA_PARALLEL
            if self._kernels[option.name] == [DENSE]:
                option.compute_kernel = DENSE
        if option.sharding_type == ROW_WISE:
            self._estimate(self._prices_of_world, option, ROW_WISE, option.shards)
            return
        shape = [*option.tensor.shape]
        if option.compute_kernel == DENSE:
            option.shards = [Shard(size=shape, offset=[0, 0]) for _ in range(self._world_size)]
            self._estimate(self._prices_of_world, option, DATA_PARALLEL, option.shards)
            return
        sizes, offsets = calculate_shard_sizes_and_offsets(
            option.tensor, self._node_size, self._node_size, ROW_WISE
        )
        node = [Shard(size=size, offset=offset) for size, offset in zip(sizes, offsets, strict=True)]
        self._estimate(self._prices_of_node, option, ROW_WISE, node)
        option.shards = [copy.deepcopy(shard) for _ in range(self._world_size // len(node)) for shard in node]

    def _estimate(
        self,
        estimators: list[ShardEstimator],
        option: ShardingOption,
        sharding_type: str,
        shards: list[Shard],
    ) -> None:
        """Price the shards of an option in place: rows travel unpooled, whatever the collection gives."""
        priced = copy.copy(option)
        priced.sharding_type, priced.shards, priced._is_pooled = sharding_type, shards, False
        for estimator in estimators:
            estimator.estimate([priced], self._sharder_data_map)


def _estimators(
    topology: Topology, constraints: dict[str, ParameterConstraints] | None
) -> list[ShardEstimator]:
    return [
        # TorchRec's estimate for inference is that for training without the backward pass.
        EmbeddingPerfEstimator(topology, constraints, is_inference=True),
        EmbeddingStorageEstimator(topology, constraints),
    ]


def _one_node(topology: Topology) -> Topology:
    return Topology(
        world_size=topology.intra_group_size,
        compute_device=topology.compute_device,
        local_world_size=topology.intra_group_size,
        hbm_mem_bw=topology.hbm_mem_bw,
        ddr_mem_bw=topology.ddr_mem_bw,
        ssd_mem_bw=topology.ssd_mem_bw,
        hbm_to_ddr_mem_bw=topology.hbm_to_ddr_mem_bw,
        generalized_comms_bandwidths=topology.comms_bandwidths,
        uneven_sharding_perf_multiplier=topology.uneven_sharding_perf_multiplier,
        created_by_factory=True,
    )
