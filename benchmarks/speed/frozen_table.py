"""What a frozen table costs, beside the ways TorchRec users have to freeze one: `make bench-frozen-table`.

Steps of four variants are timed turn by turn in the same processes; memory is that of fresh processes with
one of them. Lookups are timed beside `torch.index_select` on the same rows (`table_lookups.py`). A table that
is five times as large as the memory for it is trained with from an SSD (`table_tiers.py`). At last a table as
large as TAOBAO-MM's is generated, mapped into memory on two ranks and looked up.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.launching import launch
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.memory import peak_private_bytes, private_bytes
from mim_torchrec.benchmarks.speed.frozen_model import (
    VARIANTS,
    Lookup,
    Sizes,
    make_batch,
    measure_memory,
    measure_steps,
    wrap,
)
from mim_torchrec.benchmarks.speed.table_index import (
    IndexSizes,
    index_section,
    index_targets,
    measure_index,
)
from mim_torchrec.benchmarks.speed.table_lookups import measure_lookups
from mim_torchrec.benchmarks.speed.table_tiers import TierSizes, measure_tiers, tiers_section, write_table
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.table.format import TableWriter, decode, encode, row_bytes
from mim_torchrec.embeddings.table.quantize import cosine_errors
from mim_torchrec.errors import check_sizes
from mim_torchrec.training.distributed import distributed


@dataclass(frozen=True, kw_only=True)
class FrozenTableConfig:
    """Measure a frozen table against its alternatives and write a report."""

    out: Path = Path("runs/frozen_table")
    """Directory of the report."""
    rows: int = 500_000
    """Rows of the content table."""
    dim: int = 128
    """Length of a vector."""
    requests: int = 1024
    """Requests in a batch of each rank, one candidate each."""
    behaviors: int = 50
    """Behaviors of a request, on average."""
    rounds: int = 31
    """Turns of which the median is taken."""
    tier_rows: int = 8_000_000
    """Rows of the table on an SSD, float16; 0 leaves it out."""
    tier_steps: int = 6
    """Training steps of a turn with it."""
    tier_turns: int = 9
    """Turns of which the median is taken."""
    scale_rows: int = 35_000_000
    """Rows of the large table; 0 leaves it out."""
    scale_behaviors: int = 1000
    """Behaviors of a request that look it up, on average."""
    scale_steps: int = 5
    """Batches that look it up."""
    index_items: int = 100_000_000
    """Ids of the item index that is measured; 0 leaves it out. It takes 18 bytes an id of memory."""
    keep_scale_table: bool = False
    """Leave the large table (4.9 GB) in the directory of the report."""


def write_scale_table(path: Path, rows: int, dim: int) -> None:
    """Write an int8 table of random vectors, 1 GiB at the most in memory."""
    writer = TableWriter(path, table_version="random", dim=dim, dtype="int8", encoder={"name": "random"})
    generator = torch.Generator().manual_seed(0)
    some = encode(torch.randn(1 << 16, dim, generator=generator), "int8")
    step = 1 << 21
    with Progress(rows, "write", "row", scale=True) as progress:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            which = torch.randint(len(some), (count,), generator=generator)
            writer.write_shard(1_000_000_000 + torch.arange(start, start + count), some[which])
            progress.update(count)
    writer.finish()


def measure_scale(path: Path, config: FrozenTableConfig) -> dict[str, float]:
    """Map a large table, look up large batches, and report this rank's private memory and speed."""
    torch.set_num_threads(1)
    with distributed(0) as ranks, peak_private_bytes() as peak:
        started = time.perf_counter()
        table = open_table(path)
        model = wrap(
            Lookup(
                FrozenEmbeddingCollection(
                    [frozen_config(table, ["candidate", "behavior"], "content")], output_dtype=torch.float16
                )
            )
        )
        report = load_table(model, table, "content", mapped=True)
        loaded = time.perf_counter() - started
        sizes = Sizes(rows=report.total_rows, dim=config.dim, requests=config.requests,
                      behaviors=config.scale_behaviors, rounds=config.scale_steps)  # fmt: skip
        before, looked_up, seconds = private_bytes(), 0, 0.0
        for step in range(config.scale_steps):
            batch = make_batch(sizes, seed=1 + step * ranks.world_size + ranks.rank)
            dist.barrier()
            started = time.perf_counter()
            vectors = model(batch)
            seconds += time.perf_counter() - started
            assert all(bool(v.any()) for v in vectors)
            looked_up += sum(len(v) for v in vectors)
            del vectors
        return {
            "private_gb": peak() / 1e9,
            "private_gb_before_lookups": before / 1e9,
            "load_seconds": loaded,
            "rows": report.total_rows - 1,
            "local_gb": report.bytes / 1e9,
            "rows_per_s": looked_up / seconds,
            "rows_per_batch": looked_up / config.scale_steps,
        }


