"""What would bound a step on one H100 and on eight, estimated without one: `make roofline`.

An estimate, not a measurement. Operations are counted on the CPU (`measures/flops.py`), bytes are those that
lookups move (`measures/lookups.py`), launches are the budgets of the rehearsal. Every figure of the hardware
is an assumption that a flag changes: the arithmetic and bandwidth are NVIDIA's for an H100 SXM (FP32 without
tensor cores, HBM3, NVLink in one direction), the time that the host spends on an operator is a guess.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.gpu.contrast import PRODUCTS
from mim_torchrec.benchmarks.harness.pages import Section, write_pages
from mim_torchrec.benchmarks.measures.flops import count_flops
from mim_torchrec.benchmarks.measures.lookups import HALF, table_bytes
from mim_torchrec.benchmarks.measures.training_steps import (
    StepSizes,
    make_batch,
    random_table,
    training_step,
)
from mim_torchrec.benchmarks.rehearsal.budgets import BUDGETS
from mim_torchrec.benchmarks.rehearsal.steps import CASES, Case, config_of
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.errors import check_sizes
from mim_torchrec.training.distributed import DistributedContext, distributed

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class RooflineConfig(StepSizes):
    """Estimate what bounds training steps on H100s, and write a report."""

    out: Path = Path("runs/roofline")
    """Directory of the report and of a table of random vectors."""
    candidates: int = 4
    """Candidates of a request."""
    dim: int = 64
    """Size of the ID embeddings."""
    gpus: int = 8
    """GPUs of the second estimate; each has a batch of its own."""
    tflops: float = 67.0
    """10^12 operations per second of a GPU."""
    tb_per_s: float = 3.35
    """10^12 bytes per second of its memory."""
    link_gb_per_s: float = 450.0
    """10^9 bytes per second that it sends to the others."""
    operator_us: float = 8.0
    """Microseconds of the host for an operator."""


def exchanged_bytes(case: Case, lookups: int, config: RooflineConfig) -> float:
    """Bytes that a rank sends in a step: rows to the others, and gradients of trained ones."""
    of_others = (config.gpus - 1) / config.gpus
    trained = lookups * 2 * config.dim * FLOAT
    frozen = 0 if case.preset is None else lookups * config.mm_dim * HALF
    return of_others * (trained + frozen)


def estimate(case: Case, config: RooflineConfig, context: DistributedContext) -> dict[str, Any]:
    """Microseconds that each resource would take for a step, on one GPU and on several."""
    settings = config_of(case, config.out, embedding_dim=config.dim)
    table = None if case.preset is None else open_table(config.out / "table")
    mm = None if table is None else frozen_config(table, ["candidate_mm", "behavior_mm"])
    plain = build_model(settings, config.rows, mm, torch.device("meta"))
    trained = [*plain.request_embeddings.embedding_bag_configs(), *plain.item_embeddings.embedding_configs()]
    model, optimizer = shard(plain, settings, context)
    if table is not None:
        load_table(model, table)
    batch = make_batch(config, config.candidates, 0, table is not None, settings)
    step = training_step(model, optimizer, settings, context)
    step(batch)
    flops = count_flops(lambda: step(batch))
    moved = table_bytes(trained, batch.sparse, FLOAT, trained=True)
    if mm is not None:
        moved += table_bytes([mm], batch.sparse, HALF, trained=False)
    lookups = sum(batch.sparse[f"{role}_item_id"].values().numel() for role in ("candidate", "behavior"))
    several = BUDGETS.get(f"{case.name} 2 ranks")
    of_one = {
        "host": BUDGETS[case.name].launches * config.operator_us,
        "arithmetic": flops / config.tflops / 1e6,
        "memory": moved / config.tb_per_s / 1e6,
    }
    of_all = None if several is None else {
        "host": several.launches * config.operator_us,
        "arithmetic": of_one["arithmetic"],
        "memory": of_one["memory"],
        "links": exchanged_bytes(case, lookups, config) / config.link_gb_per_s / 1e3,
    }  # fmt: skip
    return {"gflops": flops / 1e9, "mib": moved / 2**20, "one": of_one, "several": of_all}


def contrast(config: RooflineConfig, queries: int = 1024, items: int = 901_120) -> dict[str, float]:
    """Microseconds of C-SFT's loss at the size of the paper: its vectors are read once for every product."""
    flops = PRODUCTS * queries * items * config.mm_dim
    moved = PRODUCTS / 2 * items * config.mm_dim * FLOAT
    return {"arithmetic": flops / config.tflops / 1e6, "memory": moved / config.tb_per_s / 1e6}


def bound(times: dict[str, float]) -> str:
    """The resource that takes longest, and how many times the next one.

    >>> bound({"host": 900.0, "arithmetic": 90.0, "memory": 30.0})
    'host, 10 times arithmetic'
    """
    (first, longest), (second, next_one) = sorted(times.items(), key=lambda one: -one[1])[:2]
    return f"{first}, {longest / next_one:,.0f} times {second}"


def sections(config: RooflineConfig, report: dict[str, Any]) -> list[Section]:
    """The tables of the page."""
    tables = []
    for key, heading in (("one", "One H100"), ("several", f"Each of {config.gpus} H100s")):
        known = {name: found for name, found in report["models"].items() if found[key] is not None}
        kinds = list(next(iter(known.values()))[key])
        tables.append(Section(
            f"{heading}, {config.batch_size:,} candidates: estimated microseconds of a step",
            columns=["model", *kinds, "bound by", "candidates/s at best"],
            rows=[[name, *(f"{found[key][kind]:.1f}" for kind in kinds), bound(found[key]),
                   f"{config.batch_size / max(found[key].values()) * 1e6:,.0f}"]
                  for name, found in known.items()],
        ))  # fmt: skip
    loss = report["contrast"]
    tables.append(Section(
        "The loss of C-SFT, 1,024 queries and 901,120 items, one H100",
        text=[f"{loss['arithmetic'] / 1e3:.1f} ms of arithmetic, {loss['memory'] / 1e3:.2f} ms of memory: "
              f"bound by {bound(loss)}."],
    ))  # fmt: skip
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.gpu.roofline`."""
    config = tyro.cli(RooflineConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "batch_size", "candidates")
    check_sizes(config, 2, "gpus")
    config.out.mkdir(parents=True, exist_ok=True)
    random_table(config)
    report: dict[str, Any] = {"models": {}, "contrast": contrast(config)}
    with distributed(0) as context:
        for case in CASES:
            if case.ranks == 1:
                report["models"][case.name] = estimate(case, config, context)
    report["config"] = dataclasses.asdict(config)
    summary = "An estimate: operations and bytes were counted, launches rehearsed, speeds assumed."
    write_pages(report, "What would bound a step on H100s", summary, sections(config, report), {}, config.out)
    print((config.out / "report.md").read_text())


if __name__ == "__main__":
    program.run(main)
