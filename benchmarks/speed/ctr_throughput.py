"""Samples per CPU-second of our CTR models beside FuxiCTR's: `make bench-ctr-throughput`.

The same requests, sizes and number of hidden units; whole training steps at one thread, taken in turns, so
that a machine whose speed drifts slows both. Ours are the sharded models that `mim ctr` trains, on one rank.
Batches lie ready: neither side loads data. Beside it what MIM adds to our own SIM, in operations and in time.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.flops import count_flops
from mim_torchrec.benchmarks.measures.training_steps import (
    Step,
    StepSizes,
    make_batch,
    our_config,
    random_table,
    ready_on,
    training_step,
)
from mim_torchrec.benchmarks.measures.turns import clock_of, in_turns, threads_of_torch
from mim_torchrec.benchmarks.speed import fuxictr_models
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.errors import check_sizes
from mim_torchrec.training.distributed import DistributedContext, distributed

MODELS = ("din", "dien", "sim", "twin")
TARGET = 2.0
FLOPS_TARGET, STEP_TIME_TARGET, PAPER_FLOPS = 0.20, 0.25, 0.59


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(StepSizes):
    """Time training steps of our models and of FuxiCTR's, and write a report."""

    out: Path = Path("runs/ctr_throughput")
    """Directory of the report."""
    models: tuple[str, ...] = MODELS
    """Models that are compared."""
    dims: tuple[int, ...] = (16, 64)
    """Sizes of an embedding; an item is two, of its id and of its category."""
    candidates: tuple[int, ...] = (1, 5)
    """Candidates of a history: one is like for like, five is what request logs hold."""
    rounds: int = 20
    """Timed rounds; in each, every model takes one step."""
    warmup: int = 3
    """Rounds before those."""


def our_step(
    config: ThroughputConfig, name: str, dim: int, context: DistributedContext, mim: bool = False
) -> Step:
    """A training step of one of our models."""
    settings = our_config(config, name, dim, mim)
    table = open_table(random_table(config), None) if mim else None
    mm = frozen_config(table, ["candidate_mm", "behavior_mm"], name="mm") if table is not None else None
    model, optimizer = shard(build_model(settings, config.rows, mm, torch.device("meta")), settings, context)
    if table is not None:
        load_table(model, table, "mm")
    return training_step(model, optimizer, settings, context)


def compare(
    config: ThroughputConfig, name: str, dim: int, candidates: int, context: DistributedContext
) -> dict[str, float]:
    """Samples per CPU-second of both, per second on a GPU, and the median over the rounds of their ratio."""
    batches = [make_batch(config, candidates, seed, mm=False) for seed in range(config.batches)]
    theirs_batches = [fuxictr_models.to_batch(batch, name) for batch in batches]
    samples, ready = batches[0].num_candidates, ready_on(context.device, batches)
    ours = our_step(config, name, dim, context)
    theirs = fuxictr_models.build(name, config.rows, dim, attention=config.attention, top_k=config.top_k,
                                  heads=config.heads, tower=config.tower, device=context.device)  # fmt: skip
    mine, other = in_turns(
        [lambda k: ours(ready[k % len(ready)]),
         lambda k: theirs.train_step(theirs_batches[k % len(theirs_batches)])],
        config.rounds, config.warmup, clock_of(context.device),
    )  # fmt: skip
    return {
        "ours": samples / statistics.median(mine),
        "fuxictr": samples / statistics.median(other),
        "ratio": statistics.median(b / a for a, b in zip(mine, other, strict=True)),
    }


def mim_overhead(
    config: ThroughputConfig, dim: int, candidates: int, context: DistributedContext
) -> dict[str, float]:
    """What MIM adds to a training step of our SIM, as fractions of Base."""
    seeds = range(config.batches)
    batches = {
        mim: ready_on(context.device, (make_batch(config, candidates, seed, mm=mim) for seed in seeds))
        for mim in (False, True)
    }
    steps = {mim: our_step(config, "sim", dim, context, mim) for mim in (False, True)}
    base, with_mim = in_turns(
        [lambda k: steps[False](batches[False][k % config.batches]),
         lambda k: steps[True](batches[True][k % config.batches])],
        config.rounds, config.warmup, clock_of(context.device),
    )  # fmt: skip
    flops = {mim: count_flops(partial(steps[mim], batches[mim][0])) for mim in (False, True)}
    samples = batches[False][0].num_candidates
    return {
        "flops": flops[True] / flops[False] - 1,
        "step_time": statistics.median(b / a for a, b in zip(base, with_mim, strict=True)) - 1,
        "base_gflops_per_sample": flops[False] / samples / 1e9,
        "mim_gflops_per_sample": flops[True] / samples / 1e9,
    }


