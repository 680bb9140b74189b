"""Training steps of the six models, with and without MIM: time, memory, and what the host does.

    python -m mim_torchrec.benchmarks.gpu.steps --out runs/gpu/steps

The models are those of the rehearsal, at a size that a GPU is worth. Beside the calls that the profiler
counts stand the operators that the rehearsal has counted: an operator may launch several kernels. Under
torchrun, the models that are trained on as many ranks.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.gpu.clock import host_calls, peak_mib, seconds_each
from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.benchmarks.measures.training_steps import (
    StepSizes,
    make_batch,
    random_table,
    ready_on,
    training_step,
)
from mim_torchrec.benchmarks.rehearsal.budgets import BUDGETS
from mim_torchrec.benchmarks.rehearsal.steps import CASES, Case, config_of
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.errors import OptionError, check_sizes
from mim_torchrec.training.distributed import DistributedContext, distributed


@dataclass(frozen=True, kw_only=True)
class StepsConfig(StepSizes):
    """Time training steps on the device that there is, and write a report."""

    out: Path = Path("runs/gpu/steps")
    """Directory of report.json and of a table of random vectors."""
    items: int = 1_000_000
    """Rows of the table of items, and of the multi-modal table."""
    users: int = 1_000_000
    """Rows of the table of users."""
    candidates: int = 4
    """Candidates of a request."""
    dims: tuple[int, ...] = (16, 64)
    """Sizes of the ID embeddings."""
    rounds: int = 50
    """Steps that are timed."""
    warmup: int = 5
    """Steps before those."""
    models: tuple[str, ...] = ()
    """Names of the models, as the rehearsal has them; by default all of this number of ranks."""


def measure(case: Case, dim: int, config: StepsConfig, context: DistributedContext) -> dict[str, Any]:
    """What a step of a model takes on this rank."""
    settings = config_of(case, config.out, embedding_dim=dim)
    table = None if case.preset is None else open_table(config.out / "table")
    mm = None if table is None else frozen_config(table, ["candidate_mm", "behavior_mm"])
    model, optimizer = shard(build_model(settings, config.rows, mm, torch.device("meta")), settings, context)
    if table is not None:
        load_table(model, table)
    seeds = [context.rank + context.world_size * k for k in range(config.batches)]
    batches = [make_batch(config, config.candidates, seed, table is not None, settings) for seed in seeds]
    ready, take = ready_on(context.device, batches), training_step(model, optimizer, settings, context)

    def step(turn: int) -> None:
        take(ready[turn % len(ready)])

    seconds = seconds_each(step, config.rounds, config.warmup)
    samples = ready[0].labels.numel() * context.world_size
    return {
        "ms": 1000 * seconds,
        "samples_per_s": samples / seconds,
        "peak_mib": peak_mib(step, context.device),
        "calls": host_calls(step),
        "rehearsed": dataclasses.asdict(BUDGETS[case.name]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.gpu.steps`."""
    config = tyro.cli(StepsConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "rounds", "batches", "candidates")
    report: dict[str, Any] = {"models": {}, "config": dataclasses.asdict(config)}
    with distributed(0) as context:
        cases = {case.name: case for case in CASES if case.ranks == context.world_size}
        if unknown := sorted(set(config.models) - cases.keys()):
            raise OptionError(f"--models {unknown[0]}: there are {', '.join(cases)}")
        report |= {"device": str(context.device), "ranks": context.world_size, **environment()}
        if context.is_main:
            config.out.mkdir(parents=True, exist_ok=True)
            random_table(config)
        context.barrier()
        for name in config.models or cases:
            for dim in config.dims:
                found = measure(cases[name], dim, config, context)
                report["models"].setdefault(name, {})[str(dim)] = found
                if context.is_main:  # after every model: a run that is cut off keeps what it has
                    write_json(config.out / "report.json", report)
                    print(f"{name:34} dim {dim:3}: {found['ms']:8.2f} ms, {found['samples_per_s']:10,.0f} "
                          f"samples/s, {found['calls']}", flush=True)  # fmt: skip


if __name__ == "__main__":
    program.run(main)
