"""Samples per CPU-second of our CTR models beside FuxiCTR's: `make bench-ctr-throughput`.

The same requests, sizes and number of hidden units; whole training steps at one thread, taken in turns, so
that a machine whose speed drifts slows both. Ours are the sharded models that `mim ctr` trains, on one rank.
Batches lie ready: neither side loads data. Beside it what MIM adds to our own SIM, in operations and in time.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks import fuxictr_models
from benchmarks.flops import count_flops
from mim_torchrec import program
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.ctr.task import CTRTask
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.training.comparison import target
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.pages import Section, print_targets, targets_section, write_pages

Step = Callable[[RequestBatch], Any]
MODELS = ("din", "dien", "sim", "twin")
TARGETS = {"din": 2.0, "dien": 1.5, "sim": 1.5, "twin": 1.5}
FLOPS_TARGET, STEP_TIME_TARGET, PAPER_FLOPS = 0.20, 0.25, 0.59
MICROSECONDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Time training steps of our models and of FuxiCTR's, and write a report."""

    out: Path = Path("runs/ctr_throughput")
    """Directory of the report."""
    models: tuple[str, ...] = MODELS
    """Models that are compared."""
    dims: tuple[int, ...] = (16, 64)
    """Sizes of an embedding; an item is two, of its id and of its category."""
    candidates: tuple[int, ...] = (1, 5)
    """Candidates of a history: one is like for like, five is what request logs hold."""
    batch_size: int = 1024
    """Candidates in a step."""
    max_behaviors: int = 50
    """Histories have from 1 to so many behaviors, each number equally often."""
    top_k: int = 20
    """Behaviors that the searches of SIM and TWIN keep."""
    heads: int = 1
    """Attention heads of SIM and TWIN; FuxiCTR's SIM takes one only."""
    attention: int = 64
    """Hidden units of DIN's attention unit, with Dice."""
    tower: tuple[int, ...] = (200, 80)
    """Hidden layers of the tower."""
    users: int = 5000
    """Rows of the table of users."""
    items: int = 10_000
    """Rows of the table of items; small, since FuxiCTR's optimizer visits every row in every step."""
    categories: int = 100
    """Rows of the table of categories."""
    mm_dim: int = 128
    """Size of a multi-modal vector, for what MIM adds."""
    batches: int = 4
    """Different batches, used in turns."""
    rounds: int = 20
    """Timed rounds; in each, every model takes one step."""
    warmup: int = 3
    """Rounds before those."""

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the tables of ids."""
        return {"user_id": self.users, "item_id": self.items, "category": self.categories}


def make_batch(config: ThroughputConfig, candidates: int, seed: int, mm: bool) -> RequestBatch:
    """Random requests with so many candidates each; ids are rows from 1 on."""
    rng = np.random.default_rng(seed)
    count = max(1, round(config.batch_size / candidates))
    histories = rng.integers(1, config.max_behaviors + 1, count)
    histories[0] = config.max_behaviors  # FuxiCTR's SIM and TWIN fail where the longest is shorter than 50
    lengths = {"candidate": np.full(count, candidates), "behavior": histories}
    users = rng.integers(1, config.users, count)
    keys, values, sizes = ["user_id"], [users], [np.ones(count, np.int64)]
    item_ids = {role: rng.integers(1, config.items, sum(n)) for role, n in lengths.items()}
    of_category = {role: 1 + ids % (config.categories - 1) for role, ids in item_ids.items()}
    columns = [("item_id", item_ids), ("category", of_category), *([("mm", item_ids)] if mm else [])]
    for name, of_role in columns:
        for role in ("candidate", "behavior"):
            keys.append(f"{role}_{name}")
            values.append(of_role[role])
            sizes.append(lengths[role])
    now = 365 * 86_400 * MICROSECONDS
    return RequestBatch(
        sparse=KeyedJaggedTensor(keys=keys, values=torch.from_numpy(np.concatenate(values)),
                                 lengths=torch.from_numpy(np.concatenate(sizes).astype(np.int32))),
        labels=torch.from_numpy(rng.integers(2, size=count * candidates).astype(np.float32)),
        request_ids=torch.arange(count),
        request_ts=torch.full((count,), now),
        behavior_ts=torch.from_numpy(now - rng.integers(MICROSECONDS, now, len(item_ids["behavior"]))),
    )  # fmt: skip


def random_table(config: ThroughputConfig) -> Path:
    """A table of random vectors for all items, in fp16."""
    path = config.out / "table"
    if not path.exists():
        writer = TableWriter(path, table_version="random", dim=config.mm_dim, dtype="float16", encoder={})
        ids = torch.arange(1, config.items)
        vectors = torch.randn(len(ids), config.mm_dim, generator=torch.Generator().manual_seed(0))
        writer.write_shard(ids, vectors)
        writer.finish(None)
    return path


def our_config(config: ThroughputConfig, name: str, dim: int, mim: bool = False) -> CTRConfig:
    """What `mim ctr` would be told, to train one of our models at these sizes."""
    return CTRConfig(
        data=config.out, out=config.out, ubm=name, mim="on" if mim else "off", embedding_dim=dim,
        attention=(config.attention,), attention_activation="dice", heads=config.heads, top_k=config.top_k,
        tower=config.tower, lr=1e-3, max_behaviors=config.max_behaviors,
        # FuxiCTR's DIEN has no auxiliary loss; both have SIM's
        aux_weight=0.0 if name == "dien" else 1.0,
    )  # fmt: skip


def training_step(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    settings: CTRConfig,
    context: DistributedContext,
) -> Step:
    """A training step of a sharded model, as the loop takes it."""
    task = CTRTask(model, optimizer, None, None, None, context, settings.aux_weight)
    model.train()

    def step(batch: RequestBatch) -> None:
        optimizer.zero_grad()
        loss, _ = task.training_forward(batch)
        loss.backward()
        optimizer.step()

    return step


def our_step(
    config: ThroughputConfig, name: str, dim: int, context: DistributedContext, mim: bool = False
) -> Step:
    """A training step of one of our models."""
    settings = our_config(config, name, dim, mim)
    table = open_table(random_table(config), None) if mim else None
    mm = frozen_config(table, ["candidate_mm", "behavior_mm"], name="mm") if table is not None else None
    model, optimizer = shard(build_model(settings, config.rows, mm, torch.device("meta")), settings, context)
    if table is not None:
        load_table(model.module.mm_embeddings, table, "mm")
    return training_step(model, optimizer, settings, context)


def in_turns(
    steps: Sequence[Callable[[int], Any]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.process_time,
) -> list[list[float]]:
    """Seconds of each step in each round; who begins changes from round to round.

    Args:
        steps: each called with the number of the round.
        rounds: that are timed.
        warmup: before those.
        clock: what tells the seconds; by default those of the CPU.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for k in range(warmup + rounds):
        order = range(len(steps)) if k % 2 else reversed(range(len(steps)))
        for place in order:
            started = clock()
            steps[place](k)
            if k >= warmup:
                seconds[place].append(clock() - started)
    return seconds


