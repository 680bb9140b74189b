"""What Table 6 measures: operations, bytes of lookups, peak memory and time of each row."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mim_torchrec.benchmarks.measures.flops import count_flops
from mim_torchrec.benchmarks.measures.peak_memory import estimated, measured_on_cpu, measured_on_gpu
from mim_torchrec.benchmarks.measures.training_steps import StepSizes, make_batch
from mim_torchrec.benchmarks.measures.turns import in_turns
from mim_torchrec.benchmarks.paper.efficiency.config import EfficiencyConfig
from mim_torchrec.benchmarks.paper.efficiency.models import NAMES, Name, Row, Sizes, covering_batch
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.training.distributed import DistributedContext

GB = 1e9
PHASES = ("train", "inference")


@contextmanager
def built(
    name: Name, sizes: Sizes, batch: RequestBatch, context: DistributedContext, fake: bool = False
) -> Iterator[Row]:
    """A row, given back afterwards, which has taken a training step, so that all of its state is there."""
    row = Row(name, sizes, context, fake)
    row.train(batch)
    yield row
    del row
    gc.collect()


def peak_bytes(row: Row, batch: RequestBatch, training: bool, before: int) -> int:
    """Peak memory of a step without data, and in scoring without what only training needs.

    Args:
        row: has taken a training step.
        batch: of the step.
        training: a training step, or scoring.
        before: bytes that a GPU's allocator had handed out before the row was built.
    """
    run: Callable[[], None] = (lambda: row.train(batch)) if training else (lambda: row.infer(batch))
    if row.device.type != "cuda":
        return estimated(run, row.resident() if training else row.weights())
    others = before + row.data_bytes()
    others += 0 if training else sum(tensor.nbytes for tensor in row.state())
    return measured_on_gpu(run, row.device) - others


def figures(row: Row, batch: RequestBatch, before: int) -> dict[str, dict[str, float]]:
    """GFLOPs and kilobytes of lookups a sample, and gigabytes of memory, of training and of scoring."""
    found = {}
    for phase in PHASES:
        training = phase == "train"
        run = row.train if training else row.infer
        found[phase] = {
            "gflops": count_flops(partial(run, batch)) / batch.num_candidates / 1e9,
            "memory_gb": peak_bytes(row, batch, training, before) / GB,
            "embedding_kb": row.lookup_bytes(batch, training) / batch.num_candidates / 1e3,
        }
    return found


def with_deltas(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Rows with Δ = (A - B) / B of GFLOPs and memory relative to Base, as Table 6 defines it."""
    return {
        name: {
            phase: values | {
                f"{key}_delta": values[full] / rows["base"][phase][full] - 1
                for key, full in (("gflops", "gflops"), ("memory", "memory_gb"))
            }
            for phase, values in phases.items()
        }
        for name, phases in rows.items()
    }  # fmt: skip


def allocated(context: DistributedContext) -> int:
    """Bytes that a GPU's allocator has handed out; 0 on a CPU, where nobody asks."""
    return torch.cuda.memory_allocated(context.device) if context.device.type == "cuda" else 0


