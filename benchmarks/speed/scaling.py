"""How a training step grows with history, batch, frozen table and ranks: `make bench-scaling`.

What is measured: steps of Base (SIM) and of MIM, of one rank and of two, in turns, and what a step takes in
memory beyond what lies there between steps. The frozen table of the largest size lies on the disk as int8 and
is mapped. What is simulated, by TorchRec's planner and without a GPU: where the tables of the paper would lie
on up to 100 GPUs, and of how many bytes each of them would be.
"""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.drawing import to_png
from mim_torchrec.benchmarks.harness.launching import launch
from mim_torchrec.benchmarks.harness.pages import write_pages
from mim_torchrec.benchmarks.measures.memory import private_bytes
from mim_torchrec.benchmarks.measures.peak_memory import estimated
from mim_torchrec.benchmarks.measures.training_steps import ready_on
from mim_torchrec.benchmarks.speed.ctr_throughput import (
    StepSizes,
    in_turns,
    make_batch,
    our_config,
    training_step,
)
from mim_torchrec.benchmarks.speed.frozen_table import write_scale_table
from mim_torchrec.benchmarks.speed.scaling_pages import AXES, IMAGE, scaling, sections
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.embeddings.plan import GIB, PlanConfig, simulate
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.table.quantize import row_bytes
from mim_torchrec.errors import check_sizes
from mim_torchrec.training.distributed import DistributedContext, distributed

UBM, FEATURES = "sim", ["candidate_mm", "behavior_mm"]
ROWS_TIME_TARGET, ROWS_MEMORY_TARGET = 1.5, 0.25


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Measure how steps grow, simulate a cluster, and write a report."""

    out: Path = Path("runs/scaling")
    """Directory of the report and of the tables."""
    histories: tuple[int, ...] = (50, 100, 200, 500, 1000)
    """Longest history; lengths are drawn evenly up to it."""
    batches: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Candidates in a step of a rank."""
    table_rows: tuple[int, ...] = (1_000_000, 10_000_000, 50_000_000)
    """Rows of the frozen table, int8 on the disk, mapped."""
    ranks: tuple[int, ...] = (1, 2)
    """Ranks that all of it is measured on; the batch of each stays the same."""
    batch_size: int = 512
    """Candidates in a step of a rank, where the batch does not change."""
    max_behaviors: int = 100
    """Longest history, where it does not change."""
    candidates: int = 4
    """Candidates of a request."""
    dim: int = 64
    """Size of an embedding; an item is two, of its id and of its category."""
    mm_dim: int = 128
    """Size of a multi-modal vector."""
    rounds: int = 7
    """Timed rounds; in each, every size takes one step."""
    simulated_items: tuple[int, ...] = (35_000_000, 1_170_000_000, 1_420_000_000)
    """Items of the simulated tables: TAOBAO-MM's, 300 GB in fp16, and all items that the paper names."""
    simulated_gpus: tuple[int, ...] = (4, 8, 16, 32, 64, 100)
    """GPUs of the simulated clusters, four in a machine."""
    hbm_gb: float = 32.0
    """Memory of a simulated GPU, in GiB; the paper's CTR models were trained on V100s."""
    keep_tables: bool = False
    """Leave the tables in the directory of the report."""

    def sizes(self, **changed: int) -> StepSizes:
        """Sizes of the model and of its batches."""
        known: dict[str, Any] = {"batch_size": self.batch_size, "max_behaviors": self.max_behaviors}
        return StepSizes(out=self.out, mm_dim=self.mm_dim, batches=2, **known | changed)


@dataclass(frozen=True)
class Point:
    """A step that is measured.

    Args:
        axis: what changes.
        value: its value.
        mim: whether it is MIM, not Base.
        sizes: of the model and its batches.
        table: directory of the frozen table.
    """

    axis: str
    value: int
    mim: bool
    sizes: StepSizes
    table: Path


