"""How ``DistributedModelParallel`` shards a frozen table.

Pass ``FrozenEmbeddingCollectionSharder()`` among the sharders of the planner and of
``DistributedModelParallel``. The planner of TorchRec 1.9 cannot price a custom kernel, so a frozen table is
planned as ``fused`` (which prices its rows without optimizer state) and the kernel is exchanged when the
module is sharded.
"""

import dataclasses

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingCollection,
    ShardedFrozenEmbeddingCollection,
)


class FrozenEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """Shards :class:`FrozenEmbeddingCollection` row-wise with a kernel that has nothing to train."""

    def shard(
        self,
        module: FrozenEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFrozenEmbeddingCollection:
        """Return the sharded module; rows that an unsharded module already has are kept.

        Raises:
            ValueError: the plan is not row-wise.
        """
        for name, plan in params.items():
            if plan.sharding_type != ShardingType.ROW_WISE.value:
                raise ValueError(f"frozen table {name} is sharded row_wise, not {plan.sharding_type}")
        kernel = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
        params = {name: dataclasses.replace(plan, compute_kernel=kernel) for name, plan in params.items()}
        # TorchRec reads shapes from parameters, which a frozen module has not: show it a twin without memory.
        twin = EmbeddingCollection(
            tables=module.embedding_configs(),
            device=torch.device("meta"),
            need_indices=module.need_indices(),
        )
        sharded = ShardedFrozenEmbeddingCollection(
            twin,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
        if module.device.type != "meta":
            whole = {name: rows for name, _, rows in module.local_tables()}
            for name, first, rows in sharded.local_tables():
                rows.copy_(whole[name][first : first + rows.shape[0]])
        return sharded

    def shardable_parameters(self, module: FrozenEmbeddingCollection) -> dict[str, nn.Parameter]:
        """Return the tables' shapes and types for the planner, as parameters without memory."""
        return {
            name: nn.Parameter(rows.to("meta"), requires_grad=False)
            for name, _, rows in module.local_tables()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]

    @property
    def module_type(self) -> type[FrozenEmbeddingCollection]:
        return FrozenEmbeddingCollection

    @property
    def sharded_module_type(self) -> type[ShardedFrozenEmbeddingCollection]:
        return ShardedFrozenEmbeddingCollection
