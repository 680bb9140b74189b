"""Lookups of a frozen table beside `index_select`, and the bandwidth that they reach, by type and by memory.

    python -m mim_torchrec.benchmarks.gpu.lookups --out runs/gpu/lookups

From the KeyedJaggedTensor in to the vectors out, through DistributedModelParallel, in the stored type (int8
as float32), over `index_select` of the stored bytes in memory of the device. `gib_per_s` counts the stored
bytes of the rows looked up, repeated ones too, and the bytes of the vectors.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import CacheParams, ShardingPlan

from mim_torchrec import program
from mim_torchrec.benchmarks.gpu.clock import seconds_each
from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.benchmarks.speed.frozen_model import TABLE, Lookup, Sizes, content_config, make_batch
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.sharded.sharder import KERNELS, FrozenEmbeddingCollectionSharder, Memory
from mim_torchrec.embeddings.table.format import row_bytes
from mim_torchrec.embeddings.table.quantize import encode, is_quantized
from mim_torchrec.errors import check_sizes
from mim_torchrec.training.distributed import distributed

CHUNK = 1 << 18
DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class LookupsConfig:
    """Time lookups on the device that there is, and write a report."""

    out: Path = Path("runs/gpu/lookups")
    """Directory of report.json."""
    rows: int = 10_000_000
    """Rows of the table."""
    dim: int = 128
    """Size of a vector."""
    requests: int = 1024
    """Requests of a batch."""
    behaviors: int = 100
    """Behaviors of a request, on average."""
    load_factor: float = 0.2
    """Rows of the cache per row, of a table behind one."""
    rounds: int = 50
    """Lookups that are timed."""
    warmup: int = 5
    """Lookups before those."""

    @property
    def sizes(self) -> Sizes:
        """Of the table and of the batches."""
        return Sizes(rows=self.rows, dim=self.dim, requests=self.requests, behaviors=self.behaviors,
                     rounds=self.rounds)  # fmt: skip


@torch.no_grad()
def sharded(
    config: LookupsConfig, dtype: str, memory: Memory, device: torch.device
) -> DistributedModelParallel:
    """A frozen table of random rows in one kind of memory."""
    table = content_config(config.sizes, dtype)
    out = torch.float32 if is_quantized(dtype) else getattr(torch, dtype)
    module, sharder = FrozenEmbeddingCollection([table], output_dtype=out), FrozenEmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        module, {TABLE: row_wise(compute_kernel=KERNELS[memory].value)}, sharder=sharder,
        local_size=1, device_type=device.type,
    )  # fmt: skip
    if memory == "uvm_caching":
        plan[TABLE].cache_params = CacheParams(load_factor=config.load_factor)
    model = DistributedModelParallel(
        Lookup(module), device=device, plan=ShardingPlan({"content": plan}), sharders=[sharder]
    )
    store = find_frozen(model, TABLE)[1].store
    generator = torch.Generator().manual_seed(0)
    some = encode(torch.randn(CHUNK, config.dim, generator=generator), dtype)
    for start in range(0, store.num_rows, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, store.num_rows))
        store.write(rows.to(device), some[: len(rows)].to(device))
    return model


def measure(config: LookupsConfig, dtype: str, memory: Memory, device: torch.device) -> dict[str, float]:
    """Rows per second of a table, and of `index_select` on rows of as many bytes."""
    model = sharded(config, dtype, memory, device)
    batches = [make_batch(config.sizes, seed).to(device) for seed in range(4)]
    with torch.no_grad():
        seconds = seconds_each(lambda turn: model(batches[turn % 4]), config.rounds, config.warmup)
    wide = row_bytes(dtype, config.dim)
    plain = torch.zeros(config.rows, wide, dtype=torch.uint8, device=device)
    values = [batch.values() for batch in batches]
    of_select = seconds_each(
        lambda turn: plain.index_select(0, values[turn % 4]), config.rounds, config.warmup
    )
    count = sum(map(len, values)) / len(values)
    out = 4 if is_quantized(dtype) else wide // config.dim
    return {
        "rows_per_s": count / seconds,
        "index_select_rows_per_s": count / of_select,
        "vs_index_select": of_select / seconds,
        "gib_per_s": count * (wide + out * config.dim) / seconds / 2**30,
        "index_select_gib_per_s": 2 * count * wide / of_select / 2**30,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.gpu.lookups`."""
    config = tyro.cli(LookupsConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "rounds", "requests", "behaviors", "dim")
    check_sizes(config, 2, "rows")
    report: dict[str, Any] = {"memory": {}, "config": dataclasses.asdict(config)}
    with distributed(0) as context:
        report |= {"device": str(context.device), **environment()}
        config.out.mkdir(parents=True, exist_ok=True)
        kinds: tuple[Memory, ...] = ("device", "uvm", "uvm_caching")
        for memory in kinds if context.device.type == "cuda" else kinds[:1]:
            for dtype in DTYPES:
                found = measure(config, dtype, memory, context.device)
                report["memory"].setdefault(memory, {})[dtype] = found
                write_json(config.out / "report.json", report)
                print(f"{memory:12} {dtype:9} {found['rows_per_s'] / 1e6:9.1f} million rows/s, "
                      f"{found['vs_index_select']:.2f} of index_select, {found['gib_per_s']:.1f} GiB/s",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    program.run(main)
