"""Training with a frozen table that is five times as large as the memory for it, beside one in memory.

DLRM with the dense part of MLPerf's configuration looks up histories of Zipf-distributed ids. Four variants
take turns in one process, each several steps of the same batches: rows in memory, rows on the SSD behind a
cache with the next batch prefetched, the same without prefetch, and the plain memory map.

Nothing limits the page cache of a process without rights to do so. So the table's pages are dropped while
steps are timed, and what of the table is in memory (cache and pages) is counted after each turn: a run in
which that exceeds the limit ends with an error.
"""

import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.benchmarks.harness.pages import Section
from mim_torchrec.benchmarks.measures.page_cache import drop_pages, major_faults, resident_bytes
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, frozen_bag_config
from mim_torchrec.embeddings.sharded.joined import JoinedEmbeddingBags
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table
from mim_torchrec.embeddings.sharded.rows import MappedRows, RowStore
from mim_torchrec.embeddings.sharded.sharder import FrozenEmbeddingBagCollectionSharder
from mim_torchrec.embeddings.sharded.ssd import SsdRows
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.training.distributed import distributed

TABLE = "content"
VARIANTS = ("memory", "ssd", "ssd_without_prefetch", "mapped")
TRAINED = [f"category_{k}" for k in range(8)]
TRAINED_ROWS, DENSE = 10_000, 13
BOTTOM, TOP = [512, 256], [1024, 1024, 512, 256, 1]  # MLPerf's, with the dim as the last of the bottom
FACTOR = 5  # bytes of the table over bytes of memory for it
CACHE = 0.75  # of that memory; the rest is for pages
WARM_UP_IDS = 1 << 19  # looked up at once until the cache is full


@dataclass(frozen=True, kw_only=True)
class TierSizes:
    """Sizes of a table on an SSD and of the batches that look it up."""

    rows: int
    """Rows of the table."""
    dim: int
    """Length of a vector."""
    requests: int
    """Requests of a batch."""
    behaviors: int
    """Behaviors of a request, on average; from none to twice as many."""
    steps: int
    """Steps of a turn."""
    turns: int
    """Turns of which the median is taken."""