def measure(config: ThroughputConfig, context: DistributedContext) -> dict[str, Any]:
    """All comparisons, the like-for-like one in `models`."""
    found: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for candidates in config.candidates:
        found[candidates] = {}
        for name in config.models:
            found[candidates][name] = {}
            for dim in config.dims:
                figures = compare(config, name, dim, candidates, context)
                found[candidates][name][str(dim)] = figures
                print(f"{name:5} dim {dim:3} {candidates} candidate(s): ours {figures['ours']:9.0f}  FuxiCTR "
                      f"{figures['fuxictr']:9.0f} samples per CPU-second, ratio {figures['ratio']:.2f}",
                      flush=True)  # fmt: skip
    first, *others = config.candidates
    report: dict[str, Any] = {"candidates": first, "models": found[first]}
    report |= {f"models_{candidates}_candidates": found[candidates] for candidates in others}
    by_dim = {str(dim): mim_overhead(config, dim, first, context) for dim in config.dims}
    for size, overhead in by_dim.items():
        print(f"MIM over Base, SIM, dim {size}: operations {overhead['flops']:+.1%}, "
              f"step {overhead['step_time']:+.1%}")  # fmt: skip
    report["mim_overhead"] = by_dim[str(config.dims[-1])] | {"dim": config.dims[-1], "by_dim": by_dim}
    report["targets"] = targets(report)
    return report


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the comparison is to show."""
    overhead = report["mim_overhead"]
    return [
        *(
            target(f"{name}, dim {dim}: at least {TARGET} times FuxiCTR's samples per CPU-second",
                   figures["ratio"], figures["ratio"] >= TARGET)
            for name, by_dim in report["models"].items() for dim, figures in by_dim.items()
        ),
        target(f"dim {overhead['dim']}: MIM adds at most {FLOPS_TARGET:.0%} of the operations of SIM's step",
               overhead["flops"], overhead["flops"] <= FLOPS_TARGET),
        target(f"dim {overhead['dim']}: MIM adds at most {STEP_TIME_TARGET:.0%} of the time of SIM's step",
               overhead["step_time"], overhead["step_time"] <= STEP_TIME_TARGET),
    ]  # fmt: skip


def sections(config: ThroughputConfig, report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    parts = [(config.candidates[0], report["models"])]
    parts += [(n, report[f"models_{n}_candidates"]) for n in config.candidates[1:]]
    pages = [
        Section(
            f"{candidates} candidate{'s' if candidates > 1 else ''} of a history",
            columns=["model", "dim", "ours", "FuxiCTR", "ratio"],
            rows=[[name, dim, f"{f['ours']:,.0f}", f"{f['fuxictr']:,.0f}", f"{f['ratio']:.2f}"]
                  for name, by_dim in models.items() for dim, f in by_dim.items()],
        )
        for candidates, models in parts
    ]  # fmt: skip
    pages.append(Section(
        "What MIM adds to SIM",
        text=[f"Vectors of {config.mm_dim} from a frozen table in fp16; the paper's form, all interests. The "
              f"paper's training step has {PAPER_FLOPS:+.0%} operations. Sparse products of the packed "
              "attention are counted, lookups are not."],
        columns=["dim", "GFLOPs a sample, Base", "MIM", "operations", "step time"],
        rows=[[dim, f"{o['base_gflops_per_sample']:.6f}", f"{o['mim_gflops_per_sample']:.6f}",
               f"{o['flops']:+.1%}", f"{o['step_time']:+.1%}"]
              for dim, o in report["mim_overhead"]["by_dim"].items()],
    ))  # fmt: skip
    pages.append(Section(
        "What each side does",
        text=[
            "Ours: the model of `mim ctr` under TorchRec's DistributedModelParallel on one rank: ids are "
            "exchanged, tables updated by fused row-wise Adagrad in the backward pass, the dense part by "
            "AdamW, pairs are packed.",
            "FuxiCTR: its class and its `train_step`: histories are padded to the longest of the batch, "
            "gradients clipped, and Adam updates all parameters, every row of the tables in every step. Its "
            "SIM and TWIN attend to the last behaviors a second time; ours add time gaps instead.",
        ],
    ))  # fmt: skip
    pages.append(targets_section(report["targets"]))
    return pages


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.ctr_throughput`."""
    config = tyro.cli(ThroughputConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "rounds")
    check_sizes(config, 0, "warmup")
    with threads_of_torch(1), distributed(0) as context:
        report = measure(config, context)
    report["config"] = dataclasses.asdict(config)
    summary = (
        f"Samples per CPU-second of a whole training step at one thread: {config.batch_size} candidates, "
        f"histories of 1 to {config.max_behaviors}, tower {'-'.join(map(str, config.tower))}. The ratio is "
        f"the median of {config.rounds} rounds in which both take one step."
    )
    write_pages(report, "CTR training beside FuxiCTR", summary, sections(config, report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
