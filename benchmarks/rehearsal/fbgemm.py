"""fbgemm's tables on the pretended GPU: its kernels for CPUs, and those that it has for GPUs alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fbgemm_gpu import split_table_batched_embeddings_ops_training as tables
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import Tensor

from mim_torchrec.benchmarks.rehearsal.storages import Storages


@contextmanager
def tables_by_kernels_of_cpus(storages: Storages, watch: Any) -> Iterator[None]:
    """Build tables as those of a CPU, whose rows count as being on the GPU."""
    table = tables.SplitTableBatchedEmbeddingBagsCodegen
    real_init, real_forward = table.__init__, table.forward

    def init(self: Any, embedding_specs: Any, *args: Any, **kwargs: Any) -> None:
        specs = [
            (rows, dim, EmbeddingLocation.HOST, tables.ComputeDevice.CPU) for rows, dim, *_ in embedding_specs
        ]
        real_init(self, specs, *args, **{**kwargs, "device": torch.device("cpu")})
        for tensor in (*self.parameters(), *self.buffers()):
            storages.put(tensor, "cuda")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with watch.on_cpu():
            return real_forward(self, *args, **kwargs)

    with mock.patch.object(table, "__init__", init), mock.patch.object(table, "forward", forward):
        yield


@contextmanager
def missing_kernels(watch: Any) -> Iterator[None]:
    """Give operators that have no kernel for CPUs one, as long as this lasts."""

    def jagged_unique_indices(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with watch.uncounted():
            return _jagged_unique_indices(*tensors)

    library = torch.library.Library("fbgemm", "IMPL")
    library.impl("jagged_unique_indices", jagged_unique_indices, "CPU")
    library.impl("new_unified_tensor", _new_unified_tensor, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _jagged_unique_indices(
    hash_size_cumsum: Tensor, hash_size_offsets: Tensor, offsets: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct indices of every table, in a layout like fbgemm's: any lengths that add up to their number."""
    first_keys, ends = hash_size_offsets.tolist(), offsets.tolist()
    bags = (len(ends) - 1) // (len(first_keys) - 1)
    lengths, reverse = torch.zeros(len(ends) - 1, dtype=offsets.dtype), torch.empty_like(indices)
    distinct: list[Tensor] = []
    known = 0
    for low, high in zip(first_keys, first_keys[1:], strict=False):
        if low == high:
            continue
        own = slice(ends[low * bags], ends[high * bags])
        found, inverse = torch.unique(indices[own], return_inverse=True)
        distinct.append(found)
        reverse[own] = inverse + known
        known += found.numel()
        count = (high - low) * bags
        each = torch.full((count,), found.numel() // count, dtype=offsets.dtype)
        each[: found.numel() % count] += 1
        lengths[low * bags : high * bags] = each
    new_offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return lengths, new_offsets, torch.cat(distinct), reverse


def _new_unified_tensor(like: Tensor, sizes: list[int], _: bool) -> Tensor:
    return like.new_empty(sizes)