def points(config: ScalingConfig) -> list[Point]:
    """Everything that is measured."""
    small = table_path(config, min(config.table_rows))
    found = []
    for mim in (False, True):
        found += [Point("history", n, mim, config.sizes(max_behaviors=n), small) for n in config.histories]
    for mim in (False, True):
        found += [Point("batch", n, mim, config.sizes(batch_size=n), small) for n in config.batches]
    sizes = config.sizes()
    return found + [Point("table_rows", n, True, sizes, table_path(config, n)) for n in config.table_rows]


def table_path(config: ScalingConfig, rows: int) -> Path:
    """Where the frozen table of so many rows lies."""
    return config.out / "tables" / str(rows)


def batch_of(point: Point, candidates: int, seed: int, num_rows: int) -> RequestBatch:
    """Random requests whose items have vectors anywhere in the frozen table, rows 1 to `num_rows`."""
    batch = make_batch(point.sizes, candidates, seed, mm=point.mim)
    if not point.mim:
        return batch
    sparse = batch.sparse
    own = sum(sparse[name].values().numel() for name in FEATURES)  # the last two features
    rows = torch.from_numpy(np.random.default_rng((seed, num_rows)).integers(1, num_rows + 1, own))
    values = torch.cat([sparse.values()[:-own], rows])
    return replace(batch, sparse=KeyedJaggedTensor(sparse.keys(), values, lengths=sparse.lengths()))


def make_step(
    point: Point, config: ScalingConfig, context: DistributedContext
) -> tuple[Callable[[int], Any], int]:
    """The step, called with the number of the round, and private bytes that loading the table took."""
    settings = our_config(point.sizes, UBM, config.dim, point.mim)
    table = open_table(point.table) if point.mim else None
    mm = frozen_config(table, FEATURES) if table is not None else None
    built = build_model(settings, point.sizes.rows, mm, torch.device("meta"))
    model, optimizer = shard(built, settings, context)
    before, num_rows = private_bytes(), 0
    if table is not None:
        num_rows = load_table(model, table, mapped=context.device.type == "cpu").total_rows - 1
    loaded = private_bytes() - before
    step = training_step(model, optimizer, settings, context)
    seeds = [context.rank + context.world_size * k for k in range(point.sizes.batches)]
    batches = (batch_of(point, config.candidates, seed, num_rows) for seed in seeds)
    ready = ready_on(context.device, batches)
    return lambda k: step(ready[k % len(ready)]), loaded


def measure_points(config: ScalingConfig) -> list[dict[str, float]]:
    """Figures of this rank for all points, in their order; those of one axis take turns."""
    torch.set_num_threads(1)
    found = []
    with distributed(0) as context:
        for axis in AXES:
            made = [make_step(point, config, context) for point in points(config) if point.axis == axis]
            seconds = in_turns([step for step, _ in made], config.rounds, 2, clock=time.perf_counter)
            found += [
                {"step_ms": 1000 * statistics.median(times), "table_private_mb": loaded / 1e6,
                 "step_mb": estimated(partial(step, 0), iter(())) / 1e6}
                for times, (step, loaded) in zip(seconds, made, strict=True)
            ]  # fmt: skip
    return found