@dataclass
class Batch:
    """What DLRM trains on."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor

    @property
    def rows(self) -> Tensor:
        """Rows of the frozen table."""
        return self.sparse_features["history"].values()


def write_table(path: Path, rows: int, dim: int) -> None:
    """Write a float16 table of random vectors."""
    writer = TableWriter(path, table_version="random", dim=dim, dtype="float16", encoder={"name": "random"})
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(1 << 16, dim, generator=generator).half()
    for start in range(0, rows, 1 << 20):
        count = min(1 << 20, rows - start)
        which = torch.randint(len(some), (count,), generator=generator)
        writer.write_shard(torch.arange(start, start + count), some[which])
    writer.finish()


def zipf(count: int, rows: int, generator: torch.Generator) -> Tensor:
    """Rows (count,) of a Zipf distribution of exponent 1; popular rows are not neighbors."""
    rank = (rows - 1) ** torch.rand(count, generator=generator, dtype=torch.float64)
    return 1 + rank.long() * 1_000_003 % (rows - 1)


def make_batch(sizes: TierSizes, generator: torch.Generator) -> Batch:
    """A batch of random requests."""
    lengths = torch.randint(0, 2 * sizes.behaviors + 1, (sizes.requests,), generator=generator)
    trained = torch.randint(0, TRAINED_ROWS, (len(TRAINED) * sizes.requests,), generator=generator)
    history = zipf(int(lengths.sum()), sizes.rows, generator)
    ones = torch.ones(len(TRAINED) * sizes.requests, dtype=torch.int64)
    sparse = KeyedJaggedTensor(
        [*TRAINED, "history"], torch.cat([trained, history]), lengths=torch.cat([ones, lengths])
    )
    dense = torch.randn(sizes.requests, DENSE, generator=generator)
    return Batch(dense, sparse, (torch.rand(sizes.requests, generator=generator) < 0.25).float())


def build(table: Table) -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    """DLRM with trained tables and the frozen one, which is not loaded."""
    torch.manual_seed(0)
    dim = table.manifest.dim
    trained = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name=name, num_embeddings=TRAINED_ROWS, embedding_dim=dim,
                                   feature_names=[name]) for name in TRAINED],
        device=torch.device("meta"),
    )  # fmt: skip
    apply_optimizer_in_backward(RowWiseAdagrad, trained.parameters(), {"lr": 0.02})
    config = frozen_bag_config(table, ["history"], TABLE, PoolingType.MEAN)
    bags = JoinedEmbeddingBags(trained, FrozenEmbeddingBagCollection([config]))
    # DLRM's annotation asks for one collection; it uses the configs and the forward of what it is given.
    dlrm = DLRM(cast(EmbeddingBagCollection, bags), DENSE, [*BOTTOM, dim], TOP,
                dense_device=torch.device("cpu"))  # fmt: skip
    model = DLRMTrain(dlrm)
    sharders = [EmbeddingBagCollectionSharder(), FrozenEmbeddingBagCollectionSharder()]
    fused = EmbeddingComputeKernel.FUSED.value
    place = "model.sparse_arch.embedding_bag_collection"
    ways = (
        {name: table_wise(rank=0, compute_kernel=fused) for name in TRAINED},
        {TABLE: row_wise(compute_kernel=fused)},
    )
    plan = ShardingPlan({
        f"{place}.{k}": construct_module_sharding_plan(
            model.get_submodule(f"{place}.{k}"), ways[k], sharder=cast(ModuleSharder[nn.Module], sharders[k]),
            local_size=1, device_type="cpu",
        )
        for k in range(2)
    })  # fmt: skip
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=cast(list[ModuleSharder[nn.Module]], sharders)
    )
    dense = [p for name, p in sharded.named_parameters() if "sparse_arch" not in name]
    return sharded, torch.optim.Adam(dense)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward and step."""
    loss, _ = model(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@dataclass
class Variant:
    """One way to keep the rows, and what was measured of it."""

    store: RowStore
    prefetch: bool = False
    drop_every: int = 1
    """Steps after which the table's pages are dropped."""
    seconds: list[float] = field(default_factory=list)
    faults: int = 0
    in_memory: int = 0
    """Bytes of the table in memory, at the most: in the cache and in pages."""

    @property
    def cache(self) -> SsdRows | None:
        return self.store if isinstance(self.store, SsdRows) else None

    @property
    def mapped(self) -> list[Tensor]:
        """Rows in files."""
        backing = self.store if self.cache is None else self.cache.backing
        return backing.in_files if isinstance(backing, MappedRows) else []


def load_variants(model: nn.Module, table: Table, limit: int, batch: Batch) -> dict[str, Variant]:
    """The rows of each variant, within ``limit`` bytes of memory but for the first."""

    def load(**options: Any) -> RowStore:
        load_table(model, table, TABLE, **options)
        return find_frozen(model, TABLE)[1].store

    cache = int(CACHE * limit)
    pages = 2 * mmap.PAGESIZE * batch.rows.unique().numel()  # a row lies in one page or in two
    return {
        "memory": Variant(load()),
        "ssd": Variant(load(mapped=True, cache_bytes=cache), prefetch=True),
        "ssd_without_prefetch": Variant(load(mapped=True, cache_bytes=cache)),
        "mapped": Variant(load(mapped=True), drop_every=max(1, limit // pages)),
    }


def run_turn(
    variant: Variant, step: Callable[[Batch], None], batches: Sequence[Batch], drop: Callable[[], None]
) -> float:
    """Train on batches; returns the seconds, with the first prefetch, and pages dropped between steps."""
    store, started = variant.store, time.perf_counter()
    if variant.prefetch:
        store.prefetch(batches[0].rows)
    for k, batch in enumerate(batches):
        if k and k % variant.drop_every == 0:
            drop()
        if variant.prefetch and k + 1 < len(batches):
            store.prefetch(batches[k + 1].rows)
        step(batch)
    return time.perf_counter() - started


def check_memory(name: str, variant: Variant, limit: int) -> None:
    """Count what of the table is in memory.

    Raises:
        RuntimeError: it is more than the limit.
    """
    found = resident_bytes(variant.mapped) + (0 if variant.cache is None else variant.cache.cache_bytes)
    variant.in_memory = max(variant.in_memory, found)
    if name != "memory" and found > limit:
        raise RuntimeError(
            f"{name}: {found / 1e6:.0f} MB of the table are in memory, the limit is {limit / 1e6:.0f} MB; "
            f"take more rows or smaller batches"
        )


def warm_up(cache: SsdRows, rows: int, generator: torch.Generator) -> None:
    """Look up ids until the cache is full."""
    while cache.rows_read < cache.cache_rows:
        cache.gather(zipf(WARM_UP_IDS, rows, generator))


def measure_tiers(path: Path, sizes: TierSizes) -> dict[str, Any]:
    """Train with each variant in turn; in a process of its own.

    Raises:
        RuntimeError: more of the table was in memory than its limit.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    with distributed(0):
        table = Table.open(path, verify=False)
        limit = table.manifest.rows * table.manifest.row_bytes // FACTOR
        model, optimizer = build(table)
        variants = load_variants(model, table, limit, make_batch(sizes, generator))
        drop = partial(
            drop_pages,
            [path / shard.file for shard in table.manifest.shards],
            [rows for variant in variants.values() for rows in variant.mapped]
            + [rows for _, rows in table.spans(0, sizes.rows)],
        )
        caches = {name: variant.cache for name, variant in variants.items() if variant.cache is not None}
        for cache in caches.values():
            warm_up(cache, sizes.rows, generator)
        frozen, step = find_frozen(model, TABLE)[1], partial(train_step, model, optimizer)
        for turn in range(1 + sizes.turns):  # the first is not counted
            if turn == 1:
                for cache in caches.values():
                    cache.hits = cache.misses = cache.rows_read = 0
            batches = [make_batch(sizes, generator) for _ in range(sizes.steps)]
            names = VARIANTS if turn % 2 else VARIANTS[::-1]
            for name in names:
                variant = variants[name]
                frozen.store = variant.store
                drop()
                before = major_faults()
                taken = run_turn(variant, step, batches, drop)
                check_memory(name, variant, limit)
                if turn:
                    variant.seconds.append(taken / sizes.steps)
                    variant.faults += major_faults() - before
        return report_of(variants, table, limit, sizes)


def report_of(variants: dict[str, Variant], table: Table, limit: int, sizes: TierSizes) -> dict[str, Any]:
    """The figures of all variants; ratios are medians of those of each turn."""
    base = variants["memory"].seconds
    steps = sizes.turns * sizes.steps
    found: dict[str, Any] = {
        "table_bytes": table.manifest.rows * table.manifest.row_bytes, "limit_bytes": limit,
        "variants": {
            name: {
                "step_seconds": statistics.median(variant.seconds),
                "major_faults_per_step": variant.faults / steps,
                "bytes_in_memory": variant.in_memory,
            }
            for name, variant in variants.items()
        },
    }  # fmt: skip
    for name, variant in variants.items():
        if name != "memory":
            ratios = [one / other for one, other in zip(base, variant.seconds, strict=True)]
            found[f"{name}_vs_memory"] = statistics.median(ratios)
        if (cache := variant.cache) is not None:
            found["variants"][name] |= {
                "hit_rate": cache.hits / (cache.hits + cache.misses),
                "rows_read_per_step": cache.rows_read / steps,
            }
    return found


def tiers_section(report: dict[str, Any]) -> Section:
    """The table of the report."""
    rows = []
    for name, figures in report["variants"].items():
        rows.append([
            name.replace("_", " "), f"{1000 * figures['step_seconds']:.0f}",
            f"{report[f'{name}_vs_memory']:.2f}" if name != "memory" else "1",
            f"{figures['bytes_in_memory'] / 1e6:,.0f}" if name != "memory" else "all",
            f"{figures['major_faults_per_step']:,.0f}",
            f"{figures['rows_read_per_step']:,.0f}" if "rows_read_per_step" in figures else "",
        ])  # fmt: skip
    return Section(
        f"{report['table_bytes'] / 1e9:.1f} GB of rows with {report['limit_bytes'] / 1e9:.1f} GB of memory",
        columns=["rows", "step (ms)", "speed, of memory", "in memory, at most (MB)", "major faults a step",
                 "rows read a step"],
        rows=rows,
    )  # fmt: skip
