"""How the planner and ``DistributedModelParallel`` shard frozen collections.

Pass ``frozen_sharders()`` among the sharders of both. A plan's compute kernel says which memory the rows are
in: "fused" is memory of the device (HBM, or host memory on a CPU), "fused_uvm" is managed (UVM) memory and
"fused_uvm_caching" that behind a cache in HBM; constrain it per table with :func:`frozen_constraint`. The
planner prices rows by their stored bytes, and no optimizer state.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import (
    CacheParams,
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
)
from mim_torchrec.embeddings.sharded.sharded import (
    ShardedFrozenEmbeddingBagCollection,
    ShardedFrozenEmbeddingCollection,
    ShardedFrozenModule,
)
from mim_torchrec.embeddings.table.quantize import DTYPES

Memory = Literal["device", "uvm", "uvm_caching"]
KERNELS: dict[Memory, EmbeddingComputeKernel] = {
    "device": EmbeddingComputeKernel.FUSED,
    "uvm": EmbeddingComputeKernel.FUSED_UVM,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING,
}


def frozen_constraint(memory: Memory = "device", load_factor: float | None = None) -> ParameterConstraints:
    """Return the planner's constraint that puts a frozen table into one kind of memory.

    Args:
        memory: "device" (HBM, or host memory on a CPU), "uvm" or "uvm_caching" (GPU only).
        load_factor: rows of the cache per row of the table, for "uvm_caching".
    """
    return ParameterConstraints(
        sharding_types=[ShardingType.ROW_WISE.value],
        compute_kernels=[KERNELS[memory].value],
        cache_params=None if load_factor is None else CacheParams(load_factor=load_factor),
    )


def frozen_sharders() -> list[ModuleSharder[nn.Module]]:
    """Return the sharders of both frozen collections."""
    return [FrozenEmbeddingCollectionSharder(), FrozenEmbeddingBagCollectionSharder()]


class _FrozenSharder(BaseEmbeddingSharder):
    """What both sharders have in common."""

    sharded: Callable[..., ShardedFrozenModule[Any]]

    def shard(
        self,
        module: FrozenModule,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFrozenModule[Any]:
        """Return the sharded module; rows that an unsharded module already has are kept.

        Raises:
            ValueError: the plan is not row-wise, or names a kernel that a frozen table does not have.
        """
        for name, plan in params.items():
            if plan.sharding_type != ShardingType.ROW_WISE.value:
                raise ValueError(f"frozen table {name} is sharded row_wise, not {plan.sharding_type}")
        return self.sharded(module, params, env, device)

    def shardable_parameters(self, module: FrozenModule) -> dict[str, nn.Parameter]:
        """Return the stored shapes and types for the planner, as parameters without memory."""
        return {
            name: nn.Parameter(
                torch.empty(table.store.num_rows, table.store.stored_width, dtype=DTYPES[table.dtype],
                            device="meta"),
                requires_grad=False,
            )
            for name, table in module.frozen_tables().items()
        }  # fmt: skip

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        kinds = KERNELS.values() if compute_device_type == "cuda" else [KERNELS["device"]]
        return [kernel.value for kernel in kinds]


class FrozenEmbeddingCollectionSharder(_FrozenSharder):
    """Shards :class:`FrozenEmbeddingCollection` row-wise."""

    sharded = ShardedFrozenEmbeddingCollection

    @property
    def module_type(self) -> type[FrozenEmbeddingCollection]:
        return FrozenEmbeddingCollection


class FrozenEmbeddingBagCollectionSharder(_FrozenSharder):
    """Shards :class:`FrozenEmbeddingBagCollection` row-wise."""

    sharded = ShardedFrozenEmbeddingBagCollection

    @property
    def module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection
