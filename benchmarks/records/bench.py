"""Run every benchmark of cost at a small size and say what moved: `make bench`.

    make bench              # about a quarter of an hour on two cores
    make bench RECORD=1     # this run is what later ones are compared with
    python -m mim_torchrec.benchmarks.records.bench --only serving chaos

Figures are compared with those that the same small sizes gave before (`results/small.json`); those of full
sizes are in `benchmarks/README.md`. What moved by more than `--tolerance` is marked: on a busy machine that
is a question, not an answer.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.benchmarks.harness.pages import Section, number, write_pages
from mim_torchrec.benchmarks.records.registry import BENCHMARKS, RESULTS, Benchmark
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import ExpectedError, OptionError

SMALL = RESULTS / "small.json"
SHOWN = 20  # last lines of a log


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Run benchmarks at a small size and compare their figures with those of before."""

    out: Path = Path("runs/bench")
    """Directory of the reports and logs."""
    only: tuple[str, ...] = tuple(one.name for one in BENCHMARKS)
    """Benchmarks to run."""
    tolerance: float = 0.25
    """Fraction of its value by which a figure may differ before it counts as moved."""
    record: bool = False
    """Write the figures to results/small.json instead of comparing them; all benchmarks have to run."""


class BenchmarkFailed(ExpectedError, RuntimeError):
    """A benchmark ended with an error."""


def run(benchmark: Benchmark, out: Path) -> tuple[dict[str, float], float]:
    """Run one benchmark in a process of its own; returns its figures and the seconds that it took.

    Raises:
        BenchmarkFailed: it ended with an error; the end of its log is on standard error.
        KeyError: its report lacks a figure.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        f"mim_torchrec.benchmarks.{benchmark.module}",
        "--out",
        str(out),
        *benchmark.small,
    ]
    started = time.perf_counter()
    with (out / "log.txt").open("w") as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        lines = (out / "log.txt").read_text().splitlines()[-SHOWN:]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        raise BenchmarkFailed(f"{benchmark.name} ended with {ended.returncode}; see {out / 'log.txt'}")
    report = json.loads((out / "report.json").read_text())
    return benchmark.read(report), time.perf_counter() - started


def compare(now: dict[str, float], before: dict[str, float], tolerance: float) -> list[dict[str, Any]]:
    """Figures beside those of before.

    Returns:
        For each `figure`, `now`, `before` (None where there was none), `change` as a share of it, and whether
        it `moved` by more than the tolerance.
    """
    rows = []
    for label, value in now.items():
        known = before.get(label)
        change = None if not known else value / known - 1
        moved = change is not None and abs(change) > tolerance
        rows.append({"figure": label, "now": value, "before": known, "change": change, "moved": moved})
    return rows


def section(name: str, title: str, rows: Sequence[dict[str, Any]], seconds: float) -> Section:
    """What one benchmark gave."""
    return Section(
        f"{title} ({name}, {seconds:.0f} s)",
        columns=["figure", "now", "recorded", "change", ""],
        rows=[[row["figure"], number(row["now"]), number(row["before"]),
               "–" if row["change"] is None else f"{row['change']:+.0%}", "moved" if row["moved"] else ""]
              for row in rows],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.records.bench`.

    Raises:
        OptionError: a benchmark is not known, or not all run where results are recorded.
        BenchmarkFailed: one fails.
    """
    config = tyro.cli(BenchConfig, args=argv, description=__doc__)
    names = [one.name for one in BENCHMARKS]
    if unknown := sorted(set(config.only) - set(names)):
        raise OptionError(f"there is no benchmark {unknown[0]}; there are {', '.join(names)}")
    if config.record and set(config.only) != set(names):
        raise OptionError("--record needs all benchmarks: leave --only out")
    before = json.loads(SMALL.read_text())["figures"] if SMALL.exists() and not config.record else {}
    figures, seconds, rows, pages = {}, {}, {}, []
    for benchmark in BENCHMARKS:
        name = benchmark.name
        if name not in config.only:
            continue
        print(f"{name} …", flush=True)
        figures[name], seconds[name] = run(benchmark, config.out / name)
        rows[name] = compare(figures[name], before.get(name, {}), config.tolerance)
        pages.append(section(name, benchmark.title, rows[name], seconds[name]))
        for row in rows[name]:
            recorded = ""
            if row["change"] is not None:
                recorded = f", recorded {number(row['before'])} ({row['change']:+.0%})"
            mark = "MOVED " if row["moved"] else "      "
            print(f"  {mark}{row['figure']}: {number(row['now'])}{recorded}")
        print(f"  {seconds[name]:.0f} s", flush=True)
    total = sum(seconds.values())
    moved = sum(row["moved"] for of_one in rows.values() for row in of_one)
    summary = f"{len(figures)} benchmarks at a small size in {total / 60:.1f} minutes; {moved} figures moved."
    report = {"figures": rows, "seconds": seconds, "config": dataclasses.asdict(config)}
    print(summary)
    write_pages(report, "What moved", summary, pages, {}, config.out)
    if config.record:
        write_json(SMALL, {"figures": figures, "seconds": seconds, **environment()})


if __name__ == "__main__":
    program.run(main)
