"""Frozen multi-modal embeddings inside a TorchRec model (§3.5): looked up like any others, never trained.

``FrozenEmbeddingCollection`` is an ``EmbeddingCollection`` (unpooled) of its own type, and so
``DistributedModelParallel`` gives it its own sharder and kernel. Row-wise sharded, its rows cost exactly
their bytes: there is no parameter, no gradient, no optimizer state and no backward communication.
``state_dict`` does not hold them: they come from a table on disk, whose version the owner of a checkpoint
states (see ``load.py``).

Not here: other shardings than row-wise, updates of rows while training, de-duplication of ids before the
exchange.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import (
    EmbeddingCollectionContext,
    KJTList,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_sharding import BaseEmbeddingLookup, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import BaseGroupedFeatureProcessor, ShardedEmbeddingTable
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.types import LazyAwaitable, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from mim_torchrec.embeddings.sharded.kernels import ROW_DTYPES, FrozenLookup, FrozenRows
from mim_torchrec.embeddings.table.format import Table

DATA_TYPES = {"float32": DataType.FP32, "float16": DataType.FP16}


def frozen_config(table: Table, feature_names: list[str], name: str = "mm") -> EmbeddingConfig:
    """Return the embedding config of a table on disk.

    Args:
        table: the table; row 0 is added to its rows, for unknown items.
        feature_names: keys of the features that are looked up in it.
        name: the embedding table's name in the model.
    """
    return EmbeddingConfig(
        name=name,
        num_embeddings=table.row_index().num_embeddings,
        embedding_dim=table.manifest.dim,
        feature_names=list(feature_names),
        data_type=DATA_TYPES[table.manifest.dtype],
    )


class FrozenTable(nn.Module):
    """All rows of one frozen table in one process: a buffer outside the state dict."""

    def __init__(self, config: EmbeddingConfig, device: torch.device) -> None:
        super().__init__()
        if config.data_type not in ROW_DTYPES:
            raise ValueError(f"frozen table {config.name}: data type {config.data_type} is not FP32 or FP16")
        shape = (config.num_embeddings, config.embedding_dim)
        rows = torch.zeros(shape, dtype=ROW_DTYPES[config.data_type], device=device)
        self.register_buffer("weight", rows, persistent=False)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return self.weight.index_select(0, input)


class FrozenEmbeddingCollection(EmbeddingCollection):
    """Unpooled embeddings that are never trained; zeros until ``load_table`` has filled them.

    Args:
        tables: one config per table, FP16 or FP32, of one ``embedding_dim``; see :func:`frozen_config`.
        device: "meta" for a model that will be sharded (no memory is used), or where an unsharded one lives.
        need_indices: as in ``EmbeddingCollection``.

    Its forward maps a ``KeyedJaggedTensor`` of rows to a ``JaggedTensor`` of float32 vectors (num_ids, dim)
    for each feature.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | str = "meta",
        need_indices: bool = False,
    ) -> None:
        super().__init__(tables=tables, device=torch.device("meta"), need_indices=need_indices)
        self._device = torch.device(device)
        for config in tables:
            self.embeddings[config.name] = FrozenTable(config, self._device)

    def local_tables(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield each table's name, first row (0) and rows (num_embeddings, dim)."""
        for name, table in self.embeddings.items():
            yield name, 0, table.weight

    def reset_parameters(self) -> None:
        """Do nothing: the rows come from a table on disk."""


class FrozenRowWiseSharding(RwSequenceEmbeddingSharding):
    """Row-wise sharding whose lookup is ours; distribution of ids and vectors is TorchRec's."""

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> BaseEmbeddingLookup:
        return FrozenLookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device if device is not None else self._device,
            env=self._env,
        )


class FrozenAwaitable(LazyAwaitable[dict[str, JaggedTensor]]):
    """Waits for the exchange of vectors, which travel as they are stored, and makes them float32."""

    def __init__(self, vectors: LazyAwaitable[dict[str, JaggedTensor]]) -> None:
        super().__init__()
        self._vectors = vectors

    def _wait_impl(self) -> dict[str, JaggedTensor]:
        with torch.no_grad():  # a lazy awaitable is waited for outside the forward that made it
            return {
                feature: JaggedTensor(
                    values=vectors.values().float(),
                    lengths=vectors.lengths(),
                    weights=vectors.weights_or_none(),
                )
                for feature, vectors in self._vectors.wait().items()
            }


class ShardedFrozenEmbeddingCollection(ShardedEmbeddingCollection):
    """A ``FrozenEmbeddingCollection`` whose rows are divided over the ranks; made by its sharder."""

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> FrozenRowWiseSharding:
        return FrozenRowWiseSharding(
            sharding_infos=sharding_infos,
            env=env,
            device=device,
            qcomm_codecs_registry=qcomm_codecs_registry,
        )

    def local_tables(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield each table's name, first row of this rank and local rows (local_rows, dim)."""
        for table, rows in self._local():
            yield table.name, table.local_metadata.shard_offsets[0], rows

    def table_config(self, name: str) -> EmbeddingConfig:
        return self._table_name_to_config[name]

    @property
    def env(self) -> ShardingEnv:
        return self._env

    def _local(self) -> Iterator[tuple[ShardedEmbeddingTable, Tensor]]:
        for lookup in self._lookups:
            for kernel in lookup._emb_modules:
                assert isinstance(kernel, FrozenRows)
                yield from kernel.tables()

    def reset_parameters(self) -> None:
        """Do nothing: the rows come from a table on disk."""

    @torch.no_grad()
    def compute(self, ctx: EmbeddingCollectionContext, dist_input: KJTList) -> list[Tensor]:
        return super().compute(ctx, dist_input)

    @torch.no_grad()
    def output_dist(
        self, ctx: EmbeddingCollectionContext, output: list[Tensor]
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return FrozenAwaitable(super().output_dist(ctx, output))

    @torch.no_grad()
    def compute_and_output_dist(
        self, ctx: EmbeddingCollectionContext, input: KJTList
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return FrozenAwaitable(super().compute_and_output_dist(ctx, input))
