"""Fill a frozen table of a model from the table on disk, every rank its own rows; and prove that they stayed.

A failure on one rank (a bad checksum, a NaN in its rows) is raised on all of them, so that no rank is left
waiting.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from mim_torchrec.embeddings.sharded.frozen import (
    DATA_TYPES,
    FrozenEmbeddingCollection,
    ShardedFrozenEmbeddingCollection,
)
from mim_torchrec.embeddings.table.format import Table, TableError, verify_shard

T = TypeVar("T")
Frozen = FrozenEmbeddingCollection | ShardedFrozenEmbeddingCollection


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What this rank loaded: rows ``first_row`` to ``first_row + rows`` of ``total_rows``."""

    table_version: str
    first_row: int
    rows: int
    total_rows: int
    bytes: int
    seconds: float


def open_table(
    path: str | Path, expected_version: str | None = None, group: dist.ProcessGroup | None = None
) -> Table:
    """Open a table on all ranks together: each verifies its share of the checksums.

    Args:
        path: the table's directory, the same on every rank.
        expected_version: as in :meth:`Table.open`.
        group: the ranks; ``None`` is the default group, or this process alone where there is none.

    Raises:
        TableError: as :meth:`Table.open`, on every rank alike.
    """
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)

    def open_and_verify() -> Table:
        table = Table.open(path, expected_version=expected_version, verify=False)
        for info in table.manifest.shards[rank::world_size]:
            verify_shard(table.path, info)
        return table

    return _together(open_and_verify, group)


def load_table(model: nn.Module, table: Table, name: str = "mm") -> LoadReport:
    """Copy a table's rows into the frozen table ``name`` of a model; each rank reads only the rows it owns.

    Args:
        model: a ``DistributedModelParallel``, or any module that holds a frozen collection, sharded or not.
        table: the opened table.
        name: the embedding config's name.

    Raises:
        TableError: the model has no such frozen table, or one of another shape or type;
            NaN in a row. On every rank if on one.
    """
    started = time.perf_counter()
    module = _find(model, name)

    def load() -> LoadReport:
        config = next(config for config in _configs(module) if config.name == name)
        index, manifest = table.row_index(), table.manifest
        found = (index.num_embeddings, manifest.dim, DATA_TYPES[manifest.dtype])
        expected = (config.num_embeddings, config.embedding_dim, config.data_type)
        if found != expected:
            raise TableError(
                f"{table.path}: has rows + 1, dim, type {found}; the model's {name} has {expected}"
            )
        first, rows = next((first, rows) for each, first, rows in module.local_tables() if each == name)
        rows.copy_(table.rows_for(first, first + rows.shape[0]))
        return LoadReport(
            table_version=manifest.table_version,
            first_row=first,
            rows=rows.shape[0],
            total_rows=index.num_embeddings,
            bytes=rows.nbytes,
            seconds=time.perf_counter() - started,
        )

    return _together(load, _group(module))


def table_digest(model: nn.Module, name: str = "mm") -> str:
    """Return the SHA-256 over all ranks' bytes of a frozen table; equal before and after training.

    It depends on how the rows are divided over ranks, so compare digests of one run.
    """
    module = _find(model, name)
    local = next(rows for each, _, rows in module.local_tables() if each == name)
    digest = hashlib.sha256(local.cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256("".join(_gather(digest, _group(module))).encode()).hexdigest()


def _find(model: nn.Module, name: str) -> Frozen:
    for module in model.modules():
        if isinstance(module, Frozen) and any(config.name == name for config in _configs(module)):
            return module
    raise TableError(f"the model has no frozen table {name!r}")


def _configs(module: Frozen) -> Iterator:
    if isinstance(module, FrozenEmbeddingCollection):
        return iter(module.embedding_configs())
    return iter(module._embedding_configs)


def _group(module: Frozen) -> dist.ProcessGroup | None:
    return None if isinstance(module, FrozenEmbeddingCollection) else module.env.process_group


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    if not dist.is_initialized():
        return [value]
    every: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def _together(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do ``work`` on every rank; if it fails on one, raise that rank's error on all."""
    result, error = None, None
    try:
        result = work()
    except TableError as caught:
        error = caught
    for rank, failed in enumerate(_gather(error, group)):
        if failed is not None:
            raise type(failed)(f"rank {rank}: {failed}") if error is None else error
    return result
