"""The loss of C-SFT at the size of the paper, 1,024 queries and 901,120 items: time, memory, operations.

python -m mim_torchrec.benchmarks.gpu.contrast --out runs/gpu/contrast
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from mim_torchrec import program
from mim_torchrec.benchmarks.gpu.clock import peak_mib, seconds_each
from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import check_sizes
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE
from mim_torchrec.training.distributed import distributed

PRODUCTS = 6
"""Products of queries and items in a step, times two operations: forward, again in backward, gradients."""


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """Time the loss and its gradients on the device that there is, and write a report."""

    out: Path = Path("runs/gpu/contrast")
    """Directory of report.json."""
    queries: int = 1024
    """Queries of a batch (N)."""
    dim: int = 128
    """Size of the vectors."""
    queue_batches: int = 439
    """Batches in the queue (k)."""
    rounds: int = 10
    """Steps that are timed."""
    warmup: int = 2
    """Steps before those."""


def measure(config: ContrastConfig, device: torch.device) -> dict[str, Any]:
    """One level's loss and gradients with a full queue."""
    count = config.queries
    loss = MultiLevelInfoNCE(alpha=0.0, beta=0.0, queue_batches=config.queue_batches).to(device)
    queue = loss.queue
    assert queue is not None  # `main` refuses 0 batches
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, config.dim, generator=generator), dim=1).to(device)

    for step in range(config.queue_batches):
        queue.push([draw(2 * count)], torch.arange(2 * count, device=device) + 2 * count * step)
    query, items = draw(count).requires_grad_(), draw(2 * count).requires_grad_()
    ids = torch.arange(2 * count, device=device) + 2 * count * config.queue_batches

    def step_once(_: int) -> None:
        query.grad = items.grad = None
        total, _report = loss(query, items, items, items, ids, ids[:count])
        total.backward()

    seconds = seconds_each(step_once, config.rounds, config.warmup)
    num_items = 2 * count * (config.queue_batches + 1)
    queued = queue.vectors("mm")
    assert queued is not None  # it is full
    return {
        "ms": 1000 * seconds,
        "items": num_items,
        "peak_mib": peak_mib(step_once, device),
        "queue_mib": queued.nbytes / 2**20,
        "logits_mib": count * num_items * 4 / 2**20,
        "tflops": PRODUCTS * count * num_items * config.dim / seconds / 1e12,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.gpu.contrast`."""
    config = tyro.cli(ContrastConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "rounds", "queries", "queue_batches", "dim")
    with distributed(0) as context:
        found = measure(config, context.device)
        report = {**found, "device": str(context.device), "config": dataclasses.asdict(config)}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "report.json", report | environment())
    print(f"{found['ms']:.1f} ms, {found['tflops']:.2f} TFLOP/s, peak {found['peak_mib']} MiB")


if __name__ == "__main__":
    program.run(main)
