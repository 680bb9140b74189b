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
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import BoundsCheckMode
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mim_torchrec.embeddings.sharded import traced
from mim_torchrec.embeddings.sharded.bounds import BoundsCheck, Limits, PendingLimits
from mim_torchrec.embeddings.sharded.configs import DATA_TYPES as DATA_TYPES
from mim_torchrec.embeddings.sharded.configs import as_trained, never_made, storage_dtype
from mim_torchrec.embeddings.sharded.configs import frozen_bag_config as frozen_bag_config
from mim_torchrec.embeddings.sharded.configs import frozen_config as frozen_config
from mim_torchrec.embeddings.sharded.lookup import (
    check_features,
    check_pooling,
    examples_of_bags,
    jagged,
    keyed,
    pool,
)
from mim_torchrec.embeddings.sharded.restored import TableState as TableState
from mim_torchrec.embeddings.sharded.restored import check_restored, check_state, own_rows
from mim_torchrec.embeddings.sharded.rows import DenseRows, RowStore, make_rows
from mim_torchrec.embeddings.sharded.table_items import TableItems
from mim_torchrec.embeddings.table.format import TableError

log = logging.getLogger(__name__)


@dataclass
class FrozenTable:
    """What a process has of one table: rows ``first_row`` and following, in ``store``."""

    config: BaseEmbeddingConfig
    first_row: int
    store: RowStore
    state: TableState
    expected: TableState | None = None  # of a checkpoint that was loaded before the rows
    items: TableItems = field(default_factory=TableItems)
    lifted: list[Tensor] | None = None  # the rows, while they are an argument of a graph (``traced.py``)
    bounds_check: InitVar[BoundsCheckMode] = BoundsCheckMode.FATAL
    bounds: BoundsCheck = field(init=False)

    def __post_init__(self, bounds_check: BoundsCheckMode) -> None:
        self.bounds = BoundsCheck(self.config, bounds_check)

    @property
    def dtype(self) -> str:
        return self.store.dtype

    @property
    def bag_config(self) -> EmbeddingBagConfig:
        """The config of a table whose vectors are pooled."""
        assert isinstance(self.config, EmbeddingBagConfig)
        return self.config

    def check_ranks(self, group: dist.ProcessGroup | None) -> None:
        """Raise TableError on all ranks of a group unless all have applied the same windows; collective."""
        self.items.check_ranks(self.config.name, self.state.table_version, self.state.seq, group)


