"""Freeze a table that was trained, in the running model, and thaw it again.

TorchRec's answer is a learning rate of 0, which keeps gradients and optimizer state. Here the rows are
written as a table on disk and a frozen collection takes the place of the trained one; if that had several
tables, only the one is split off (``split.py``). The others go on with their rows, optimizer state and
learning rates. Row numbers stay what they are, so features need no other ids. ``thawing.py`` is the way back.

Not here: tables in dense, data-parallel and key-value kernels, managed collisions, feature processors,
two-dimensional parallelism.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.sharding_plan import row_wise
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from mim_torchrec.embeddings.collective import gather
from mim_torchrec.embeddings.sharded.frozen import (
    DATA_TYPES,
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
)
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.sharded.sharder import KERNELS, Memory, frozen_sharders
from mim_torchrec.embeddings.sharded.site import Plans, Site, find_site, forget, refresh
from mim_torchrec.embeddings.sharded.split import Parts, SplitEmbeddingBags, SplitEmbeddings
from mim_torchrec.embeddings.sharded.trained import (
    SHARDED,
    fused_params,
    is_bags,
    local_shards,
    options_of,
    reshard,
    rows_of,
    take_modules,
    weight_key,
    whole_type,
)
from mim_torchrec.embeddings.sharded.writing import write_rows
from mim_torchrec.embeddings.table.format import Table, TableError


@dataclass(frozen=True, kw_only=True)
class FreezeReport:
    """What became of a table.

    Args:
        table_version: of the table on disk.
        rows: of the table, on all ranks.
        optimizer_bytes: of its optimizer state, on all ranks, which is gone.
    """

    table_version: str
    rows: int
    optimizer_bytes: int


def freeze_table(
    model: nn.Module,
    name: str,
    path: str | Path,
    *,
    dtype: str | None = None,
    table_version: str | None = None,
    optimizer: Optimizer | None = None,
    memory: Memory = "device",
    mapped: bool = False,
    store_rows: bool = False,
) -> FreezeReport:
    """Write a trained table to disk and train on with it frozen; between two steps, on all ranks together.

    What the model gives stays the same, to the bit where vectors are not pooled; pooled sums are added up in
    another order. Rows, optimizer state and learning rates of other tables stay. For a moment there is a
    second copy of the other tables of its collection.

    Args:
        model: a ``DistributedModelParallel``, or a model in one process that is not sharded.
        name: path of the collection in the model, and the table, such as "sparse.ebc.item".
        path: directory of the table on disk, the same on all ranks; must not exist. Row r of the model is row
            r of the table, and its id is r.
        dtype: type of the frozen rows; ``None`` is that of the trained ones. "int8" or "float16" save memory,
            and change what the model gives.
        table_version: ``None`` makes one of the rows.
        optimizer: that the program steps. Of a model that is not sharded, the table is dropped from it;
            wrappers (warm-up, clipping) of the model's fused optimizer are brought up to date. Make new
            learning rate schedulers: they number the groups of parameters.
        memory: as in :func:`frozen_constraint`.
        mapped: as in :func:`load_table`.
        store_rows: as in :class:`FrozenEmbeddingCollection`.

    Raises:
        TableError: there is no such table, or it cannot be frozen; the message says what can be. The model is
            as it was, after any error.
        OutputExists: ``path`` exists.
        NonFiniteVector: a row holds NaN or infinity.
    """
    site = find_site(model, name)
    trained = _trained_with(site)
    manifest = write_rows(
        rows_of(trained, site.table, site.group), path, name=name, dtype=dtype, table_version=table_version,
        device=site.device, group=site.group,
    )  # fmt: skip
    table = open_table(path, expected_version=manifest.table_version, group=site.group)
    return use_frozen_table(
        model, name, table, optimizer=optimizer, memory=memory, mapped=mapped, store_rows=store_rows
    )


def use_frozen_table(
    model: nn.Module,
    name: str,
    table: Table,
    *,
    optimizer: Optimizer | None = None,
    memory: Memory = "device",
    mapped: bool = False,
    store_rows: bool = False,
) -> FreezeReport:
    """Put a table on disk into the place of a trained one, as :func:`freeze_table` does.

    So a model is built again whose checkpoint was written after the freezing: call it before or after
    ``DistributedModelParallel``, and load the checkpoint. On the "meta" device rows are left to
    :func:`load_table`.

    Args:
        model: as in :func:`freeze_table`.
        name: likewise.
        table: that :func:`freeze_table` has written, or another one whose rows are kept by number.
        optimizer: likewise.
        memory: likewise.
        mapped: likewise.
        store_rows: likewise.

    Raises:
        TableError: as :func:`freeze_table`; or the table has other rows, or rows by id.
    """
    site = find_site(model, name)
    trained, parts = _trained_with(site), site.parts()
    config = next(config for config in parts.configs if config.name == site.table)
    _check_table(site, config, table)
    frozen, plan = _frozen(site, config, table, memory, store_rows)
    if isinstance(trained, SHARDED) or trained.device.type != "meta":
        load_table(frozen, table, site.table, mapped=mapped)
    optimizer_bytes = sum(gather(_optimizer_bytes(trained, site.table, optimizer), site.group))
    rest = [each for each in parts.trained_configs() if each.name != site.table]
    kept, kept_plans = _remainder(site, trained, rest)
    plans: Plans = site.frozen_plans(parts) | {f"frozen.{site.table}": plan} | kept_plans
    new = Parts(parts.configs, parts.keys, kept, {**parts.frozen, site.table: frozen})
    if len(parts.configs) == 1:
        site.put(frozen, {"": plan})
    else:
        site.put(SplitEmbeddingBags(new) if is_bags(trained) else SplitEmbeddings(new), plans)
    if optimizer is not None:
        if not isinstance(trained, SHARDED):
            forget(optimizer, dict(trained.named_parameters())[weight_key(trained, site.table)])
        refresh(optimizer)
    return FreezeReport(
        table_version=table.manifest.table_version, rows=table.manifest.rows, optimizer_bytes=optimizer_bytes
    )


def _trained_with(site: Site) -> Any:
    """The trained collection that has the table."""
    parts = site.parts()
    if site.table in parts.frozen or parts.trained is None:
        raise TableError(f"{site.name}: is frozen already")
    return parts.trained


def _check_table(site: Site, config: BaseEmbeddingConfig, table: Table) -> None:
    manifest = table.manifest
    if not manifest.by_number:
        raise TableError(
            f"{table.path}: its rows are in the order of ids, those of {site.name} have numbers; write it "
            f"with freeze_table, or import it without --ids"
        )
    if (manifest.rows, manifest.dim) != (config.num_embeddings, config.embedding_dim):
        raise TableError(
            f"{table.path}: has {manifest.rows} rows of dim {manifest.dim}, {site.name} has "
            f"{config.num_embeddings} of {config.embedding_dim}"
        )


def _frozen(
    site: Site, config: Any, table: Table, memory: Memory, store_rows: bool
) -> tuple[FrozenModule, dict[str, ParameterSharding]]:
    """The frozen collection of one table, sharded if the model is."""
    trained = _trained_with(site)
    own = replace(
        config, num_embeddings=table.manifest.num_embeddings, data_type=DATA_TYPES[table.manifest.dtype]
    )
    sharded = isinstance(trained, SHARDED)
    options: dict[str, Any] = {
        **options_of(trained),
        "device": "meta" if sharded else trained.device,
        "store_rows": store_rows,
        "output_dtype": _output_dtype(trained, site.table),
    }
    whole = (FrozenEmbeddingBagCollection if is_bags(trained) else FrozenEmbeddingCollection)(
        [own], **options
    )
    whole.train(trained.training)
    if site.dmp is None or site.env is None:
        return whole, {}
    sharder: Any = next(each for each in frozen_sharders() if each.module_type is type(whole))
    site.dmp._sharder_map.setdefault(type(whole), sharder)
    plan = site.plan(whole, sharder, row_wise(compute_kernel=KERNELS[memory].value))
    made = sharder.shard(whole, plan, site.env, site.dmp.device, f"{site.path}.{site.table}")
    return made.train(trained.training), plan


def _remainder(
    site: Site, trained: Any, configs: list[BaseEmbeddingConfig]
) -> tuple[nn.Module | None, Plans]:
    """The collection of the tables that are still trained."""
    if not configs:
        return None, {}
    whole: Any = whole_type(is_bags(trained))(
        tables=configs, device=torch.device("meta"), **options_of(trained)
    )
    if site.dmp is None or site.env is None:
        take_modules(trained, whole)
        return whole.train(trained.training), {}
    plans = {config.name: trained.module_sharding_plan[config.name] for config in configs}
    sharder = site.dmp._sharder_map[type(whole)]
    made = reshard(trained, whole, plans, sharder, site.env, site.dmp.device, site.path)
    return made, {"trained": plans}


def _output_dtype(trained: Any, table: str) -> torch.dtype:
    if not isinstance(trained, SHARDED):
        return dict(trained.named_parameters())[weight_key(trained, table)].dtype
    found = fused_params(trained, table).get("output_dtype")
    return torch.float32 if found is None else found.as_dtype()


def _optimizer_bytes(trained: Any, table: str, optimizer: Optimizer | None) -> int:
    """Bytes of a table's optimizer state on this rank."""
    key = weight_key(trained, table)
    if isinstance(trained, SHARDED):
        state = trained.fused_optimizer.state_dict()["state"].get(key, {})
        return sum(values.nbytes for each in state.values() for _, values in local_shards(each))
    parameter = dict(trained.named_parameters())[key]
    optimizers = [
        *getattr(parameter, "_in_backward_optimizers", []),
        *([] if optimizer is None else [optimizer]),
    ]
    states = [each.state.get(parameter, {}) for each in optimizers]
    return sum(
        value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor)
    )
