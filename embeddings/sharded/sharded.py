"""Frozen collections with their rows divided over ranks.

What happens in a step, for each table:

1. ``input_dist``: the rows asked for, of all features together, are made unique; each goes to the rank that
   owns it. Sorted as they come out of that, they are already in the order of ranks.
2. ``compute``: the owner reads its rows as they are stored.
3. ``output_dist``: the bytes go back; they become floats, and each feature takes its vectors, on arrival.

So an exchange costs the bytes of distinct rows in the table's own precision, pooling is done by who asked for
it (the same sum for every number of ranks, bags of any length, ranks with batches of any size, and gradients
for weights), and nothing is exchanged in the backward. One rank exchanges nothing and does not look for
repetitions.

Not here: other shardings than row-wise, two-dimensional parallelism, int4.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.distributed.types import (
    Awaitable,
    EmbeddingModuleShardingPlan,
    LazyAwaitable,
    NoWait,
    ParameterSharding,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.streamable import Multistreamable

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
    FrozenTable,
    storage_dtype,
    whole_rows,
)
from mim_torchrec.embeddings.sharded.lookup import check_rows, jagged, keyed, pool
from mim_torchrec.embeddings.sharded.rows import DenseRows, make_rows
from mim_torchrec.embeddings.table.quantize import DTYPES, decode

CACHE_LOAD_FACTOR = 0.2
Out = TypeVar("Out")


@dataclass
class FrozenContext(Multistreamable):
    """What one step needs to remember between the stages: `index` says which distinct row each id has."""

    features: KeyedJaggedTensor | None = None
    index: list[Tensor | None] = field(default_factory=list)
    sharding_contexts: list[SequenceShardingContext] = field(default_factory=list)

    def looked_up(self) -> KeyedJaggedTensor:
        """The features of the step, which `input_dist` has set."""
        assert self.features is not None
        return self.features

    def record_stream(self, stream: torch.Stream) -> None:
        if self.features is not None:
            self.features.record_stream(cast(torch.cuda.Stream, stream))
        for index in self.index:
            if index is not None:
                index.record_stream(stream)


class RowsDist(nn.Module):
    """Sends distinct rows, in ascending order, to the ranks that own them.

    Args:
        group: the ranks.
        name: of the table.
        block: rows of each rank but the last.
        device: of the rows asked for.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, block: int, device: torch.device) -> None:
        super().__init__()
        world_size = group.size()
        self._keys = [f"{name}@{rank}" for rank in range(world_size)]
        self._dist = KJTAllToAll(pg=group, splits=[1] * world_size)  # pipelines fuse the dists of this name
        self._bounds = block * torch.arange(1, world_size, device=device)

    def forward(self, rows: Tensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        stops = torch.searchsorted(rows, self._bounds)
        ends = stops.new_tensor([0]), stops.new_tensor([rows.numel()])
        lengths = torch.diff(torch.cat([ends[0], stops, ends[1]])).int()
        return self._dist(KeyedJaggedTensor(keys=self._keys, values=rows, lengths=lengths))


class VectorsBack(Awaitable[Tensor]):
    """The vectors (num_rows, dim) of the distinct rows that were asked for, from the ranks that own them.

    Args:
        stored: (num_rows_found, stored_width), rows as stored, in the order of the ranks that asked.
        dtype: how they are stored.
        sent: rows for each rank.
        received: rows from each rank.
        group: the ranks.
    """

    def __init__(
        self, stored: Tensor, dtype: str, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self._sent = stored.contiguous().view(torch.uint8)  # gloo lacks some types, no backend lacks bytes
        self._received = self._sent.new_empty(sum(received), self._sent.shape[1])
        self._work = dist.all_to_all_single(
            self._received, self._sent, received, sent, group=group, async_op=True
        )

    def _wait_impl(self) -> Tensor:
        if self._work is not None:  # None where this rank is not in the group
            self._work.wait()
        stored = self._received.view(DTYPES[self._dtype])
        del self._received, self._sent  # who waits may hold this object for longer than the bytes are needed
        return decode(stored, self._dtype) if self._dtype == "int8" else stored


class FrozenAwaitable(LazyAwaitable[Out], Generic[Out]):
    """Waits for vectors and has the module give every feature its own."""

    def __init__(
        self, module: "ShardedFrozenModule[Out]", ctx: FrozenContext, vectors: list[Awaitable[Tensor]]
    ) -> None:
        super().__init__()
        self._module, self._ctx, self._vectors = module, ctx, vectors

    def _wait_impl(self) -> Out:
        return self._module.assemble(self._ctx, [vectors.wait() for vectors in self._vectors])


class ShardedFrozenModule(
    FrozenModule, ShardedEmbeddingModule[KJTList, list[Tensor], Out, FrozenContext], Generic[Out]
):
    """Rows of frozen tables divided over ranks in blocks; made by a sharder.

    Args:
        module: the frozen collection; rows that it has are kept.
        configs: its tables.
        params: the plan of each table: row-wise, and its kernel says which memory the rows are in.
        env: the ranks.
        device: of this rank's lookups.
    """

    def __init__(
        self,
        module: FrozenEmbeddingCollection | FrozenEmbeddingBagCollection,
        configs: Sequence[BaseEmbeddingConfig],
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._env, self._device = env, device if device is not None else torch.device("cpu")
        self._prefix = module._prefix
        self.module_sharding_plan = EmbeddingModuleShardingPlan(params)
        whole = module.frozen_tables()
        self.init_frozen([self._shard(whole[c.name], params[c.name]) for c in configs], module.store_rows)
        self._names = get_embedding_names_by_table(cast(list[EmbeddingConfig], list(configs)))
        if self._is_divided:
            self._input_dists = [RowsDist(self._group, c.name, self._block(c), self._device) for c in configs]

    @property
    def env(self) -> ShardingEnv:
        return self._env

    @property
    def fused_optimizer(self) -> CombinedOptimizer:
        """An optimizer of nothing."""
        return CombinedOptimizer([])

    def create_context(self) -> FrozenContext:
        return FrozenContext()

    def input_dist(self, ctx: FrozenContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        self.check_filled()
        ctx.features = features
        by_feature = features.to_dict()  # it is remembered, so weights must not lose their gradient here
        with torch.no_grad():
            return self._send_rows(ctx, features, by_feature)

    def _send_rows(
        self, ctx: FrozenContext, features: KeyedJaggedTensor, by_feature: dict[str, JaggedTensor]
    ) -> Awaitable[Awaitable[KJTList]]:
        awaitables: list[Awaitable[Awaitable[KeyedJaggedTensor]]] = []
        for k, table in enumerate(self._frozen.values()):
            keys = table.config.feature_names
            if keys == features.keys():
                rows = features.values().long()
            else:
                rows = torch.cat([by_feature[key].values() for key in keys]).long()
            index = None
            if self._needs_distinct(table):
                rows, index = torch.unique(rows, return_inverse=True)
            check_rows(rows, table.config, ascending=index is not None)
            ctx.index.append(index)
            ctx.sharding_contexts.append(SequenceShardingContext())
            if self._is_divided:
                awaitables.append(self._input_dists[k](rows))
            else:
                lengths = torch.tensor([rows.numel()], device=rows.device)
                awaitables.append(
                    NoWait(NoWait(KeyedJaggedTensor([table.config.name], rows, lengths=lengths)))
                )
        return KJTListSplitsAwaitable(awaitables, ctx)

    @torch.no_grad()
    def compute(self, ctx: FrozenContext, dist_input: KJTList) -> list[Tensor]:
        return [
            table.store.gather(rows.values() - table.first_row) if self._is_divided
            else table.store.vectors(rows.values())
            for table, rows in zip(self._frozen.values(), dist_input, strict=True)
        ]  # fmt: skip

    @torch.no_grad()
    def output_dist(self, ctx: FrozenContext, output: list[Tensor]) -> LazyAwaitable[Out]:
        if not self._is_divided:
            return FrozenAwaitable(self, ctx, [NoWait(vectors) for vectors in output])
        vectors: list[Awaitable[Tensor]] = [
            VectorsBack(stored, table.dtype, each.output_splits, each.input_splits, self._group)
            for stored, table, each in zip(output, self._frozen.values(), ctx.sharding_contexts, strict=True)
        ]
        return FrozenAwaitable(self, ctx, vectors)

    @abc.abstractmethod
    def assemble(self, ctx: FrozenContext, vectors: list[Tensor]) -> Out:
        """Give every feature its vectors: of those (num_vectors, dim) of its table, ``ctx.index``."""

    def _needs_distinct(self, table: FrozenTable) -> bool:
        return self._is_divided

    @property
    def _group(self) -> dist.ProcessGroup:
        """The ranks that divide the rows; there is a group wherever rows are divided."""
        assert self._env.process_group is not None
        return self._env.process_group

    @property
    def _is_divided(self) -> bool:
        return self._env.world_size > 1

    def _block(self, config: BaseEmbeddingConfig) -> int:
        return -(-config.num_embeddings // self._env.world_size)

    def _shard(self, whole: FrozenTable, plan: ParameterSharding) -> FrozenTable:
        config, block = whole.config, self._block(whole.config)
        first = min(self._env.rank * block, config.num_embeddings)
        stop = min(first + block, config.num_embeddings)
        load_factor = plan.cache_params.load_factor if plan.cache_params is not None else None
        store = make_rows(
            storage_dtype(config), stop - first, config.embedding_dim, self._device, plan.compute_kernel,
            CACHE_LOAD_FACTOR if load_factor is None else load_factor,
        )  # fmt: skip
        if isinstance(whole.store, DenseRows) and whole.store.device.type != "meta":
            rows = torch.arange(stop - first, device=self._device)
            store.write(rows, whole.store.tensor[first:stop].to(self._device))
        return FrozenTable(config, first, store, whole.state, items=whole.items)

    def _rows_to_save(self, table: FrozenTable) -> ShardedTensor:
        state = table.state
        table.items.check_ranks(
            table.config.name, state.table_version, state.seq, self._env.process_group
        )  # what follows is collective as well
        rows, width = whole_rows(table), table.store.stored_width
        placement = f"rank:{self._env.rank}/{rows.device}"
        metadata = ShardMetadata([table.first_row, 0], list(rows.shape), placement)
        return ShardedTensor._init_from_local_shards(
            [Shard(rows, metadata)] if table.store.num_rows else [],
            [table.config.num_embeddings, width],
            process_group=self._env.process_group,
        )


class ShardedFrozenEmbeddingCollection(ShardedFrozenModule[dict[str, JaggedTensor]]):
    """A sharded :class:`FrozenEmbeddingCollection`."""

    def __init__(
        self,
        module: FrozenEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(module, module.embedding_configs(), params, env, device)
        self._need_indices, self._output_dtype = module.need_indices(), module.output_dtype

    @torch.no_grad()  # it is waited for outside the forward that made it
    def assemble(self, ctx: FrozenContext, vectors: list[Tensor]) -> dict[str, JaggedTensor]:
        by_feature = ctx.looked_up().to_dict()
        found = {}
        for table, names, own, index in zip(
            self._frozen.values(), self._names, vectors, ctx.index, strict=True
        ):
            own = own.to(self._output_dtype)  # of distinct rows, where there are fewer
            own = own if index is None else own.index_select(0, index)
            features = [by_feature[key] for key in table.config.feature_names]
            parts = own.split([feature.values().numel() for feature in features])
            for name, feature, part in zip(names, features, parts, strict=True):
                found[name] = jagged(part, feature, self._need_indices)
        return found

    @property
    def unsharded_module_type(self) -> type[FrozenEmbeddingCollection]:
        return FrozenEmbeddingCollection


class ShardedFrozenEmbeddingBagCollection(ShardedFrozenModule[KeyedTensor]):
    """A sharded :class:`FrozenEmbeddingBagCollection`."""

    def __init__(
        self,
        module: FrozenEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(module, module.embedding_bag_configs(), params, env, device)
        self._is_weighted = module.is_weighted()

    def compute(self, ctx: FrozenContext, dist_input: KJTList) -> list[Tensor]:
        if self._is_divided:
            return super().compute(ctx, dist_input)
        found = []
        for k, (table, rows) in enumerate(zip(self._frozen.values(), dist_input, strict=True)):
            if self._needs_distinct(table):
                found.append(table.store.vectors(rows.values()))
            else:  # pooled where they are
                found.append(cast(DenseRows, table.store).tensor)
                ctx.index[k] = rows.values()
        return found

    def assemble(self, ctx: FrozenContext, vectors: list[Tensor]) -> KeyedTensor:
        by_feature = ctx.looked_up().to_dict()
        pooled = []
        for table, own, index in zip(self._frozen.values(), vectors, ctx.index, strict=True):
            features = [by_feature[key] for key in table.config.feature_names]
            assert index is not None  # `compute` has set it
            parts = index.split([feature.values().numel() for feature in features])
            pooled += [
                pool(own, part, bags, table.bag_config, self._is_weighted)
                for part, bags in zip(parts, features, strict=True)
            ]
        return keyed(pooled, [table.bag_config for table in self._frozen.values()])

    def _needs_distinct(self, table: FrozenTable) -> bool:
        return self._is_divided or not (isinstance(table.store, DenseRows) and table.dtype == "float32")

    @property
    def unsharded_module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection
