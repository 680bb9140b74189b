"""How the planner and ``DistributedModelParallel`` shard frozen collections.

Pass ``frozen_sharders()`` among the sharders of both. A plan's sharding type says which ranks divide the rows
(``placement.py``). Its compute kernel says which memory they are in: "fused" is memory of the device (HBM, or
host memory on a CPU), "fused_uvm" is managed (UVM) memory and "fused_uvm_caching" that behind a cache in HBM.
Constrain both per table with :func:`frozen_constraint`. TorchRec's planner prices rows by their stored bytes,
no optimizer state, but a backward pass; ``FrozenEnumerator`` does not.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import (
    BoundsCheckMode,
    CacheParams,
    ModuleSharder,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
    FrozenTable,
)
from mim_torchrec.embeddings.sharded.placement import Copy, copy_of
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


def frozen_constraint(
    memory: Memory = "device", load_factor: float | None = None, copy: Copy = "world"
) -> ParameterConstraints:
    """Return the planner's constraint that says where a frozen table goes.

    Args:
        memory: "device" (HBM, or host memory on a CPU), "uvm" or "uvm_caching" (GPU only).
        load_factor: rows of the cache per row of the table, for "uvm_caching".
        copy: one copy in the "world" (in two-dimensional parallelism, in each sharding group), one a "node",
            whose ranks divide it among them, or one a "rank". The planner needs the enumerator
            ``FrozenEnumerator`` for more copies than one: TorchRec's own does not count their memory.

    Raises:
        ValueError: a copy a rank in other memory than the device's.
    """
    kernel = KERNELS[memory]
    if copy == "rank":
        if memory != "device":
            raise ValueError(f"a copy a rank is in memory of the device, not {memory}")
        kernel = EmbeddingComputeKernel.DENSE
    sharding = ShardingType.ROW_WISE if copy == "world" else ShardingType.DATA_PARALLEL
    return ParameterConstraints(
        sharding_types=[sharding.value],
        compute_kernels=[kernel.value],
        cache_params=None if load_factor is None else CacheParams(load_factor=load_factor),
    )


def frozen_sharders() -> list[ModuleSharder[nn.Module]]:
    """Return the sharders of both frozen collections."""
    return [FrozenEmbeddingCollectionSharder(), FrozenEmbeddingBagCollectionSharder()]


class _FrozenSharder(BaseEmbeddingSharder):
    """What both sharders have in common.

    Args:
        fused_params: of TorchRec's, those that a frozen table has: ``cache_load_factor``, of tables for which
            the plan has none, ``prefetch_pipeline``, and ``bounds_check_mode`` FATAL, which it always is.
        qcomm_codecs_registry: None or empty; rows are exchanged as they are stored.

    Raises:
        ValueError: other fused parameters or codecs.
    """

    sharded: Callable[..., ShardedFrozenModule[Any]]

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        if qcomm_codecs_registry:
            raise ValueError(
                f"{type(self).__name__}: no codec for {sorted(qcomm_codecs_registry)}; frozen rows are "
                f"exchanged as they are stored: store them as float16, bfloat16 or int8 to send less"
            )
        for option, value in (fused_params or {}).items():
            _check_fused_param(f"{type(self).__name__}: fused_params[{option!r}]", option, value)
        super().__init__(fused_params, qcomm_codecs_registry)

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
            ValueError: the plan has a sharding, a kernel or options that a frozen table does not have.
        """
        return self.sharded(
            module, {name: self._checked(name, plan) for name, plan in params.items()}, env, device
        )

    def _checked(self, name: str, plan: ParameterSharding) -> ParameterSharding:
        copy_of(name, plan)
        cache = plan.cache_params or CacheParams()
        options = {
            "stochastic_rounding": plan.stochastic_rounding,
            "enforce_hbm": plan.enforce_hbm,
            "bounds_check_mode": plan.bounds_check_mode,
            "output_dtype": plan.output_dtype,
            "key_value_params": plan.key_value_params,
            "cache_algorithm": cache.algorithm,
            "cache_precision": cache.precision,
            "cache_reserved_memory": cache.reserved_memory,
            "multipass_prefetch_config": cache.multipass_prefetch_config,
        }
        for option, value in options.items():
            if value is not None and value is not False:
                _check_fused_param(f"frozen table {name}: {option}", option, value)
        load_factor = (self.fused_params or {}).get("cache_load_factor")
        if load_factor is None or cache.load_factor is not None:
            return plan
        return replace(plan, cache_params=replace(cache, load_factor=load_factor))

    def shardable_parameters(self, module: FrozenModule) -> dict[str, nn.Parameter]:
        """Return the stored shapes and types for the planner, as parameters without memory."""
        return {name: _shape(table) for name, table in module.frozen_tables().items()}

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        kinds = KERNELS.values() if compute_device_type == "cuda" else [KERNELS["device"]]
        return [kernel.value for kernel in kinds]


def _shape(table: FrozenTable) -> nn.Parameter:
    store = table.store
    shape = torch.empty(store.num_rows, store.stored_width, dtype=DTYPES[table.dtype], device="meta")
    parameter = nn.Parameter(shape, requires_grad=False)
    # `row_wise()` without a kernel means "fused" for parameters that have this, and "dense" for others.
    parameter._in_backward_optimizers = []  # type: ignore[attr-defined]
    return parameter


def _check_fused_param(where: str, option: str, value: Any) -> None:
    if option in ("cache_load_factor", "prefetch_pipeline"):
        return
    if option == "bounds_check_mode":
        if value is BoundsCheckMode.FATAL:
            return
        raise ValueError(f"{where} is {value.name}; a frozen table knows FATAL: check ids before the lookup")
    if option == "output_dtype":
        raise ValueError(f"{where}: give output_dtype to the frozen collection")
    raise ValueError(f"{where}: a frozen table has no such option, because it has no optimizer and no TBE")


class FrozenEmbeddingCollectionSharder(_FrozenSharder):
    """Shards :class:`FrozenEmbeddingCollection` by rows."""

    sharded = ShardedFrozenEmbeddingCollection

    @property
    def module_type(self) -> type[FrozenEmbeddingCollection]:
        return FrozenEmbeddingCollection


class FrozenEmbeddingBagCollectionSharder(_FrozenSharder):
    """Shards :class:`FrozenEmbeddingBagCollection` by rows."""

    sharded = ShardedFrozenEmbeddingBagCollection

    @property
    def module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection
