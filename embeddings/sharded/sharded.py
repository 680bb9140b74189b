"""Frozen collections with their rows divided over ranks.

What happens in a step:

1. ``input_dist``: the rows asked for of each table, of all features together, are made unique; each goes to
   the rank that owns it. Sorted as they come out of that, they are already in the order of ranks.
2. ``compute``: the owner reads its rows as they are stored.
3. ``output_dist``: the bytes go back; they become floats, and each feature takes its vectors, on arrival.

The tables of a collection travel together (``exchange.py``). A plan says for each which ranks divide its rows
(``placement.py``).

So an exchange costs the bytes of distinct rows in the table's own precision, pooling is done by who asked for
it (the same sum for every number of ranks, bags of any length, ranks with batches of any size, and gradients
for weights), and nothing is exchanged in the backward. One rank exchanges nothing and does not look for
repetitions.

Not here: other shardings than by rows.
"""

import abc
from typing import Generic, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.utils._pytree import tree_map_only
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList, ShardedEmbeddingModule
from torchrec.distributed.types import (
    Awaitable,
    EmbeddingModuleShardingPlan,
    LazyAwaitable,
    NoWait,
    ParameterSharding,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mim_torchrec.embeddings.sharded.exchange import RowCounts, RowsDist, VectorsBack
from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
    FrozenTable,
    storage_dtype,
    whole_rows,
)
from mim_torchrec.embeddings.sharded.lookup import (
    check_features,
    expand,
    inverse_indices,
    jagged,
    keyed,
    pool,
    row_numbers,
)
from mim_torchrec.embeddings.sharded.placement import place
from mim_torchrec.embeddings.sharded.rows import DenseRows, make_rows
from mim_torchrec.embeddings.sharded.ssd import SsdRows
from mim_torchrec.embeddings.sharded.step import FrozenAwaitable, FrozenContext, Out
from mim_torchrec.embeddings.sharded.traced import OutsideGraphs

CACHE_LOAD_FACTOR = 0.2