def scale(config: FrozenTableConfig) -> dict[str, float]:
    """The large table on two ranks."""
    path = config.out / "scale_table"
    if not path.exists():
        write_scale_table(path, config.scale_rows, config.dim)
    ranks = launch(2, measure_scale, path, config)
    if not config.keep_scale_table:
        shutil.rmtree(path)
    return {
        "rows": ranks[0]["rows"],
        "table_gb": sum(rank["local_gb"] for rank in ranks),
        "private_gb": max(rank["private_gb"] for rank in ranks),
        "private_gb_before_lookups": max(rank["private_gb_before_lookups"] for rank in ranks),
        "load_seconds": max(rank["load_seconds"] for rank in ranks),
        "lookup_rows_per_s": sum(rank["rows_per_s"] for rank in ranks),
        "rows_per_batch_of_a_rank": ranks[0]["rows_per_batch"],
    }


def tiers(config: FrozenTableConfig) -> dict[str, Any]:
    """A table on an SSD, on one rank."""
    path = config.out / "tier_table"
    if not path.exists():
        write_table(path, config.tier_rows, config.dim)
    sizes = TierSizes(
        rows=config.tier_rows, dim=config.dim, requests=config.requests, behaviors=config.behaviors,
        steps=config.tier_steps, turns=config.tier_turns,
    )  # fmt: skip
    found = launch(1, measure_tiers, path, sizes, keep=True)[0]
    shutil.rmtree(path)
    return found


