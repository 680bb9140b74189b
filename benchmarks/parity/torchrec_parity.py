"""Compare frozen collections with TorchRec's trainable ones in random configurations, on two gloo ranks.

    python -m mim_torchrec.benchmarks.parity.torchrec_parity --out runs/torchrec_parity

A configuration is `equal` if both collections gave the same, `refused_by_both` if both raised, `documented`
if the difference is in the list of `docs/frozen_tables_manual.md`, and else it `differs`. `report.json`
counts them; the program names the seeds of those that differ and ends with status 1 if there are any.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.parity.comparison import Verdict, compare
from mim_torchrec.benchmarks.parity.differences import (
    DIFFERENCES,
    DIFFERS,
    DOCUMENTED,
    EQUAL,
    FAILS,
    REFUSED,
)
from mim_torchrec.embeddings import files

log = logging.getLogger(__name__)

RANKS = 2
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Compare frozen collections with TorchRec's trainable ones in random configurations."""

    out: Path
    """Directory of report.json; made if missing."""
    configurations: int = 5000
    """How many configurations, each from a seed of its own."""
    first_seed: int = 0
    """Seed of the first one."""


def report_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what report.json holds, of the verdicts of all ranks."""
    by_seed: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        by_seed.setdefault(verdict.seed, []).append(verdict)
    kinds = (DIFFERS, DOCUMENTED, EQUAL, REFUSED)  # the first that a configuration was in any way
    counts = Counter(
        next(kind for kind in kinds if any(each.kind == kind for each in found)) for found in by_seed.values()
    )
    documented = {
        name: len({v.seed for v in verdicts if v.kind == DOCUMENTED and v.detail == name})
        for name in DIFFERENCES
    }
    return {
        "configurations": len(by_seed),
        **{kind: counts[kind] for kind in reversed(kinds)},
        "documented_differences": documented,
        "errors_of_torchrec": dict(
            Counter(
                v.theirs[:100] for v in verdicts if v.kind == DOCUMENTED and v.detail == FAILS
            ).most_common()
        ),
        "ways": dict(sorted(Counter(verdict.way for verdict in verdicts).items())),
        "seeds_that_differ": sorted({verdict.seed for verdict in verdicts if verdict.kind == DIFFERS}),
    }


def compare_on_ranks(seeds: range) -> list[Verdict]:
    """Return the verdicts of configurations from two processes: together first, then each on its own."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(Path(folder), seeds), nprocs=RANKS, start_method="spawn")
        return [
            verdict for rank in range(RANKS)
            for verdict in torch.load(Path(folder, f"{rank}.pt"), weights_only=False)
        ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m mim_torchrec.benchmarks.parity.torchrec_parity``."""
    config = tyro.cli(ParityConfig, args=argv, description=__doc__)
    log.setLevel(logging.INFO)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # fbgemm says which ids it replaces
    verdicts = compare_on_ranks(range(config.first_seed, config.first_seed + config.configurations))
    report = report_of(verdicts)
    config.out.mkdir(parents=True, exist_ok=True)
    files.write_json(config.out / "report.json", report)
    for verdict in verdicts:
        if verdict.kind == DIFFERS:
            log.error("seed %d, %s", verdict.seed, verdict.detail)
    log.info("%d configurations: %d equal, %d refused by both, %d documented, %d differ",
             report["configurations"], report[EQUAL], report[REFUSED], report[DOCUMENTED],
             report[DIFFERS])  # fmt: skip
    if report[DIFFERS]:
        raise SystemExit(1)


def _rank(rank: int, folder: Path, seeds: range) -> None:
    torch.set_num_threads(1)
    program.log_to_stderr()
    logging.disable(logging.ERROR)  # TorchRec's, of every module it shards
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    verdicts = compare(seeds)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    verdicts += compare(seeds[rank::RANKS])
    dist.destroy_process_group()
    torch.save(verdicts, folder / f"{rank}.pt")


if __name__ == "__main__":
    program.run(main)
