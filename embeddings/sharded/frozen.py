"""Frozen multi-modal embeddings inside a TorchRec model (§3.5): looked up like any others, never trained.

``FrozenEmbeddingCollection`` (unpooled) and ``FrozenEmbeddingBagCollection`` (pooled) are used as TorchRec's
``EmbeddingCollection`` and ``EmbeddingBagCollection`` are, and are of types of their own, so that planner
constraints and sharders apply to them apart from trainable tables. Their rows are neither parameters nor
buffers: no optimizer, no gradient, no data-parallel wrapper and no broadcast ever sees them.

This module holds what both have in one process, sharded or not: tables, their state, and what a checkpoint
holds. ``lookup.py`` checks rows and forms outputs, ``sharded.py`` divides the rows over ranks, ``load.py``
fills them, and ``live.py`` changes them.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from mim_torchrec.embeddings.sharded import traced
from mim_torchrec.embeddings.sharded.lookup import check_pooling, check_rows, jagged, keyed, pool
from mim_torchrec.embeddings.sharded.rows import DenseRows, RowStore, make_rows
from mim_torchrec.embeddings.table.format import Table, TableError, VersionMismatch

log = logging.getLogger(__name__)

DATA_TYPES = {
    "float32": DataType.FP32,
    "float16": DataType.FP16,
    "bfloat16": DataType.BF16,
    "int8": DataType.INT8,
    "int4": DataType.INT4,
}


@dataclass(frozen=True)
class TableState:
    """Which vectors rows hold: ``table_version`` (None before loading) and the last window applied."""

    table_version: str | None = None
    seq: int = 0


@dataclass
class FrozenTable:
    """What a process has of one table: rows ``first_row`` and following, in ``store``."""

    config: BaseEmbeddingConfig
    first_row: int
    store: RowStore
    state: TableState
    expected: TableState | None = None  # of a checkpoint that was loaded before the rows
    lifted: list[Tensor] | None = None  # the rows, while they are an argument of a graph (``traced.py``)

    @property
    def dtype(self) -> str:
        return self.store.dtype

    @property
    def bag_config(self) -> EmbeddingBagConfig:
        """The config of a table whose vectors are pooled."""
        assert isinstance(self.config, EmbeddingBagConfig)
        return self.config


def frozen_config(table: Table, feature_names: Sequence[str], name: str = "mm") -> EmbeddingConfig:
    """Return the embedding config of a table on disk, for a :class:`FrozenEmbeddingCollection`.

    Args:
        table: the table; row 0, for unknown items, and its spare rows are added to its rows. A table whose
            rows are kept by number has no such row 0.
        feature_names: keys of the features that are looked up in it.
        name: the embedding table's name in the model.
    """
    return EmbeddingConfig(
        name=name,
        num_embeddings=table.manifest.num_embeddings,
        embedding_dim=table.manifest.dim,
        feature_names=list(feature_names),
        data_type=DATA_TYPES[table.manifest.dtype],
    )


def frozen_bag_config(
    table: Table,
    feature_names: Sequence[str],
    name: str = "mm",
    pooling: PoolingType = PoolingType.SUM,
) -> EmbeddingBagConfig:
    """Return the embedding config of a table on disk, for a :class:`FrozenEmbeddingBagCollection`."""
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=table.manifest.num_embeddings,
        embedding_dim=table.manifest.dim,
        feature_names=list(feature_names),
        data_type=DATA_TYPES[table.manifest.dtype],
        pooling=pooling,
    )


def storage_dtype(config: BaseEmbeddingConfig) -> str:
    """Return how rows of a table with this config are stored, a key of ``quantize.DTYPES``.

    Raises:
        ValueError: its data type is none of FP32, FP16, BF16, INT8 and INT4.
    """
    found = {data_type: name for name, data_type in DATA_TYPES.items()}.get(config.data_type)
    if found is None:
        names = ", ".join(data_type.name for data_type in DATA_TYPES.values())
        raise ValueError(f"frozen table {config.name}: data type {config.data_type} is none of {names}")
    return found


class FrozenModule(nn.Module):
    """A module with frozen tables: their rows in this process, and their share of a checkpoint.

    ``state_dict`` holds ``(table_version, seq)`` of every table as extra state; with ``store_rows`` also the
    rows, as ``<prefix>.<table>.weight``. A checkpoint of other vectors than the loaded ones is refused.
    """

    _prefix: str

    def init_frozen(self, tables: Sequence[FrozenTable], store_rows: bool) -> None:
        self._frozen = {table.config.name: table for table in tables}
        self.store_rows = store_rows

    def frozen_tables(self) -> dict[str, FrozenTable]:
        """Return what this process has of each table, by name."""
        return self._frozen

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "torch.jit.script cannot compile a frozen collection; use torch.export, or script the module "
            "that torch.fx.symbolic_trace returns"
        )

    def reset_parameters(self) -> None:
        """Do nothing: the rows come from a table on disk."""

    def get_extra_state(self) -> str:
        states = {name: [t.state.table_version, t.state.seq] for name, t in self._frozen.items()}
        return json.dumps(states)

    def set_extra_state(self, state: str) -> None:
        """Take the states of a checkpoint.

        Raises:
            TableError: it has other tables.
            VersionMismatch: the rows are of another version than the checkpoint.
        """
        states = {name: TableState(*pair) for name, pair in json.loads(state).items()}
        if set(states) != set(self._frozen):
            raise TableError(f"the checkpoint has frozen tables {sorted(states)}, not {sorted(self._frozen)}")
        for name, table in self._frozen.items():
            if self.store_rows:
                table.state = states[name]
            elif table.state.table_version is None:
                table.expected = states[name]
            else:
                check_state(name, table.state, states[name])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.store_rows:
            for name, table in self._frozen.items():
                destination[f"{prefix}{self._prefix}.{name}.weight"] = self._rows_to_save(table)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if self.store_rows:
            for name, table in self._frozen.items():
                key = f"{prefix}{self._prefix}.{name}.weight"
                if key in state_dict:
                    self._restore(table, state_dict.pop(key))
                elif strict:
                    missing_keys.append(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _rows_to_save(self, table: FrozenTable) -> Tensor | ShardedTensor:
        return whole_rows(table)

    def _restore(self, table: FrozenTable, saved: Tensor | ShardedTensor) -> None:
        if isinstance(saved, ShardedTensor):
            shards = saved.local_shards()
            saved = shards[0].tensor if shards else torch.empty(0, table.store.stored_width)
        else:
            saved = saved[table.first_row : table.first_row + table.store.num_rows]
        own = whole_rows(table)
        if own.data_ptr() != saved.data_ptr():
            own.copy_(saved)


class FrozenEmbeddingCollection(FrozenModule, EmbeddingCollection):
    """Unpooled embeddings that are never trained; zeros until ``load_table`` has filled them.

    Args:
        tables: one config a table, FP32, FP16, BF16, INT8 or INT4 (row-wise), of one ``embedding_dim``; see
            :func:`frozen_config`.
        device: "meta" for a model that will be sharded (no memory is used), or where an unsharded one lives.
        need_indices: as in ``EmbeddingCollection``.
        output_dtype: of the vectors that come out.
        store_rows: whether checkpoints hold the rows, or only which rows they were.

    Its forward maps a ``KeyedJaggedTensor`` of rows to a ``JaggedTensor`` of vectors (num_ids, dim) for each
    feature. Row 0 is the zero vector. Raises IndexError for a row that the table does not have.

    >>> config = EmbeddingConfig(name="mm", num_embeddings=9, embedding_dim=4, feature_names=["item"])
    >>> module = FrozenEmbeddingCollection([config], device="cpu")
    >>> ids = KeyedJaggedTensor(["item"], torch.tensor([3, 0, 3]), lengths=torch.tensor([2, 1]))
    >>> module(ids)["item"].values().shape, list(module.parameters())
    (torch.Size([3, 4]), [])
    """

    _prefix = "embeddings"

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | str = "meta",
        need_indices: bool = False,
        output_dtype: torch.dtype = torch.float32,
        store_rows: bool = False,
    ) -> None:
        # The shapes that TorchRec makes of the configs are never used, whatever their type is.
        shapes = [replace(config, data_type=DataType.FP32) for config in tables]
        super().__init__(tables=shapes, device=torch.device("meta"), need_indices=need_indices)
        self.embeddings = nn.ModuleDict()
        self._embedding_configs = tables
        self._device = torch.device(device)
        self.output_dtype = output_dtype
        self.init_frozen([_whole_table(config, self._device) for config in tables], store_rows)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        if traced.is_traced(features):
            tables, names = list(self._frozen.values()), self.embedding_names_by_table()
            return traced.unpooled(tables, names, features, self._need_indices, self.output_dtype)
        by_feature = features.to_dict()
        found = {}
        for (table, names), keys in zip(
            zip(self._frozen.values(), self.embedding_names_by_table(), strict=True),
            (config.feature_names for config in self._embedding_configs),
            strict=True,
        ):
            for key, name in zip(keys, names, strict=True):
                rows = by_feature[key].values().long()
                check_rows(rows, table.config)
                vectors = table.store.vectors(rows).to(self.output_dtype)
                found[name] = jagged(vectors, by_feature[key], self._need_indices)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenEmbeddingCollection":
        _move(self, fn)
        return super()._apply(fn, recurse)


class FrozenEmbeddingBagCollection(FrozenModule, EmbeddingBagCollection):
    """Pooled embeddings that are never trained; zeros until ``load_table`` has filled them.

    Args:
        tables: one config a table, FP32, FP16, BF16, INT8 or INT4 (row-wise); see :func:`frozen_bag_config`.
        is_weighted: whether the features' weights weight their vectors; the weights get gradients.
        device: "meta" for a model that will be sharded, or where an unsharded one lives.
        store_rows: whether checkpoints hold the rows, or only which rows they were.
        output_dtype: of the pooled vectors that come out; they are summed in float32.

    Its forward maps a ``KeyedJaggedTensor`` of rows to a ``KeyedTensor`` (batch_size, sum of dims). An empty
    bag is the zero vector.

    Raises:
        ValueError: a weighted mean, which TorchRec does not have either.
    """

    _prefix = "embedding_bags"

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str = "meta",
        store_rows: bool = False,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        shapes = [replace(config, data_type=DataType.FP32) for config in tables]
        super().__init__(tables=shapes, is_weighted=is_weighted, device=torch.device("meta"))
        check_pooling(tables, is_weighted)
        self.embedding_bags = nn.ModuleDict()
        self._embedding_bag_configs = tables
        self._device = torch.device(device)
        self.output_dtype = output_dtype
        self.init_frozen([_whole_table(config, self._device) for config in tables], store_rows)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        if traced.is_traced(features):
            return traced.pooled(list(self._frozen.values()), features, self._is_weighted)
        by_feature = features.to_dict()
        pooled = []
        for table in self._frozen.values():
            for key in table.config.feature_names:
                bags = by_feature[key]
                rows = bags.values().long()
                check_rows(rows, table.config)
                vectors, index = table.store.vectors(rows), torch.arange(rows.numel(), device=rows.device)
                pooled.append(pool(vectors, index, bags, table.bag_config, self.is_weighted()))
        return keyed(pooled, self._embedding_bag_configs, self.output_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenEmbeddingBagCollection":
        _move(self, fn)
        return super()._apply(fn, recurse)


def check_state(name: str, found: TableState, expected: TableState) -> None:
    """Compare the rows of a table with a checkpoint's.

    Raises:
        VersionMismatch: they are vectors of another encoder.
    """
    if found.table_version != expected.table_version:
        raise VersionMismatch(
            f"frozen table {name}: its rows are of table_version {found.table_version}, the checkpoint was "
            f"trained on {expected.table_version}; load that table"
        )
    if found.seq < expected.seq:
        log.warning("frozen table %s: the checkpoint had seen windows up to %d, the rows have those up to %d",
                    name, expected.seq, found.seq)  # fmt: skip


def whole_rows(table: FrozenTable) -> Tensor:
    """Return this process's rows of a table as one tensor (num_rows, stored_width), not a copy.

    Raises:
        TableError: they are memory-mapped, in many pieces.
    """
    if not isinstance(table.store, DenseRows):
        raise TableError(
            f"frozen table {table.config.name}: rows in {type(table.store).__name__} are not stored in "
            f"checkpoints; use store_rows=False"
        )
    return table.store.tensor


def _whole_table(config: BaseEmbeddingConfig, device: torch.device) -> FrozenTable:
    kernel = EmbeddingComputeKernel.FUSED.value
    store = make_rows(storage_dtype(config), config.num_embeddings, config.embedding_dim, device, kernel, 0.0)
    return FrozenTable(config, 0, store, TableState())


def _move(module: FrozenModule, fn: Any) -> None:
    """Let ``.to(device)`` move rows; nothing changes how they are stored."""
    for table in module.frozen_tables().values():
        if isinstance(table.store, DenseRows):
            table.store.move(fn(torch.empty(0, device=table.store.device)).device)


def iterate_frozen(model: nn.Module) -> Iterator[FrozenModule]:
    """Yield the frozen collections of a model, sharded or not."""
    for module in model.modules():
        if isinstance(module, FrozenModule):
            yield module