def measure(config: FrozenTableConfig) -> dict[str, Any]:
    """Run everything and put the report together."""
    sizes = Sizes(rows=config.rows, dim=config.dim, requests=config.requests, behaviors=config.behaviors,
                  rounds=config.rounds)  # fmt: skip
    step: dict[str, dict[str, dict[str, float]]] = {}
    memory: dict[str, dict[str, dict[str, float]]] = {}
    lookup: dict[str, dict[str, float]] = {}
    for ranks in (1, 2):
        print(f"{ranks} rank(s): steps", flush=True)
        # the slowest rank is what a step takes
        timed = launch(ranks, measure_steps, sizes, keep=True)
        step[str(ranks)] = {
            name: {"seconds": max(each[name]["seconds"] for each in timed)} for name in timed[0]
        }
        memory[str(ranks)] = {}
        for variant in VARIANTS:
            print(f"{ranks} rank(s): memory of {variant}", flush=True)
            found = launch(ranks, measure_memory, sizes, variant)
            memory[str(ranks)][variant] = {key: max(each[key] for each in found) for key in found[0]}
        print(f"{ranks} rank(s): lookups", flush=True)
        for name, figures in launch(ranks, measure_lookups, sizes, keep=True)[0].items():
            lookup.setdefault(name, {}).update(
                figures if ranks == 1 else {"two_ranks_rows_per_s": figures["float32_rows_per_s"]}
            )
    vectors = torch.randn(100_000, config.dim, generator=torch.Generator().manual_seed(0))
    report: dict[str, Any] = {
        "frozen": {
            key: max(memory[ranks]["frozen"][key] for ranks in memory)
            for key in ("optimizer_bytes", "gradient_bytes")
        },
        "step": step,
        "memory": memory,
        "lookup": lookup,
    }
    if config.index_items:
        report["index"] = measure_index(launch, config.out, IndexSizes(items=config.index_items))
    for dtype in ("int8", "int4"):
        errors = cosine_errors(vectors, decode(encode(vectors, dtype), dtype))
        report[dtype] = {
            "mean_cosine_error": float(errors.mean()),
            "bytes_vs_fp16": row_bytes(dtype, config.dim) / row_bytes("float16", config.dim),
        }
    if config.tier_rows:
        print("a table on an SSD", flush=True)
        report["tiers"] = tiers(config)
    if config.scale_rows:
        report["scale"] = scale(config)
    report["targets"] = targets(report)
    return report | {"config": asdict(config)}


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the design asks for, and what was found."""
    step, lookup = report["step"]["1"], report["lookup"]
    found = []

    def ask(claim: str, value: float, met: bool) -> None:
        found.append(target(claim, value, met))

    for key, value in report["frozen"].items():
        ask(f"{key} of the frozen table are 0", value, value == 0)
    for name in ("fp32", "fp16"):
        value = lookup[name]["vs_index_select"]
        ask(f"lookup of {name}, through DMP, at 0.8 of index_select or more", value, value >= 0.8)
    for name in ("fp32", "fp16", "bf16"):
        value = lookup[name]["vs_index_select"]
        ask(f"lookup of {name}, through DMP, at index_select or more", value, value >= 1)
    for name in ("fp16", "bf16", "int8", "int4"):
        value = lookup[name]["gather_vs_index_select"]
        ask(f"stored rows of {name}, without DMP, at 0.95 of index_select or more", value, value >= 0.95)
    for name in ("int8", "int4"):
        value = lookup[name]["float32_vs_index_select"]
        claim = f"lookup of {name}, through DMP, at index_select and the same conversion or more"
        ask(claim, value, value >= 1)
    ratio = step["frozen"]["seconds"] / step["unsharded"]["seconds"]
    ask("a step takes 1.1 of that with an unsharded table or less, one rank", ratio, ratio <= 1.1)
    value = report["int8"]["bytes_vs_fp16"]
    ask("int8 takes 0.54 of the bytes of fp16 or less", value, value <= 0.54)
    value = report["int8"]["mean_cosine_error"]
    ask("mean cosine error of int8 at most 0.001", value, value <= 1e-3)
    if "index" in report:
        found += index_targets(report["index"])
    value = report["int4"]["mean_cosine_error"]
    ask("mean cosine error of int4 at most 0.01", value, value <= 1e-2)
    if "tiers" in report:
        value = report["tiers"]["ssd_vs_memory"]
        ask("training at 0.5 of the speed in memory, 5 times the memory on an SSD", value, value >= 0.5)
    if "scale" in report:
        value = report["scale"]["private_gb"]
        ask("the large table costs 2 GB of private memory a rank or less", value, value <= 2.0)
    return found


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    pages = []
    for ranks, timed in report["step"].items():
        base = timed["unsharded"]["seconds"]
        alone = timed.get("exchange")
        text = (
            [f"The exchange alone, by plain collectives: {1000 * alone['seconds']:.1f} ms."] if alone else []
        )
        pages.append(Section(
            f"{ranks} rank(s)", text=text,
            columns=["variant", "step (ms)", "of unsharded", "peak memory (MB)", "optimizer state (MB)",
                     "gradients (MB)"],
            rows=[[name, f"{1000 * timed[name]['seconds']:.1f}", f"{timed[name]['seconds'] / base:.2f}",
                   *(f"{value / 1e6:.1f}" for value in row.values())]
                  for name, row in report["memory"][ranks].items()],
        ))  # fmt: skip
    millions = ("rows_per_s", "float32_rows_per_s", "copy_limit_rows_per_s", "two_ranks_rows_per_s")
    lookups = [
        {key: f"{value / 1e6:.1f}" if key in millions else f"{value:.2f}" for key, value in row.items()}
        for row in report["lookup"].values()
    ]
    pages.append(Section(
        "Lookups on one rank",
        columns=["type", "million rows/s", "of index_select", "as float32: million rows/s", "of index_select",
                 "stored rows alone, of index_select", "copying memory allows", "two ranks, each"],
        rows=[[name, *(row[key] for key in (
            "rows_per_s", "vs_index_select", "float32_rows_per_s", "float32_vs_index_select",
            "gather_vs_index_select", "copy_limit_rows_per_s", "two_ranks_rows_per_s"))]
            for name, row in zip(report["lookup"], lookups, strict=True)],
    ))  # fmt: skip
    if "index" in report:
        pages.append(index_section(report["index"]))
    if "tiers" in report:
        pages.append(tiers_section(report["tiers"]))
    if "scale" in report:
        s = report["scale"]
        pages.append(Section("A table as large as TAOBAO-MM's", text=[
            f"{s['rows']:,} rows, {s['table_gb']:.1f} GB, mapped by 2 ranks in {s['load_seconds']:.0f} s; "
            f"batches of {s['rows_per_batch_of_a_rank']:,.0f} rows a rank: "
            f"{s['lookup_rows_per_s'] / 1e6:.2f} million rows/s, at the most {s['private_gb']:.2f} GB of "
            f"private memory a rank ({s['private_gb_before_lookups']:.2f} GB before the lookups)."
        ]))  # fmt: skip
    return [*pages, targets_section(report["targets"])]


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.frozen_table`."""
    config = tyro.cli(
        FrozenTableConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    check_sizes(config, 1, "rows", "dim", "requests", "behaviors", "rounds", "scale_behaviors", "scale_steps")
    check_sizes(config, 0, "scale_rows")
    report = measure(config)
    summary = (
        f"{config.rows:,} rows of {config.dim}, {config.requests:,} requests a rank with {config.behaviors} "
        f"behaviors on average; medians of {config.rounds} turns."
    )
    write_pages(report, "A frozen table beside its alternatives", summary, sections(report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
