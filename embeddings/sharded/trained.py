"""TorchRec's trained collections, sharded or not: their rows, and making one with a table less or more.

A sharded collection cannot change its tables. Another one is made from its plan, on the same ranks, and takes
over rows, optimizer state and learning rates. Tables in fused kernels only: of any other, the optimizer is
elsewhere.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from mim_torchrec.embeddings.sharded.split import embedding_names
from mim_torchrec.embeddings.sharded.transfer import Block
from mim_torchrec.embeddings.table.manifest import TableError

FUSED = {
    EmbeddingComputeKernel.FUSED.value,
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
}
SHARDED = (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)
WHOLE = (EmbeddingBagCollection, EmbeddingCollection)


def is_trained(module: nn.Module) -> bool:
    """Whether a module is TorchRec's own collection, sharded or not; a subclass may do more, and is not."""
    return type(module) in (*SHARDED, *WHOLE)


def is_bags(module: nn.Module) -> bool:
    """Whether a trained collection pools."""
    return isinstance(module, ShardedEmbeddingBagCollection | EmbeddingBagCollection)


def configs_of(module: Any) -> list[BaseEmbeddingConfig]:
    """Return the tables of a trained collection."""
    if isinstance(module, SHARDED):
        own: Any = module
        return list(own._embedding_bag_configs if is_bags(module) else own._embedding_configs)
    return list(module.embedding_bag_configs() if is_bags(module) else module.embedding_configs())


def keys_of(module: Any) -> list[str]:
    """Return the keys that a trained collection gives, in order."""
    if isinstance(module, ShardedEmbeddingBagCollection):
        return list(module._embedding_names)
    return [name for names in embedding_names(configs_of(module)) for name in names]


def weight_key(module: nn.Module, table: str) -> str:
    """Return the name of a table's rows in the collection's state."""
    return f"{'embedding_bags' if is_bags(module) else 'embeddings'}.{table}.weight"


def check_fused(module: Any, path: str) -> None:
    """Raise TableError unless every table of a sharded collection is in a fused kernel."""
    for name, plan in module.module_sharding_plan.items():
        check_plan(f"{path}.{name}", plan)
    if any(getattr(config, "use_virtual_table", False) for config in configs_of(module)):
        raise TableError(f"{path}: virtual tables (key-value kernels) have no rows that could be frozen")
    if getattr(module, "enable_embedding_update", False):
        raise TableError(f"{path}: a collection with enable_embedding_update cannot be changed")


