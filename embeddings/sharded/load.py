"""Fill a frozen table of a model from the table on disk, every rank its own rows; and prove that they stayed.

A failure on one rank (a bad checksum, a NaN in its rows) is raised on all of them, so that no rank is left
waiting.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from mim_torchrec.embeddings.collective import gather, on_all_ranks
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.sharded.frozen import (
    DATA_TYPES,
    FrozenModule,
    FrozenTable,
)
from mim_torchrec.embeddings.sharded.pages import READ_AT_RANDOM, advise
from mim_torchrec.embeddings.sharded.restored import TableState, check_state
from mim_torchrec.embeddings.sharded.rows import CachedRows, DenseRows, MappedRows, RowStore
from mim_torchrec.embeddings.sharded.sharded import ShardedFrozenModule
from mim_torchrec.embeddings.sharded.ssd import SsdRows
from mim_torchrec.embeddings.table.format import Table, TableError, verify_shard


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What this rank loaded: rows ``first_row`` to ``first_row + rows`` of ``total_rows``."""

    table_version: str
    seq: int
    first_row: int
    rows: int
    total_rows: int
    bytes: int
    memory: str
    seconds: float


def open_table(
    path: str | Path | Url, expected_version: str | None = None, group: dist.ProcessGroup | None = None
) -> Table:
    """Open a table on all ranks together: each verifies its share of the checksums.

    Args:
        path: the table's directory or URL, the same on every rank.
        expected_version: as in :meth:`Table.open`.
        group: the ranks; ``None`` is the default group, or this process alone where there is none.

    Raises:
        TableError: as :meth:`Table.open`, on every rank alike.
    """
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)

    def open_and_verify() -> Table:
        table = Table.open(path, expected_version=expected_version, verify=False)
        mine = table.manifest.shards[rank::world_size]
        with Progress(len(mine), "verify", "shard", show=not rank) as bar:
            for info in mine:
                verify_shard(table.path, info)
                bar.update()
        return table

    return on_all_ranks(open_and_verify, group)


def load_table(
    model: nn.Module,
    table: Table,
    name: str = "mm",
    mapped: bool = False,
    cache_bytes: int | None = None,
    whole_on_each_rank: bool = False,
) -> LoadReport:
    """Give the frozen table ``name`` of a model the rows of a table; each rank reads only those it owns.

    Args:
        model: a ``DistributedModelParallel``, or any module that holds a frozen collection, sharded or not;
            the collection itself where several have a table of that name.
        table: the opened table.
        name: the embedding config's name.
        mapped: leave the rows in the page cache, mapped into memory, where they cost no private memory and
            are read when they are looked up; on a CPU only. ``mim table verify`` looks for NaN in them.
        cache_bytes: with ``mapped``, memory of this rank for the rows that were used last, for a table that
            is larger than memory; see ``ssd.py``.
        whole_on_each_rank: that every rank loads the whole table is meant, where there are several ranks and
            the collection is not sharded.

    Raises:
        TableError: the model has no such frozen table, several, or one of another shape or type, or one that
            is not sharded; NaN in a row; rows to be mapped on a GPU; a cache of rows that are not mapped, or
            one too small for any. On every rank if on one.
        VersionMismatch: the model was loaded from a checkpoint that is of other vectors.
    """
    started = time.perf_counter()
    module, frozen = find_frozen(model, name)
    if not isinstance(module, ShardedFrozenModule):
        _check_unsharded(frozen, whole_on_each_rank)

    def load() -> LoadReport:
        config, manifest = frozen.config, table.manifest
        found = (manifest.num_embeddings, manifest.dim, DATA_TYPES[manifest.dtype])
        expected = (config.num_embeddings, config.embedding_dim, config.data_type)
        if found != expected:
            raise TableError(f"{table.path}: has rows, dim, type {found}; the model's {name} has {expected}")
        state = TableState(manifest.table_version, manifest.seq)
        if frozen.expected is not None:
            check_state(name, state, frozen.expected)
        first, store = frozen.first_row, frozen.store
        stop = first + store.num_rows
        if mapped:
            if not (isinstance(store, MappedRows | SsdRows) or _is_on_cpu(store)):
                raise TableError(f"frozen table {name}: only rows on a CPU are mapped; use mapped=False")
            own = Table.open(table.path, verify=False)  # a map of its own: updates stay out of `table`
            spans = [(at - first, rows) for at, rows in own.spans(first, stop)]
            for _, rows in spans:
                advise(rows, READ_AT_RANDOM)
            frozen.store = MappedRows(store.dtype, store.num_rows, store.dim, spans)
            if cache_bytes is not None:
                frozen.store = _behind_a_cache(frozen.store, cache_bytes, name)
        else:
            if cache_bytes is not None:
                raise TableError(f"frozen table {name}: cache_bytes is for mapped rows; use mapped=True")
            if isinstance(store, MappedRows | SsdRows):
                raise TableError(f"frozen table {name}: its rows are mapped; load it with mapped=True")
            dense = store.backing if isinstance(store, CachedRows) else store
            rank = dist.get_rank(group_of(module)) if dist.is_initialized() else 0
            with Progress(store.num_rows, f"load {name}", "row", scale=True, show=not rank) as bar:
                table.rows_for(first, stop, out=cast(DenseRows, dense).tensor, progress=bar.update)
        frozen.store.filled = True
        frozen.state, frozen.expected = state, None
        frozen.items.clear()
        return LoadReport(
            table_version=manifest.table_version,
            seq=state.seq,
            first_row=first,
            rows=store.num_rows,
            total_rows=config.num_embeddings,
            bytes=frozen.store.nbytes,
            memory=type(frozen.store).__name__,
            seconds=time.perf_counter() - started,
        )

    return on_all_ranks(load, group_of(module))


