"""What every stage would do on a GPU, rehearsed without one: `make rehearsal`.

Prints launches, waits of the host for the stream that computes (syncs), uploads, and waits for streams beside
it (asides), of a training step by model, and of whole stages, and what a GPU would refuse: operators whose
tensors lie on different devices, and operators without a kernel for a GPU. Values are real; times are not
those of a GPU, and none is reported.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.benchmarks.harness.launching import launch
from mim_torchrec.benchmarks.rehearsal.budgets import BUDGETS
from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.stages import StageCounts, rehearse_stages
from mim_torchrec.benchmarks.rehearsal.steps import CASES, StepCounts, measure_step
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.training.distributed import distributed

RANKS = (1, 2)
KINDS = {"launches": 6, "syncs": 5, "uploads": 5, "asides": 5}
"""What is printed, and how wide."""


@dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    """Rehearse training on a pretended GPU, and write a report."""

    out: Path = Path("runs/rehearsal")
    """Directory of report.json."""
    stages: bool = True
    """Rehearse whole stages too, not only the training steps of the CTR models."""


def rehearse_steps(folder: Path, ranks: int) -> dict[str, tuple[StepCounts, Counts]]:
    """Measure the steps of all models of a number of ranks; every rank calls it.

    Args:
        folder: of all ranks; empty.
        ranks: how many there are.

    Returns:
        By the name of the case what a step takes, and all that was counted.
    """
    torch.set_num_threads(1)
    found = {}
    with distributed(0):  # one process group for all models
        for case in CASES:
            if case.ranks == ranks:
                found[case.name] = measure_step(case, folder)
    return found


def rehearse(config: RehearsalConfig) -> dict[str, Any]:
    """The report."""
    mixed: Counter[str] = Counter()
    no_kernel: Counter[str] = Counter()
    fbgemm: set[str] = set()
    report: dict[str, Any] = {"steps": {}, "stages": {}, "errors": {}}
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as name:
            of_ranks = launch(ranks, rehearse_steps, Path(name), ranks)
        for case in of_ranks[0]:
            steps = [rank[case][0] for rank in of_ranks]
            report["steps"][case] = {kind: max(getattr(step, kind) for step in steps) for kind in KINDS}
            report["steps"][case] |= {"budget": dataclasses.asdict(BUDGETS[case]), "lines": steps[0].lines}
            for rank in of_ranks:
                counts = rank[case][1]
                mixed.update(counts.mixed)
                no_kernel.update(counts.no_kernel)
                fbgemm.update(counts.of_fbgemm())
            print(_line(case, report["steps"][case]), flush=True)
    for ranks in RANKS if config.stages else ():
        with tempfile.TemporaryDirectory() as name:
            stages: list[dict[str, StageCounts]] = launch(ranks, rehearse_stages, Path(name), ranks)
        for stage, found in stages[0].items():
            label = stage if ranks == 1 else f"{stage}, {ranks} ranks"
            report["stages"][label] = {"totals": found.totals, "step": found.step, "lines": found.lines}
            print(_line(label, found.totals), flush=True)
            for rank in stages:
                mixed.update(rank[stage].mixed)
                no_kernel.update(rank[stage].no_kernel)
                fbgemm.update(rank[stage].fbgemm)
                if rank[stage].error is not None:
                    report["errors"][label] = rank[stage].error
    report |= {"mixed": dict(mixed), "no_kernel": dict(no_kernel), "fbgemm": sorted(fbgemm)}
    return report | {"environment": environment()}


def _line(name: str, counts: dict[str, Any]) -> str:
    return f"{name:42} " + "  ".join(f"{kind} {counts[kind]:{width}}" for kind, width in KINDS.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.rehearsal.rehearsal`."""
    config = tyro.cli(RehearsalConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    report = rehearse(config)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "report.json", report)
    for kind in ("mixed", "no_kernel", "errors"):
        for problem, detail in report[kind].items():
            print(f"{kind}: {problem} ({detail})")
    print(f"mixed devices: {len(report['mixed'])}, operators without a kernel: {len(report['no_kernel'])}, "
          f"stages that failed: {len(report['errors'])}; {config.out / 'report.json'}")  # fmt: skip
    if report["mixed"] or report["no_kernel"] or report["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    program.run(main)