def measure_table(config: EfficiencyConfig, context: DistributedContext) -> dict[str, Any]:
    """The rows of the table, and Base and MIM alone at the batch of `make bench-ctr-throughput`."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    fixed: dict[str, dict[str, dict[str, float]]] = {}
    small: dict[str, dict[str, dict[str, float]]] = {}
    foundation = 0.0
    if (
        context.device.type == "cuda"
    ):  # what libraries allocate once for all rows should not be the first row's
        sizes = config.fixed(StepSizes.items)
        with built("base", sizes, make_batch(sizes.ctr, 1, 0, mm=False).to(context.device), context):
            pass
    for name in NAMES:
        batch = covering_batch(config.table.ctr, name != "base").to(context.device)
        before = allocated(context)
        with built(name, config.table, batch, context, fake=context.device.type == "cpu") as row:
            rows[name] = figures(row, batch, before)
            if name == "wo_rc":
                foundation = encoder_gflops(row, batch)
        print(f"{name}: {rows[name]['train']['gflops']:.4f} GFLOPs a sample and "
              f"{rows[name]['train']['memory_gb']:.3f} GB in training", flush=True)  # fmt: skip
    # jointly trained or not, what scores is one model; one that is to be trained has gradients beside it
    rows["e2e"]["inference"] = dict(rows["wo_rc"]["inference"])
    for found, id_rows in ((fixed, config.id_rows), (small, StepSizes.items)):
        for name in ("base", "mim"):
            sizes = config.fixed(id_rows)
            batch = make_batch(sizes.ctr, 1, 0, mm=name == "mim").to(context.device)
            before = allocated(context)
            with built(name, sizes, batch, context) as row:
                found[name] = figures(row, batch, before)
    joint = rows["e2e"]["train"]["gflops"] - (rows["wo_rc"]["train"]["gflops"] - foundation)
    return {
        "rows": with_deltas(rows),
        "foundation_gflops": foundation,
        "e2e_over_forward": joint / foundation,
        "frozen_table_gb": config.id_rows * config.mm_dim * 2 / GB,
        "memory": "measured" if context.device.type == "cuda" else "estimated",
        "fixed": {
            "batch_size": config.batch_size,
            "small_id_rows": StepSizes.items,
            "rows": with_deltas(fixed),
            "rows_small_tables": with_deltas(small),
        },
    }


@torch.no_grad()
def encoder_gflops(row: Row, batch: RequestBatch) -> float:
    """GFLOPs a sample of a forward pass of the foundation models and their fusion."""
    encode = row.model.module.get_submodule("mm_embeddings")
    return count_flops(lambda: encode(batch.sparse)) / batch.num_candidates / 1e9


def validate(config: EfficiencyConfig, context: DistributedContext) -> dict[str, dict[str, Any]]:
    """The estimate beside the allocator of the CPU, for every row at a size that fits."""
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        found[name] = {}
        encodes = name in ("wo_rc", "e2e")
        sizes = config.timed if encodes else config.fixed(StepSizes.items)
        batch = covering_batch(sizes.ctr, True) if encodes else make_batch(sizes.ctr, 1, 0, name == "mim")
        for phase in PHASES:
            if (name, phase) == ("e2e", "inference"):
                continue  # that of w/o RC, see measure_table
            training = phase == "train"
            with built(name, sizes, batch, context, fake=encodes) as row:
                estimate = peak_bytes(row, batch, training, 0)
            measured = handed_out(name, sizes, batch, training, context)
            error = estimate / measured - 1
            found[name][phase] = {"estimated": estimate, "measured": measured, "error": error}
            print(f"estimate, {name}, {phase}: {error:+.2%}", flush=True)
    return found


def handed_out(
    name: Name, sizes: Sizes, batch: RequestBatch, training: bool, context: DistributedContext
) -> int:
    """Peak bytes of the CPU's allocator in a step, without what `peak_bytes` leaves out."""
    others = 0

    def build() -> Callable[[], None]:
        nonlocal others
        row = Row(name, sizes, context)
        row.train(batch)
        others = row.data_bytes() + (0 if training else sum(tensor.nbytes for tensor in row.state()))
        run = row.train if training else row.infer
        return lambda: run(batch)

    return measured_on_cpu(build) - others


def measure_time(config: EfficiencyConfig, context: DistributedContext) -> dict[str, Any]:
    """Samples per second of the four rows, one step of each in turn, and the median ratio to Base."""
    sizes = config.timed
    rows = [Row(name, sizes, context) for name in NAMES]
    batches = [covering_batch(sizes.ctr, name != "base").to(context.device) for name in NAMES]
    found: dict[str, Any] = {name: {} for name in NAMES}

    def synchronized(run: Callable[[RequestBatch], None], batch: RequestBatch) -> None:
        run(batch)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)

    for phase in PHASES:
        runs = [row.train if phase == "train" else row.infer for row in rows]
        steps = [
            lambda _, run=run, batch=batch: synchronized(run, batch)
            for run, batch in zip(runs, batches, strict=True)
        ]
        seconds = in_turns(steps, config.rounds, 1, time.perf_counter)
        for name, own in zip(NAMES, seconds, strict=True):
            found[name][phase] = {
                "samples_per_second": config.time_samples / statistics.median(own),
                "speed_ratio": statistics.median(b / a for a, b in zip(own, seconds[0], strict=True)),
            }
    threads = torch.get_num_threads()
    return {"device": context.device.type, "threads": threads, "rows": found}
