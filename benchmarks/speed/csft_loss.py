"""What the loss of C-SFT costs at the size of ST-NSG, and how exact it is: `make bench-csft-loss`.

Memory and time are those of `MultiLevelInfoNCE` with one level and its full queue in a fresh process. Where
the whole matrix of logits still fits, the same loss written with it is timed turn by turn beside ours, once
with the items of a queue and once with a gradient for every item. Gradients are compared with those of a loop
over queries in double precision, and with open_clip's.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.memory import peak_private_bytes, private_bytes
from mim_torchrec.benchmarks.measures.turns import seconds_by_name
from mim_torchrec.errors import check_sizes
from mim_torchrec.losses.contrast import Level, contrast
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE
from mim_torchrec.losses.tiled import CPU_TILE

MIB = 2**20
ITEMS_IN_ALL = 100_000_000  # ids are drawn from so many, so that a few of a query's negatives are masked


@dataclass(frozen=True, kw_only=True)
class CSFTLossConfig:
    """Measure the loss and write a report."""

    out: Path = Path("runs/csft_loss")
    """Directory of the report."""
    queries: int = 1024
    """Queries of a batch (N)."""
    dim: int = 128
    """Size of the vectors."""
    queue_batches: int = 439
    """Batches in the queue (k); with 1,024 queries and their hard negatives 901,120 items in all."""
    steps: int = 3
    """Steps at that size, of which the fastest counts."""
    naive_items: int = 65_536
    """Items where the naive loss is timed; its matrix of logits has so many columns."""
    rounds: int = 5
    """Turns of both, of which the fastest of each counts."""
    loop_queries: int = 64
    """Queries of the loop in double precision."""


def draw(rows: int, dim: int, seed: int) -> Tensor:
    """Random unit vectors, (rows, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def draw_ids(count: int, seed: int) -> Tensor:
    """Random item ids, (count,)."""
    return torch.randint(ITEMS_IN_ALL, (count,), generator=torch.Generator().manual_seed(seed))


def measure_paper_scale(config: CSFTLossConfig) -> dict[str, Any]:
    """Memory and time of one level's loss and gradients with a full queue."""
    torch.set_num_threads(1)
    count = config.queries
    loss = MultiLevelInfoNCE(alpha=0.0, beta=0.0, queue_batches=config.queue_batches)
    queue = loss.queue
    assert queue is not None  # `main` refuses 0 batches
    for step in range(config.queue_batches):
        queue.push([draw(2 * count, config.dim, step)], draw_ids(2 * count, step))
    query = draw(count, config.dim, -1).requires_grad_()
    items = draw(2 * count, config.dim, -2).requires_grad_()
    ids, own = draw_ids(2 * count, -1), draw_ids(count, -2)
    before, seconds = private_bytes(), []
    with peak_private_bytes() as peak:
        for _ in range(config.steps):
            query.grad = items.grad = None
            started = time.perf_counter()
            total, report = loss(query, items, items, items, ids, own)
            total.backward()
            seconds.append(time.perf_counter() - started)
        extra = peak() - before
    num_items = 2 * count * (config.queue_batches + 1)
    queued = queue.vectors("mm")
    assert queued is not None  # it is full
    return {
        "extra_mib": extra / MIB,
        "seconds": min(seconds),
        "queries": count,
        "items": num_items,
        "negatives": float(report["negatives"]),
        "queue_mib": queued.nbytes / MIB,
        "logits_mib": count * num_items * 4 / MIB,
    }


def naive(query: Tensor, items: Tensor, ids: Tensor, own: Tensor, scale: Tensor) -> Tensor:
    """Eq. 5 with cosine similarity by way of the matrix of logits."""
    count = len(query)
    logits = scale * F.normalize(query, dim=1) @ items.T
    left_out = (ids[:count, None] == ids) | (own[:, None] == ids)
    left_out[torch.arange(count), torch.arange(count)] = False
    return F.cross_entropy(logits.masked_fill_(left_out, -torch.inf), torch.arange(count))


def ours(
    query: Tensor, items: Tensor, queue: Tensor | None, ids: Tensor, own: Tensor, scale: Tensor
) -> Tensor:
    """The same loss by tiles; what is not in the queue gets a gradient."""
    level = Level(F.normalize(query, dim=1), items, queue)
    split = len(items)
    return contrast(
        [level], ids[:split], scale, own_ids=own, queue_ids=None if queue is None else ids[split:]
    )[0].loss


def measure_naive(config: CSFTLossConfig) -> dict[str, float]:
    """Time beside the naive loss, with items of a queue and with a gradient for all items."""
    torch.set_num_threads(1)
    count, num_items = config.queries, config.naive_items
    query, items = draw(count, config.dim, 0), draw(num_items, config.dim, 1)
    ids, own = draw_ids(num_items, 2), draw_ids(count, 3)
    figures: dict[str, float] = {}
    for name, trained in {"": 2 * count, "_all_gradients": num_items}.items():

        def inputs(trained: int = trained) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
            queue = items[trained:] if trained < num_items else None
            scale = torch.tensor(1 / 0.07, requires_grad=True)
            return query.clone().requires_grad_(), items[:trained].clone().requires_grad_(), queue, scale

        def tiled() -> None:
            q, k, queue, scale = inputs()
            ours(q, k, queue, ids, own, scale).backward()

        def whole() -> None:
            q, k, queue, scale = inputs()
            naive(q, k if queue is None else torch.cat([k, queue]), ids, own, scale).backward()

        # the best turn is the one that others on the machine disturbed least
        turns = seconds_by_name({"tiled": tiled, "naive": whole}, config.rounds)
        seconds = {key: min(values) for key, values in turns.items()}
        figures[f"time_ratio{name}"] = seconds["tiled"] / seconds["naive"]
        figures |= {f"{key}_seconds{name}": value for key, value in seconds.items()}
    return figures


def loop_gradients(
    query: Tensor, items: Tensor, ids: Tensor, own: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of Eq. 5 with respect to queries, items and scale in double precision, query by query."""
    of_all = [torch.zeros_like(x, dtype=torch.float64) for x in (query, items, scale)]
    items, scale = items.double().requires_grad_(), scale.detach().double().requires_grad_()
    for i in range(len(query)):
        one = query[i].detach().double().requires_grad_()
        counts = (ids != ids[i]) & (ids != own[i])
        counts[i] = True
        scores = scale * (items @ (one / one.norm()))
        loss = -torch.log(scores[i].exp() / scores[counts].exp().sum()) / len(query)
        of_query, of_items, of_scale = torch.autograd.grad(loss, (one, items, scale))
        of_all[0][i] = of_query
        of_all[1] += of_items
        of_all[2] += of_scale
    return tuple(of_all)


def measure_gradients(config: CSFTLossConfig) -> float:
    """Largest relative error (Euclidean norms) of the gradients of queries, items and scale."""
    num_items = config.naive_items
    query = draw(config.loop_queries, config.dim, 4).requires_grad_()
    items = draw(num_items, config.dim, 5).requires_grad_()
    ids = torch.randint(num_items // 4, (num_items,), generator=torch.Generator().manual_seed(6))
    own = ids.roll(9)[: config.loop_queries]
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    inputs = (query, items, scale)
    found = torch.autograd.grad(ours(query, items, None, ids, own, scale), inputs)
    expected = loop_gradients(query.detach(), items.detach(), ids, own, scale)
    return max(
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    )


def measure_open_clip(config: CSFTLossConfig) -> float:
    """Largest difference of any gradient from the image-to-text half of open_clip's loss, relative to the
    largest gradient: k = 0, no hard negatives, no mask."""
    from open_clip.loss import ClipLoss  # takes seconds to load, for which no other process should wait

    query = draw(config.queries, config.dim, 7).requires_grad_()
    items = draw(config.queries, config.dim, 8).requires_grad_()
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    loss = contrast([Level(query, items)], torch.arange(config.queries), scale, mask_same_item=False)[0].loss
    per_image, _ = ClipLoss().get_logits(query, items, scale)
    theirs = F.cross_entropy(per_image, torch.arange(config.queries))
    inputs = (query, items, scale)
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(config: CSFTLossConfig) -> dict[str, Any]:
    """Run everything and put the report together."""
    print("loss and gradients at the size of ST-NSG", flush=True)
    paper_scale = in_fresh_process(measure_paper_scale, config)
    print("time beside the naive loss", flush=True)
    beside = in_fresh_process(measure_naive, config)
    print("gradients", flush=True)
    beside["grad_rel_error"] = measure_gradients(config)
    report = {
        "paper_scale": paper_scale,
        "naive": beside,
        "open_clip": {"grad_max_diff": measure_open_clip(config)},
        "tile": CPU_TILE._asdict(),
    }
    report["targets"] = targets(report)
    return report | {"config": asdict(config)}


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the design asks for, and what was found."""
    scale, beside = report["paper_scale"], report["naive"]
    limits = [
        (f"MiB beyond inputs and queue, {scale['queries']:,} queries against {scale['items']:,} items",
         scale["extra_mib"], 100.0),
        ("time of the naive loss, items of a queue", beside["time_ratio"], 1.0),
        ("time of the naive loss, a gradient for all items", beside["time_ratio_all_gradients"], 1.0),
        ("relative error of the gradients against a loop in float64", beside["grad_rel_error"], 1e-5),
        ("difference from open_clip's gradients, of the largest", report["open_clip"]["grad_max_diff"],
         1e-5),
    ]  # fmt: skip
    return [
        target(f"{claim}: at most {limit:g}", value, math.isfinite(value) and value <= limit)
        for claim, value, limit in limits
    ]


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    beside = report["naive"]
    parts = {"items of a queue": "", "a gradient for all items": "_all_gradients"}
    keys = ("tiled_seconds", "naive_seconds", "time_ratio")
    return [
        Section(
            f"Beside the naive loss, {report['config']['naive_items']:,} items",
            columns=["", "tiled (s)", "naive (s)", "ratio"],
            rows=[[title, *(f"{beside[f'{key}{part}']:.2f}" for key in keys)]
                  for title, part in parts.items()],
        ),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.csft_loss`."""
    config = tyro.cli(CSFTLossConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(
        config, 1, "queries", "dim", "queue_batches", "steps", "naive_items", "rounds", "loop_queries"
    )
    report = measure(config)
    scale = report["paper_scale"]
    summary = (
        f"One level, {scale['queries']:,} queries against {scale['items']:,} items, {config.dim} dimensions, "
        f"one core: {scale['seconds']:.2f} s for loss and gradients, {scale['extra_mib']:.1f} MiB beyond "
        f"inputs and a queue of {scale['queue_mib']:.0f} MiB. The matrix of logits alone would take "
        f"{scale['logits_mib']:,.0f} MiB."
    )
    write_pages(report, "The loss of C-SFT", summary, sections(report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
