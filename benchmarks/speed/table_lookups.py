"""Rows that a frozen table looks up per second, beside `torch.index_select` on the same rows.

All take turns on one thread, in CPU seconds, with caches as a training step leaves them. What is compared:

- `vs_index_select`: from the KeyedJaggedTensor in to the vectors out through DistributedModelParallel, in the
  type that is cheapest (as stored; int8 and int4 as float32), over `index_select` of the stored bytes. Of
  int8 and int4 that compares writing floats with writing bytes.
- `float32_vs_index_select`: the same to float32, over `index_select` and the same conversion.
- `gather_vs_index_select`: the stored rows alone, which is what ranks exchange, over `index_select`.

The speed of copying memory says what no lookup can exceed.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mim_torchrec.benchmarks.speed.frozen_model import (
    Lookup,
    Sizes,
    content_config,
    fill,
    make_batch,
    take_turns,
    wrap,
)
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.sharded.rows import DenseRows, RowStore
from mim_torchrec.embeddings.table.format import decode, row_bytes
from mim_torchrec.embeddings.table.quantize import is_quantized
from mim_torchrec.training.distributed import distributed

CACHE_BYTES = 64 << 20
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}


def measure_lookups(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Rows looked up per second on this rank, by data type, and what plain PyTorch does."""
    torch.set_num_threads(1)
    others = torch.zeros(CACHE_BYTES // 4)  # going through it takes rows and results out of the caches
    with distributed(0) as ranks:
        batch = make_batch(sizes, seed=ranks.rank)
        values = batch.values()
        alone = ranks.world_size == 1
        found = {}
        for name, dtype in DTYPES.items():
            own = torch.float32 if is_quantized(dtype) else getattr(torch, dtype)
            models = {
                "stored": FrozenEmbeddingCollection([content_config(sizes, dtype)], output_dtype=own),
                "float": FrozenEmbeddingCollection([content_config(sizes, dtype)]),
            }
            runs: dict[str, Callable[[], Any]] = {}
            store: RowStore | None = None
            for kind, module in models.items():
                model = wrap(Lookup(module))
                if store is None:
                    fill(model)
                    store = find_frozen(model, "content")[1].store
                find_frozen(model, "content")[1].store = store  # all read the same rows, as warm or cold
                runs[kind] = partial(model, batch)
            if alone:
                assert isinstance(store, DenseRows)  # no table on the disk is mapped here
                runs["gather"] = partial(store.gather, values)
                runs["index_select"] = partial(store.tensor.index_select, 0, values)
                runs["index_select_float"] = partial(decoded, store.tensor, values, dtype)
            clock = time.process_time if alone else time.perf_counter
            seconds = take_turns(runs, sizes.rounds, before=lambda: others.add_(1), clock=clock)
            figures = {"rows_per_s": len(values) / seconds["stored"]}
            figures["float32_rows_per_s"] = len(values) / seconds["float"]
            if alone:
                figures["index_select_rows_per_s"] = len(values) / seconds["index_select"]
                figures["vs_index_select"] = seconds["index_select"] / seconds["stored"]
                figures["float32_vs_index_select"] = seconds["index_select_float"] / seconds["float"]
                figures["gather_vs_index_select"] = seconds["index_select"] / seconds["gather"]
                moved = row_bytes(dtype, sizes.dim) + own.itemsize * sizes.dim
                figures["copy_limit_rows_per_s"] = copy_bandwidth() / moved
            found[name] = figures
        return found


def decoded(rows: Tensor, wanted: Tensor, dtype: str) -> Tensor:
    """Rows by plain `index_select`, as float32."""
    return decode(rows.index_select(0, wanted), dtype)


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of copying 256 MiB of memory; the best of five."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best
