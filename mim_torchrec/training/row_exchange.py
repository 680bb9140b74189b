"""Rows of arrays to the rank that owns them: what exact metrics and scans are divided over ranks by.

Rows that belong together, equal ids or neighboring numbers, come to one rank, which computes on them as a
single process would. No rank holds the rows of all.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from mim_torchrec.training.distributed import DistributedContext

SAMPLES = 256
"""Numbers of each rank, for each rank, from which the borders of their ranges are chosen."""
MIX = np.uint64(0x9E3779B97F4A7C15)


def owners_by_id(ids: np.ndarray, world_size: int) -> np.ndarray:
    """(n,) rank of each id (n,) int64; ids in a row come to different ranks."""
    mixed = ids.view(np.uint64) * MIX
    return ((mixed >> np.uint64(32)) % np.uint64(world_size)).astype(np.int64)


def owners_by_range(numbers: np.ndarray, context: DistributedContext) -> np.ndarray:
    """(n,) rank of each number (n,): lower ranks own smaller ones, equal ones have one owner.

    Ranges hold about equally many of the numbers of all ranks. Every rank calls it.
    """
    if context.world_size == 1:
        return np.zeros(len(numbers), np.int64)
    count = SAMPLES * context.world_size
    ascending = np.sort(numbers)
    at = np.linspace(0, len(ascending) - 1, min(count, len(ascending))).astype(np.int64)
    sample = ascending[at]
    share = len(numbers) / max(len(sample), 1)  # numbers that each one of the sample stands for
    every = context.all_gather_objects((sample, share))
    known = np.concatenate([numbers for numbers, _ in every])
    weight = np.concatenate([np.full(len(numbers), share) for numbers, share in every])
    order = np.argsort(known, kind="stable")
    known, below = known[order], np.cumsum(weight[order])
    if not len(known):
        return np.zeros(0, np.int64)
    wanted = below[-1] * np.arange(1, context.world_size) / context.world_size
    borders = known[np.searchsorted(below, wanted).clip(max=len(known) - 1)]
    return np.searchsorted(borders, numbers, side="left").astype(np.int64)


def exchange_rows(
    columns: Mapping[str, np.ndarray], owners: np.ndarray, context: DistributedContext
) -> dict[str, np.ndarray]:
    """Give every row to its owner.

    Args:
        columns: (n,) each, with the same names and types on every rank.
        owners: (n,) rank of each row.
        context: the process group; every rank calls it.

    Returns:
        The rows that this rank owns, by the rank that they come from, and in the order they had there.
    """
    if context.world_size == 1:
        return dict(columns)
    order = np.argsort(owners, kind="stable")
    sent = np.bincount(owners, minlength=context.world_size).tolist()
    received = [counts[context.rank] for counts in context.all_gather_objects(sent)]
    found = {}
    for name, values in columns.items():
        width = values.dtype.itemsize
        data = torch.from_numpy(np.ascontiguousarray(values[order]).view(np.uint8))
        into = torch.empty(sum(received) * width, dtype=torch.uint8)
        dist.all_to_all_single(into, data, [n * width for n in received], [n * width for n in sent])
        found[name] = into.numpy().view(values.dtype)
    return found