def table_digest(model: nn.Module, name: str = "mm") -> str:
    """Return the SHA-256 over all bytes of a frozen table; equal before and after training.

    It depends on how the rows are divided over ranks, so compare digests of one run.

    Raises:
        TableError: the table has several copies (on nodes or in sharding groups), and they differ.
    """
    module, frozen = find_frozen(model, name)
    digest = hashlib.sha256()
    for rows in frozen.store.blocks():
        digest.update(rows.cpu().view(torch.uint8).numpy().data)
    return digest_of_ranks(digest.hexdigest(), module, name)


def digest_of_ranks(digest: str, module: FrozenModule, name: str) -> str:
    """One digest of those of all ranks that share the rows of a table, of each copy of it alike.

    Raises:
        TableError: copies differ.
    """
    rank, size = 0, 1
    if isinstance(module, ShardedFrozenModule):
        rank, size = module.placements[name].rank, module.placements[name].size
    blocks: list[set[str]] = [set() for _ in range(size)]
    for block, of_rank in gather((rank, digest), group_of(module)):
        blocks[block].add(of_rank)
    for block, found in enumerate(blocks):
        if len(found) > 1:
            raise TableError(
                f"frozen table {name}: its copies differ in block {block} of {size}; ranks applied different "
                f"windows"
            )
    return hashlib.sha256("".join(one for (one,) in blocks).encode()).hexdigest()


def find_frozen(model: nn.Module, name: str) -> tuple[FrozenModule, FrozenTable]:
    """Return the collection of a model that has the frozen table ``name``, and what it has of it.

    Raises:
        TableError: there is none, or several collections have one of that name.
    """
    found = [(place, module) for place, module in iterate_frozen(model) if name in module.frozen_tables()]
    if not found:
        names = [table for _, module in iterate_frozen(model) for table in module.frozen_tables()]
        raise TableError(f"the model has no frozen table {name!r}, it has {names}")
    if len(found) > 1:
        places = " and ".join(place or "the model itself" for place, _ in found)
        raise TableError(
            f"the model has {len(found)} frozen tables {name!r}, in {places}: pass one of these modules as "
            f"the model, or give the tables names of their own"
        )
    module = found[0][1]
    return module, module.frozen_tables()[name]


def iterate_frozen(model: nn.Module) -> Iterator[tuple[str, FrozenModule]]:
    """Yield the frozen collections of a model, sharded or not, with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenModule):
            yield name, module


def group_of(module: FrozenModule) -> dist.ProcessGroup | None:
    """Return all ranks of a sharded collection."""
    return module.env.process_group if isinstance(module, ShardedFrozenModule) else None


def _check_unsharded(frozen: FrozenTable, whole_on_each_rank: bool) -> None:
    name, store = frozen.config.name, frozen.store
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size > 1 and not whole_on_each_rank:
        raise TableError(
            f"frozen table {name} is not sharded, and each of {world_size} ranks would load all of it: pass "
            f"frozen_sharders() among the sharders of DistributedModelParallel and of the planner (a frozen "
            f"collection within a managed-collision module is not sharded), or whole_on_each_rank=True"
        )
    if isinstance(store, DenseRows) and store.device.type == "meta":
        raise TableError(
            f"frozen table {name} is on the meta device and not sharded: shard it with frozen_sharders(), or "
            f"make the collection with device='cpu'"
        )


def _behind_a_cache(rows: MappedRows, cache_bytes: int, name: str) -> SsdRows:
    try:
        return SsdRows(rows, cache_bytes)
    except ValueError as error:
        raise TableError(f"frozen table {name}: {error}") from None


def _is_on_cpu(store: RowStore) -> bool:
    return isinstance(store, DenseRows) and store.device.type == "cpu"