class FrozenModule(nn.Module):
    """A module with frozen tables: their rows in this process, and their share of a checkpoint.

    ``state_dict`` holds ``(table_version, seq)`` of every table as extra state; with ``store_rows`` also the
    rows, as ``<prefix>.<table>.weight``. A checkpoint of other vectors than the loaded ones is refused.
    """

    _prefix: str

    def init_frozen(self, tables: Sequence[FrozenTable], store_rows: bool) -> None:
        self._frozen = {table.config.name: table for table in tables}
        self._keys = frozenset(key for table in tables for key in table.config.feature_names)
        self.store_rows = store_rows
        self._pending = PendingLimits()
        self._restored: set[str] = set()  # tables whose rows the checkpoint that is being loaded holds

    def frozen_tables(self) -> dict[str, FrozenTable]:
        """Return what this process has of each table, by name."""
        return self._frozen

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "torch.jit.script cannot compile a frozen collection; use torch.export, or script the module "
            "that torch.fx.symbolic_trace returns"
        )

    def settle(self, later: list[Limits]) -> None:
        """Examine the limits of rows on a GPU; in training those that have not arrived are pending."""
        self._pending.settle(later, may_wait=not self.training)

    def train(self, mode: bool = True) -> "FrozenModule":
        if mode != self.training:
            self._pending.settle()
        return super().train(mode)

    def check_filled(self) -> None:
        """Refuse a lookup in a table whose rows nobody has loaded or written: they are all zero.

        Raises:
            TableError: there is one.
        """
        self._pending.settle()
        for name, table in self._frozen.items():
            if not table.store.filled:
                raise TableError(
                    f"frozen table {name} has no rows yet: load_table(model, table, {name!r}) comes before "
                    f"lookups"
                )
            table.items.check(name)

    def reset_parameters(self) -> None:
        """Do nothing: the rows come from a table on disk."""

    def get_extra_state(self) -> str:
        self._pending.settle()
        states: dict[str, list[Any]] = {}
        for name, table in self._frozen.items():
            items = table.items.to_json() if self.store_rows else []
            states[name] = [table.state.table_version, table.state.seq, *items]
        return json.dumps(states)

    def set_extra_state(self, state: str) -> None:
        """Take the states of a checkpoint.

        Raises:
            TableError: it has other tables.
            VersionMismatch: the rows are of another version than the checkpoint.
        """
        found = json.loads(state)
        states = {name: TableState(*parts[:2]) for name, parts in found.items()}
        if set(states) != set(self._frozen):
            raise TableError(f"the checkpoint has frozen tables {sorted(states)}, not {sorted(self._frozen)}")
        for name, table in self._frozen.items():
            if name in self._restored:
                table.state = states[name]
                table.items.load_json(found[name][2:])
            elif table.state.table_version is None:
                table.expected = states[name]
            else:
                check_state(name, table.state, states[name])

    def state_keys(self, prefix: str) -> list[str]:
        """Return the keys of a state dict that this module has, behind ``prefix``."""
        rows = [f"{prefix}{self._prefix}.{name}.weight" for name in self._frozen if self.store_rows]
        return [*rows, f"{prefix}_extra_state"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.store_rows:
            for name, table in self._frozen.items():
                destination[f"{prefix}{self._prefix}.{name}.weight"] = self._rows_to_save(table)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        record, self._restored = f"{prefix}_extra_state", set()
        is_recorded = record in state_dict
        if self.store_rows:
            for name, table in self._frozen.items():
                key = f"{prefix}{self._prefix}.{name}.weight"
                if key in state_dict:
                    self._restore(table, state_dict.pop(key))
                    self._restored.add(name)
                elif strict and is_recorded:
                    missing_keys.append(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict and not is_recorded:
            missing_keys.remove(record)
            log.warning("the checkpoint has no frozen tables at %s, it is of a model without them: tables %s "
                        "stay as they are", prefix.rstrip(".") or "the root", list(self._frozen))  # fmt: skip

    def _rows_to_save(self, table: FrozenTable) -> Tensor | ShardedTensor:
        return whole_rows(table)

    def _restore(self, table: FrozenTable, saved: Tensor | ShardedTensor) -> None:
        own, name, first_row = whole_rows(table), table.config.name, table.first_row
        found = own_rows(saved, own, name=name, first_row=first_row, total=table.config.num_embeddings)
        if own.data_ptr() != found.data_ptr():
            own.copy_(found)
        check_restored(own, table.dtype, name=name, first_row=first_row)
        table.store.filled = True


class FrozenEmbeddingCollection(FrozenModule, EmbeddingCollection):
    """Unpooled embeddings that are never trained; ``load_table`` fills them before the first lookup.

    Args:
        tables: one config a table, FP32, FP16, BF16, INT8 or INT4 (row-wise), of one ``embedding_dim``; see
            :func:`frozen_config`.
        device: "meta" for a model that will be sharded (no memory is used), or where an unsharded one lives.
        need_indices: as in ``EmbeddingCollection``.
        output_dtype: of the vectors that come out.
        store_rows: whether checkpoints hold the rows, or only which rows they were.
        bounds_check: what happens to a row that the table does not have (``bounds.py``); a plan's
            ``bounds_check_mode`` overrides it.

    Its forward maps a ``KeyedJaggedTensor`` of rows to a ``JaggedTensor`` of vectors (num_ids, dim) for each
    feature. Row 0 is the zero vector. Raises IndexError for a row that the table does not have. As in
    TorchRec, batches of variable size per feature are expanded by their inverse indices where the collection
    is sharded, and not where it is not.

    >>> config = EmbeddingConfig(name="mm", num_embeddings=9, embedding_dim=4, feature_names=["item"])
    >>> module = FrozenEmbeddingCollection([config], device="cpu")
    >>> module.frozen_tables()["mm"].store.write(torch.arange(9), torch.randn(9, 4))
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
        bounds_check: BoundsCheckMode = BoundsCheckMode.FATAL,
    ) -> None:
        # The shapes that TorchRec makes of the configs are never used, whatever their type is.
        tables = [as_trained(config) for config in tables]
        shapes = [replace(config, data_type=DataType.FP32) for config in tables]
        super().__init__(tables=shapes, device=torch.device("meta"), need_indices=need_indices)
        self.embeddings = nn.ModuleDict()
        self._embedding_configs = [never_made(config) for config in tables]
        self._device = torch.device(device)
        self.output_dtype = output_dtype
        self.init_frozen([_whole_table(config, self._device, bounds_check) for config in tables], store_rows)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        self.check_filled()
        if traced.is_traced(features):
            return traced.unpooled(
                list(self._frozen.values()), self.embedding_names_by_table(), features,
                self._need_indices, self.output_dtype,
            )  # fmt: skip
        features = maybe_td_to_kjt(features, None)
        check_features(features, self._keys, is_weighted=False)
        by_feature = features.to_dict()
        found = {}
        later: list[Limits] = []
        for table, names in zip(self._frozen.values(), self.embedding_names_by_table(), strict=True):
            for key, name in zip(table.config.feature_names, names, strict=True):
                rows = table.bounds.examine(by_feature[key].values().long(), later)
                vectors = table.store.vectors(rows).to(self.output_dtype)
                found[name] = jagged(vectors, by_feature[key], self._need_indices)
        for limits in later:
            limits.settle()
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenEmbeddingCollection":
        _move(self, fn)
        return super()._apply(fn, recurse)


class FrozenEmbeddingBagCollection(FrozenModule, EmbeddingBagCollection):
    """Pooled embeddings that are never trained; ``load_table`` fills them before the first lookup.

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
        bounds_check: BoundsCheckMode = BoundsCheckMode.FATAL,
    ) -> None:
        tables = [as_trained(config) for config in tables]
        shapes = [replace(config, data_type=DataType.FP32) for config in tables]
        super().__init__(tables=shapes, is_weighted=is_weighted, device=torch.device("meta"))
        check_pooling(tables, is_weighted)
        self.embedding_bags = nn.ModuleDict()
        self._embedding_bag_configs = [never_made(config) for config in tables]
        self._device = torch.device(device)
        self.output_dtype = output_dtype
        self.init_frozen([_whole_table(config, self._device, bounds_check) for config in tables], store_rows)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        self.check_filled()
        if traced.is_traced(features):
            return traced.pooled(list(self._frozen.values()), features, self._is_weighted, self.output_dtype)
        features = maybe_td_to_kjt(features, None)
        check_features(features, self._keys, self._is_weighted)
        inverse = examples_of_bags(features, self._keys)
        by_feature = features.to_dict()
        pooled = []
        later: list[Limits] = []
        for table in self._frozen.values():
            for key in table.config.feature_names:
                bags = by_feature[key]
                rows = table.bounds.examine(bags.values().long(), later)
                vectors, index = table.store.vectors(rows), torch.arange(rows.numel(), device=rows.device)
                pooled.append(pool(vectors, index, bags, table.bag_config, self._is_weighted))
        for limits in later:
            limits.settle()
        return keyed(pooled, self._embedding_bag_configs, self.output_dtype, inverse)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenEmbeddingBagCollection":
        _move(self, fn)
        return super()._apply(fn, recurse)


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


def _whole_table(
    config: BaseEmbeddingConfig, device: torch.device, bounds_check: BoundsCheckMode
) -> FrozenTable:
    kernel = EmbeddingComputeKernel.FUSED.value
    store = make_rows(storage_dtype(config), config.num_embeddings, config.embedding_dim, device, kernel, 0.0)
    return FrozenTable(config, 0, store, TableState(), bounds_check=bounds_check)


def _move(module: FrozenModule, fn: Any) -> None:
    """Let ``.to(device)`` move rows; nothing changes how they are stored. The meta device keeps none."""
    for table in module.frozen_tables().values():
        if isinstance(table.store, DenseRows):
            table.store.move(_device_after(fn, table.store.device))
            if table.store.device.type == "meta":
                table.state, table.items = TableState(), TableItems()


def _device_after(fn: Any, device: torch.device) -> torch.device:
    try:
        moved: Tensor = fn(torch.empty(0, device=device))
    except NotImplementedError:  # `.to()` refuses tensors of the meta device; rows there have no memory
        moved = fn(torch.empty(0))
    return moved.device