def check_plan(name: str, plan: ParameterSharding) -> None:
    """Raise TableError unless a table is in a fused kernel."""
    if plan.sharding_type == ShardingType.DATA_PARALLEL.value or plan.compute_kernel not in FUSED:
        raise TableError(
            f"{name}: is sharded {plan.sharding_type} with kernel {plan.compute_kernel!r}; only collections "
            f"whose tables are all in a fused kernel can be changed while they train: plan the table with "
            f"compute_kernel='fused', or give it a collection of its own"
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a table on all ranks: who has which block, and this rank's values (num_rows, num_columns)."""

    blocks: list[Block]
    own: list[tuple[Block, Tensor]]
    num_rows: int
    dim: int
    dtype: torch.dtype

    def read(self, part: Block) -> Tensor:
        """Return this rank's values of a part of one of its blocks."""
        block, values = next((b, v) for b, v in self.own if b.overlap(part) == part)
        return values[part.row - block.row : part.row_stop - block.row,
                      part.column - block.column : part.column_stop - block.column]  # fmt: skip

    def write(self, part: Block, values: Tensor) -> None:
        """Replace this rank's values of a part of one of its blocks."""
        self.read(part).copy_(values)


def rows_of(module: nn.Module, table: str, group: dist.ProcessGroup | None) -> Rows:
    """Return the rows of a table of a trained collection; what they hold is not copied."""
    config = next(config for config in configs_of(module) if config.name == table)
    shape = (config.num_embeddings, config.embedding_dim)
    weight = module.state_dict()[weight_key(module, table)]
    if not isinstance(module, SHARDED):
        block = Block(0, 0, shape[0], 0, shape[1])
        return Rows([block], [(block, weight)], *shape, weight.dtype)
    rank = dist.get_rank(group) if group is not None else 0
    local = [_block(rank, offsets, values.shape) for offsets, values in local_shards(weight)]
    every: list[list[Block]] = [local]
    if group is not None:
        every = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(every, local, group=group)
    own = [(block, values) for block, (_, values) in zip(local, local_shards(weight), strict=True)]
    return Rows([block for blocks in every for block in blocks], own, *shape, weight.dtype)


def local_shards(value: Any) -> list[tuple[Sequence[int], Tensor]]:
    """Return offsets and values of this rank's shards of a sharded tensor, those without values left out."""
    if isinstance(value, DTensor):
        wrapper: Any = value.to_local()
        found = list(zip(wrapper.local_offsets(), wrapper.local_shards(), strict=True))
    elif isinstance(value, ShardedTensor):
        found = [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
    else:
        raise TableError(f"rows of a sharded table are a {type(value).__name__}, which cannot be read")
    return [(offsets, values) for offsets, values in found if values.numel()]


def fused_params(module: Any, table: str) -> dict[str, Any]:
    """Return the parameters of a table's fused kernel and optimizer; every rank knows those of all tables."""
    shardings = module._embedding_shardings if is_bags(module) else module._sharding_type_to_sharding.values()
    for sharding in shardings:
        for groups in sharding._grouped_embedding_configs_per_rank:
            for group in groups:
                if any(each.name == table for each in group.embedding_tables):
                    return copy.copy(group.fused_params or {})
    raise TableError(f"the kernel of table {table} is not found in {type(module).__name__}")


def options_of(module: Any) -> dict[str, bool]:
    """Return what a collection, trained or frozen, sharded or not, was made with besides its tables."""
    bags = is_bags(module) if is_trained(module) else module._prefix == "embedding_bags"
    return {"is_weighted": module._is_weighted} if bags else {"need_indices": module._need_indices}


def take_modules(old: Any, new: Any) -> None:
    """Have a collection that is not sharded take over the tables of another, as the same parameters."""
    before, after = ((each.embedding_bags if is_bags(each) else each.embeddings) for each in (old, new))
    for name in after:
        if name in before:
            after[name] = before[name]
    new._device = old._device


def whole_type(bags: bool) -> Any:
    """Return the type of a trained collection that is not sharded."""
    return EmbeddingBagCollection if bags else EmbeddingCollection


def reshard(
    old: Any,
    whole: Any,
    plans: dict[str, ParameterSharding],
    sharder: Any,
    env: ShardingEnv,
    device: torch.device,
    path: str,
) -> nn.Module:
    """Shard a collection and give the tables that ``old`` has its rows, optimizer state and learning rates.

    Args:
        old: sharded collection; None where all tables are new.
        whole: what is to be sharded, without memory; tables that ``old`` lacks have an optimizer in backward.
        plans: by table.
        sharder: of this kind of collection.
        env: the ranks.
        device: of the rows.
        path: of the collection in the model.
    """
    kept = {config.name for config in configs_of(old)} & set(plans) if old is not None else set()
    parameters = dict(whole.named_parameters())
    for name in kept:
        parameters[weight_key(whole, name)]._optimizer_classes = [None]
        parameters[weight_key(whole, name)]._optimizer_kwargs = [fused_params(old, name)]
    made: Any = sharder.shard(whole, plans, env, device, path)
    if kept:
        before, after = old.state_dict(), made.state_dict()
        for name in kept:
            _copy_shards(before[weight_key(whole, name)], after[weight_key(whole, name)])
        _copy_optimizer(old, made, {weight_key(whole, name) for name in kept})
    return made.train(old.training) if old is not None else made


def _copy_optimizer(old: Any, made: Any, keys: set[str]) -> None:
    before, after = (module.fused_optimizer.state_dict()["state"] for module in (old, made))
    for key in keys & set(after):
        for name, state in after[key].items():
            _copy_shards(before[key][name], state)
    steps = {table.name: kernel for kernel in fused_kernels(old) for table in kernel._config.embedding_tables}
    for kernel in fused_kernels(made):
        names = [table.name for table in kernel._config.embedding_tables if table.name in steps]
        sources = {id(steps[name]): steps[name] for name in names}
        for source in sources.values():
            for counter in ("iter", "iter_cpu"):
                getattr(kernel.emb_module, counter).copy_(getattr(source.emb_module, counter))
        rates = {source.fused_optimizer.param_groups[0]["lr"] for source in sources.values()}
        if len(rates) > 1:
            raise TableError(f"tables {names} are in one kernel now and have learning rates {sorted(rates)}")
        if rates:
            kernel.fused_optimizer.param_groups[0]["lr"] = rates.pop()
            kernel.fused_optimizer.step()


def fused_kernels(module: Any) -> list[Any]:
    """The kernels of a sharded trainable collection on this rank; `emb_module` of each is fbgemm's."""
    return [kernel for lookup in module._lookups for kernel in lookup._emb_modules]


def _copy_shards(before: Any, after: Any) -> None:
    for (_, source), (_, target) in zip(local_shards(before), local_shards(after), strict=True):
        target.copy_(source)


def _block(rank: int, offsets: Sequence[int], shape: torch.Size) -> Block:
    return Block(rank, offsets[0], offsets[0] + shape[0], offsets[1], offsets[1] + shape[1])