def compare(
    config: ThroughputConfig, name: str, dim: int, candidates: int, context: DistributedContext
) -> dict[str, float]:
    """Samples per CPU-second of both, and the median over the rounds of their ratio."""
    batches = [make_batch(config, candidates, seed, mm=False) for seed in range(config.batches)]
    theirs_batches = [fuxictr_models.to_batch(batch, name) for batch in batches]
    ours = our_step(config, name, dim, context)
    theirs = fuxictr_models.build(name, config.rows, dim, attention=config.attention, top_k=config.top_k,
                                  heads=config.heads, tower=config.tower)  # fmt: skip
    mine, other = in_turns(
        [lambda k: ours(batches[k % len(batches)]),
         lambda k: theirs.train_step(theirs_batches[k % len(batches)])],
        config.rounds, config.warmup,
    )  # fmt: skip
    samples = batches[0].num_candidates
    return {
        "ours": samples / statistics.median(mine),
        "fuxictr": samples / statistics.median(other),
        "ratio": statistics.median(b / a for a, b in zip(mine, other, strict=True)),
    }


def mim_overhead(
    config: ThroughputConfig, dim: int, candidates: int, context: DistributedContext
) -> dict[str, float]:
    """What MIM adds to a training step of our SIM, as fractions of Base."""
    batches = {mim: [make_batch(config, candidates, seed, mm=mim) for seed in range(config.batches)]
               for mim in (False, True)}  # fmt: skip
    steps = {mim: our_step(config, "sim", dim, context, mim) for mim in (False, True)}
    base, with_mim = in_turns(
        [lambda k: steps[False](batches[False][k % config.batches]),
         lambda k: steps[True](batches[True][k % config.batches])],
        config.rounds, config.warmup,
    )  # fmt: skip
    flops = {mim: count_flops(lambda mim=mim: steps[mim](batches[mim][0])) for mim in (False, True)}
    samples = batches[False][0].num_candidates
    return {
        "flops": flops[True] / flops[False] - 1,
        "step_time": statistics.median(b / a for a, b in zip(base, with_mim, strict=True)) - 1,
        "base_gflops_per_sample": flops[False] / samples / 1e9,
        "mim_gflops_per_sample": flops[True] / samples / 1e9,
    }


def measure(config: ThroughputConfig, context: DistributedContext) -> dict[str, Any]:
    """All comparisons, the like-for-like one in `models`."""
    found = {}
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
    for dim, overhead in by_dim.items():
        print(f"MIM over Base, SIM, dim {dim}: operations {overhead['flops']:+.1%}, "
              f"step {overhead['step_time']:+.1%}")  # fmt: skip
    report["mim_overhead"] = by_dim[str(config.dims[-1])] | {"dim": config.dims[-1], "by_dim": by_dim}
    report["targets"] = targets(report)
    return report


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the comparison is to show."""
    overhead = report["mim_overhead"]
    return [
        *(
            target(f"{name}, dim {dim}: at least {TARGETS[name]} times FuxiCTR's samples per CPU-second",
                   figures["ratio"], figures["ratio"] >= TARGETS[name])
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
    """Entry point of `python -m benchmarks.ctr_throughput`."""
    words = {"description": __doc__, "config": (tyro.conf.FlagConversionOff,)}
    config = tyro.cli(ThroughputConfig, args=argv, **words)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with distributed(0) as context:
            report = measure(config, context)
    finally:
        torch.set_num_threads(threads)
    report["config"] = dataclasses.asdict(config)
    summary = (
        f"Samples per CPU-second of a whole training step at one thread: {config.batch_size} candidates, "
        f"histories of 1 to {config.max_behaviors}, tower {'-'.join(map(str, config.tower))}. The ratio is "
        f"the median of {config.rounds} rounds in which both take one step."
    )
    write_pages(report, "CTR training beside FuxiCTR", summary, sections(config, report), {}, config.out)
    print_targets(report["targets"])
    print(f"report: {config.out / 'report.html'}")


if __name__ == "__main__":
    program.run(main)
