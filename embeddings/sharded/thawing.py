"""Train a frozen table on: the way back from ``freezing.py``."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import Optimizer
from torchrec.distributed.sharding_plan import ParameterShardingGenerator, row_wise
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import DataType

from mim_torchrec.embeddings.collective import gather
from mim_torchrec.embeddings.sharded.frozen import FrozenModule, FrozenTable
from mim_torchrec.embeddings.sharded.site import Plans, Site, find_site, refresh
from mim_torchrec.embeddings.sharded.split import Parts, SplitEmbeddingBags, SplitEmbeddings
from mim_torchrec.embeddings.sharded.trained import (
    Rows,
    check_plan,
    is_bags,
    keys_of,
    options_of,
    reshard,
    rows_of,
    take_modules,
    weight_key,
    whole_type,
)
from mim_torchrec.embeddings.sharded.transfer import Block, transfer
from mim_torchrec.embeddings.table.format import TableError, decode


def thaw_table(
    model: nn.Module,
    name: str,
    optimizer_class: type[Optimizer],
    optimizer_kwargs: dict[str, Any],
    *,
    sharding: ParameterShardingGenerator | None = None,
    data_type: DataType = DataType.FP32,
    optimizer: Optimizer | None = None,
) -> None:
    """Train a frozen table on, from the rows that it has; between two steps, on all ranks together.

    Row numbers stay. Of a table that was imported by ids, row 0 becomes a row like any other.

    Args:
        model: as in :func:`freeze_table`.
        name: likewise.
        optimizer_class: of the table; it steps in the backward pass and has no state at first.
        optimizer_kwargs: its arguments.
        sharding: how it is sharded, see ``torchrec.distributed.sharding_plan``, in a fused kernel; ``None``
            is ``row_wise(compute_kernel="fused")``.
        data_type: of the trained rows.
        optimizer: that the program steps; its wrappers are brought up to date.

    Raises:
        TableError: the model has no such frozen table, it is not loaded, or its collection cannot be changed.
    """
    site = find_site(model, name)
    parts = site.parts()
    frozen = parts.frozen.get(site.table)
    if not isinstance(frozen, FrozenModule):
        raise TableError(f"{name}: is not frozen")
    table = frozen.frozen_tables()[site.table]
    if table.state.table_version is None:
        raise TableError(f"{name}: is frozen and not loaded; load_table comes before thawing")
    bags = frozen._prefix == "embedding_bags"
    rows = table.config.num_embeddings
    configs = [
        replace(config, num_embeddings=rows, data_type=data_type) if config.name == site.table else config
        for config in parts.configs
    ]
    still = {each: module for each, module in parts.frozen.items() if each != site.table}
    new = Parts(configs, parts.keys, None, still)
    whole: Any = whole_type(bags)(
        tables=new.trained_configs(), device=torch.device("meta"), **options_of(parts.trained or frozen)
    )
    plans: Plans = site.frozen_plans(new)
    if site.dmp is None:
        made: nn.Module = _unsharded(parts, whole, table, optimizer_class, optimizer_kwargs)
    else:
        parameter = dict(whole.named_parameters())[weight_key(whole, site.table)]
        _apply_optimizer_in_backward(optimizer_class, [parameter], optimizer_kwargs)
        made, plan = _sharded(site, parts, whole, sharding or row_wise(compute_kernel="fused"))
        _fill(site, rows_of(made, site.table, site.group), table)
        plans["trained"] = plan
    made.train(frozen.training)
    if not still and (not bags or keys_of(made) == parts.keys):
        site.put(made, {"": plans["trained"]} if "trained" in plans else {})
    else:
        new = replace(new, trained=made)
        site.put(SplitEmbeddingBags(new) if bags else SplitEmbeddings(new), plans)
    if optimizer is not None:
        refresh(optimizer)


def _unsharded(
    parts: Parts,
    whole: Any,
    table: FrozenTable,
    optimizer_class: type[Optimizer],
    optimizer_kwargs: dict[str, Any],
) -> nn.Module:
    if parts.trained is not None:
        take_modules(parts.trained, whole)
    modules = whole.embedding_bags if is_bags(whole) else whole.embeddings
    weight = modules[table.config.name].weight
    vectors = torch.cat([decode(block, table.dtype) for block in table.store.blocks()])
    own = nn.Parameter(vectors.to(weight.dtype))
    modules[table.config.name].weight = own
    whole._device = own.device
    _apply_optimizer_in_backward(optimizer_class, [own], optimizer_kwargs)
    return whole


def _sharded(
    site: Site, parts: Parts, whole: Any, sharding: ParameterShardingGenerator
) -> tuple[nn.Module, dict[str, ParameterSharding]]:
    assert site.dmp is not None and site.env is not None
    sharder = site.dmp._sharder_map.get(type(whole))
    if sharder is None:
        raise TableError(f"{site.name}: the model has no sharder of {type(whole).__name__}; give it one")
    old: Any = parts.trained
    plan = {} if old is None else dict(old.module_sharding_plan)
    plan |= site.plan(whole, sharder, sharding)
    check_plan(site.name, plan[site.table])
    return reshard(old, whole, plan, sharder, site.env, site.dmp.device, site.path), plan


def _fill(site: Site, target: Rows, table: FrozenTable) -> None:
    """Give a trained table the rows of a frozen one, from the ranks that have them."""
    rank = site.env.rank if site.env is not None else 0
    own = Block(rank, table.first_row, table.first_row + table.store.num_rows, 0, target.dim)
    held: list[Block] = []
    for block in gather(own, site.group):
        if block.shape[0] and all(block.row != other.row for other in held):
            held.append(block)

    def read(part: Block) -> Tensor:
        rows = torch.arange(part.row - own.row, part.row_stop - own.row, device=site.device)
        return decode(table.store.gather(rows), table.dtype)[:, part.column : part.column_stop]

    transfer(
        held, target.blocks, read, target.write, dtype=torch.float32, device=site.device, group=site.group
    )