def measure_ranks(config: ScalingConfig, world_size: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by axis, value and model; the slowest and the fullest rank counts."""
    each = launch(world_size, measure_points, config, keep=True)
    found: dict[str, dict[str, dict[str, Any]]] = {axis: {} for axis in AXES}
    for point, of_ranks in zip(points(config), zip(*each, strict=True), strict=True):
        figures = {name: max(rank[name] for rank in of_ranks) for name in of_ranks[0]}
        if point.axis == "table_rows":
            figures["table_gb"] = point.value * row_bytes("int8", config.mm_dim) / 1e9
        by_model = found[point.axis].setdefault(str(point.value), {})
        by_model["mim" if point.mim else "base"] = figures
        if "base" in by_model and point.mim:
            by_model["mim_over_base"] = {
                name: figures[name] / by_model["base"][name] for name in ("step_ms", "step_mb")
            }
        print(f"{point.axis} {point.value:,}, {world_size} rank(s), {'MIM' if point.mim else 'Base'}: "
              f"step of {figures['step_ms']:.1f} ms", flush=True)  # fmt: skip
    return found


def exponent(by_value: dict[str, dict[str, Any]], model: str, figure: str) -> float:
    """The power of the value that a figure grows with, by least squares of the logarithms."""
    values = np.log([float(value) for value in by_value])
    return float(np.polyfit(values, np.log([known[model][figure] for known in by_value.values()]), 1)[0])


def simulate_clusters(config: ScalingConfig) -> list[dict[str, Any]]:
    """The planner's choice for every simulated table and cluster; `fits` says whether it goes at all."""
    found = []
    for items in config.simulated_items:
        for gpus in config.simulated_gpus:
            plan = PlanConfig(rows=items, dim=config.mm_dim, dtype="float16", world_size=gpus,
                              local_world_size=min(4, gpus), hbm_gb=config.hbm_gb)  # fmt: skip
            size = items * row_bytes("float16", config.mm_dim) / GIB
            row: dict[str, Any] = {"items": items, "gpus": gpus, "table_gib": size}
            try:
                (placed,) = simulate(plan)
            except ValueError as error:
                row |= {"fits": False, "problem": str(error)}
            else:
                row |= {"fits": True, "sharding": placed.sharding, "kernel": placed.kernel,
                        "hbm_gib": max(placed.hbm) / GIB, "host_gib": max(placed.ddr) / GIB}  # fmt: skip
            found.append(row)
    return found


def measure(config: ScalingConfig) -> dict[str, Any]:
    """Run everything and put the report together."""
    for rows in config.table_rows:
        if not table_path(config, rows).exists():
            write_scale_table(table_path(config, rows), rows, config.mm_dim)
    report: dict[str, Any] = {"measured": {}, "growth": {}}
    for world_size in config.ranks:
        own = report["measured"][str(world_size)] = measure_ranks(config, world_size)
        report["growth"][str(world_size)] = {
            axis: {model: {figure: exponent(own[axis], model, figure) for figure in ("step_ms", "step_mb")}
                   for model in ("base", "mim")}
            for axis in ("history", "batch")
        } | {"table_rows": last_over_first(own["table_rows"])}  # fmt: skip
    if not config.keep_tables:
        shutil.rmtree(config.out / "tables")
    report["simulated"] = simulate_clusters(config)
    report["targets"] = targets(config, report)
    return report


def last_over_first(by_rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Step time with the largest table over that with the smallest, and its share of private memory."""
    first, last = list(by_rows.values())[0]["mim"], list(by_rows.values())[-1]["mim"]
    return {"step_ms": last["step_ms"] / first["step_ms"],
            "private_of_table": last["table_private_mb"] / 1e3 / last["table_gb"]}  # fmt: skip


def targets(config: ScalingConfig, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the figures are to show."""
    found = []
    for ranks, growth in report["growth"].items():
        rows = growth["table_rows"]
        found += [
            target(f"{ranks} rank(s): a step with {max(config.table_rows):,} rows takes at most "
                   f"{ROWS_TIME_TARGET} times one with {min(config.table_rows):,}",
                   rows["step_ms"], rows["step_ms"] <= ROWS_TIME_TARGET),
            target(f"{ranks} rank(s): a mapped table costs at most {ROWS_MEMORY_TARGET:.0%} of its bytes in "
                   "private memory", rows["private_of_table"],
                   rows["private_of_table"] <= ROWS_MEMORY_TARGET),
        ]  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.scaling`."""
    config = tyro.cli(ScalingConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "batch_size", "max_behaviors", "candidates", "dim", "mm_dim", "rounds")
    config.out.mkdir(parents=True, exist_ok=True)
    report = measure(config)
    report["config"] = dataclasses.asdict(config)
    summary = ("Training steps of SIM and of SIM with MIM; ranks compute on one thread each and share the "
               "machine. Memory of a step is estimated from the storages that are alive in it.")  # fmt: skip
    images = {IMAGE: to_png(scaling(report))}
    write_pages(report, "How a step grows", summary, sections(report), images, config.out)


if __name__ == "__main__":
    program.run(main)