class ShardedFrozenModule(
    OutsideGraphs,
    FrozenModule,
    ShardedEmbeddingModule[KJTList, list[Tensor], Out, FrozenContext],
    Generic[Out],
):
    """Rows of frozen tables divided over ranks in blocks; made by a sharder.

    Args:
        module: the frozen collection; rows that it has are kept.
        params: the plan of each table: its sharding says which ranks divide the rows, and its kernel which
            memory they are in.
        env: the ranks.
        device: of this rank's lookups.
    """

    _is_weighted = False
    _free_features_storage_early = False  # a pipeline sets it

    def __init__(
        self,
        module: FrozenEmbeddingCollection | FrozenEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._env, self._device = env, device if device is not None else torch.device("cpu")
        self._prefix = module._prefix
        self.module_sharding_plan = EmbeddingModuleShardingPlan(params)
        whole = module.frozen_tables()
        configs = [table.config for table in whole.values()]
        self.placements = {c.name: place(c.name, params[c.name], env) for c in configs}
        self.init_frozen([self._shard(whole[c.name], params[c.name]) for c in configs], module.store_rows)
        self._names = get_embedding_names_by_table(cast(list[EmbeddingConfig], list(configs)))
        self.add_module(self._prefix, nn.ModuleDict())  # `shard_modules` expects the names of the unsharded
        blocks: dict[dist.ProcessGroup, dict[str, int]] = {}
        for config in configs:
            placement = self.placements[config.name]
            if placement.is_divided:
                of_group = blocks.setdefault(placement.ranks, {})
                of_group[config.name] = placement.block(config.num_embeddings)
        self._exchanges = [RowsDist(group, of_group, self._device) for group, of_group in blocks.items()]
        self._alone = [c.name for c in configs if not self.placements[c.name].is_divided]

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
        features = maybe_td_to_kjt(features, None)
        check_features(features, self._keys, self._is_weighted)
        if self._free_features_storage_early:  # other collections have the batch emptied after this
            features = tree_map_only(Tensor, torch.clone, features)
        if features.variable_stride_per_key():
            ctx.inverse = inverse_indices(features, self._keys)
        ctx.features = features
        by_feature = features.to_dict()  # it is remembered, so weights must not lose their gradient here
        with torch.no_grad():
            return self._send_rows(ctx, features, by_feature)

    def _send_rows(
        self, ctx: FrozenContext, features: KeyedJaggedTensor, by_feature: dict[str, JaggedTensor]
    ) -> Awaitable[Awaitable[KJTList]]:
        asked: dict[str, Tensor] = {}
        for name, table in self._frozen.items():
            keys = table.config.feature_names
            if keys == features.keys():
                rows = features.values().long()
            else:
                rows = torch.cat([by_feature[key].values() for key in keys]).long()
            index, bounds = None, table.bounds
            if bounds.replaces:
                rows = bounds.examine(rows, ctx.later)
            if self._needs_distinct(table):
                rows, index = torch.unique(rows, return_inverse=True)
            if not bounds.replaces:
                rows = bounds.examine(rows, ctx.later, ascending=index is not None)
            ctx.index.append(index)
            asked[name] = rows
        awaitables: list[Awaitable[Awaitable[KeyedJaggedTensor]]] = []
        for input_dist in self._exchanges:
            ctx.counts.append(RowCounts())
            awaitables.append(input_dist([asked[name] for name in input_dist.tables], ctx.counts[-1]))
        for name in self._alone:
            rows, store = asked[name], self._frozen[name].store
            if isinstance(store, SsdRows):  # pipelines call this a step ahead
                store.prefetch(rows)
            lengths = rows.new_full((1,), rows.numel())
            awaitables.append(NoWait(NoWait(KeyedJaggedTensor([name], rows, lengths=lengths))))
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _owned(self, ctx: FrozenContext, dist_input: KJTList) -> dict[str, Tensor]:
        """Rows (n,) that this rank reads of each table, numbered from 0 on this rank."""
        owned: dict[str, Tensor] = {}
        features = row_numbers(dist_input)
        for input_dist, counts, rows in zip(self._exchanges, ctx.counts, features, strict=False):
            sizes = [counts.owed_of_table(k) for k in range(len(input_dist.tables))]
            owned.update(zip(input_dist.tables, rows.split(sizes), strict=True))
        owned.update(zip(self._alone, features[len(self._exchanges) :], strict=True))
        return {
            name: owned[name] - table.first_row if table.first_row else owned[name]
            for name, table in self._frozen.items()
        }

    def prefetch(
        self,
        dist_input: KJTList,
        forward_stream: torch.Stream | None = None,
        ctx: FrozenContext | None = None,
    ) -> None:
        """Have the rows of a later step brought near; ``PrefetchTrainPipelineSparseDist`` calls this."""
        assert ctx is not None
        if forward_stream is not None:  # a lookup of the step before may read the places that are filled
            torch.get_device_module(self._device).current_stream().wait_stream(forward_stream)
        for name, rows in self._owned(ctx, dist_input).items():
            self._frozen[name].store.prefetch(rows)

    @torch.no_grad()
    def compute(self, ctx: FrozenContext, dist_input: KJTList) -> list[Tensor]:
        owned = self._owned(ctx, dist_input)
        return [
            self._read(ctx, k, table, owned[name]) for k, (name, table) in enumerate(self._frozen.items())
        ]

    def _read(self, ctx: FrozenContext, k: int, table: FrozenTable, rows: Tensor) -> Tensor:
        """Rows (n,) of the k-th table as they are stored where they are exchanged, else their vectors."""
        return table.store.gather(rows) if self._is_divided(table) else table.store.vectors(rows)

    @torch.no_grad()
    def output_dist(self, ctx: FrozenContext, output: list[Tensor]) -> LazyAwaitable[Out]:
        found = dict(zip(self._frozen, output, strict=True))
        exchanged: list[tuple[list[str], Awaitable[list[Tensor]]]] = []
        for input_dist, counts in zip(self._exchanges, ctx.counts, strict=True):
            names = input_dist.tables
            dtypes = [self._frozen[name].dtype for name in names]
            back = VectorsBack([found.pop(name) for name in names], dtypes, counts, input_dist.group)
            exchanged.append((names, back))
        return FrozenAwaitable(self, ctx, found, exchanged)

    @abc.abstractmethod
    def assemble(self, ctx: FrozenContext, vectors: list[Tensor]) -> Out:
        """Give every feature its vectors: of those (num_vectors, dim) of its table, ``ctx.index``."""

    def _needs_distinct(self, table: FrozenTable) -> bool:
        return self._is_divided(table)

    def _is_divided(self, table: FrozenTable) -> bool:
        return self.placements[table.config.name].is_divided

    def _shard(self, whole: FrozenTable, plan: ParameterSharding) -> FrozenTable:
        config, placement = whole.config, self.placements[whole.config.name]
        block = placement.block(config.num_embeddings)
        first = min(placement.rank * block, config.num_embeddings)
        stop = min(first + block, config.num_embeddings)
        load_factor = plan.cache_params.load_factor if plan.cache_params is not None else None
        kernel = EmbeddingComputeKernel.FUSED.value if placement.copy == "rank" else plan.compute_kernel
        store = make_rows(
            storage_dtype(config), stop - first, config.embedding_dim, self._device, kernel,
            CACHE_LOAD_FACTOR if load_factor is None else load_factor,
        )  # fmt: skip
        if isinstance(whole.store, DenseRows) and whole.store.filled:
            rows = torch.arange(stop - first, device=self._device)
            store.write(rows, whole.store.tensor[first:stop].to(self._device))
        bounds_check = whole.bounds.mode if plan.bounds_check_mode is None else plan.bounds_check_mode
        return FrozenTable(config, first, store, whole.state, items=whole.items, bounds_check=bounds_check)

    def _rows_to_save(self, table: FrozenTable) -> Tensor | ShardedTensor:
        rows, group = whole_rows(table), self.placements[table.config.name].group
        if self._env.process_group is not None:
            table.check_ranks(self._env.process_group)  # of all copies
        if group is None:
            return rows
        placement = f"rank:{dist.get_rank()}/{rows.device}"
        metadata = ShardMetadata([table.first_row, 0], list(rows.shape), placement)
        shards = [Shard(rows, metadata)] if table.store.num_rows else []
        size = [table.config.num_embeddings, table.store.stored_width]
        return ShardedTensor._init_from_local_shards(shards, size, process_group=group)


class ShardedFrozenEmbeddingCollection(ShardedFrozenModule[dict[str, JaggedTensor]]):
    """A sharded :class:`FrozenEmbeddingCollection`."""

    def __init__(
        self,
        module: FrozenEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(module, params, env, device)
        self._need_indices, self._output_dtype = module.need_indices(), module.output_dtype

    @torch.no_grad()  # it is waited for outside the forward that made it
    def assemble(self, ctx: FrozenContext, vectors: list[Tensor]) -> dict[str, JaggedTensor]:
        by_feature = ctx.looked_up().to_dict()
        found = {}
        for table, names, own, index in zip(
            self._frozen.values(), self._names, vectors, ctx.index, strict=True
        ):
            keys = table.config.feature_names
            features = [by_feature[key] for key in keys]
            if ctx.inverse is not None:
                features, index = expand(features, index, [ctx.inverse[key] for key in keys])
            own = own.to(self._output_dtype)  # of distinct rows, where there are fewer
            own = own if index is None else own.index_select(0, index)
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
        super().__init__(module, params, env, device)
        self._is_weighted, self._output_dtype = module.is_weighted(), module.output_dtype

    def _read(self, ctx: FrozenContext, k: int, table: FrozenTable, rows: Tensor) -> Tensor:
        if self._needs_distinct(table):
            return super()._read(ctx, k, table, rows)
        ctx.index[k] = rows  # pooled where they are
        return cast(DenseRows, table.store).tensor

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
        configs = [table.bag_config for table in self._frozen.values()]
        return keyed(pooled, configs, self._output_dtype, ctx.inverse)

    def _needs_distinct(self, table: FrozenTable) -> bool:
        in_place = isinstance(table.store, DenseRows) and table.dtype == "float32"
        return self._is_divided(table) or not in_place

    @property
    def unsharded_module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection
