"""Everything that only a GPU can tell, in order of worth and within a budget: `make gpu`.

    make gpu BUDGET=8            # minutes
    python -m mim_torchrec.benchmarks.gpu.main --only steps --budget-minutes 3

Installs nothing. Every part is a program of its own with a time limit, writes its own report, and is entered
into report.json when it ends: a run that is cut off keeps what it has. A part that fails does not stop the
others; the status is 1 then. Without a GPU it ends with status 6.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.domains import Positive, check_domains
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import OptionError, SetupError

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 12
"""Last lines of the log of a part that are printed."""
LEAST = 20.0
"""Seconds below which no part is begun."""


@dataclass(frozen=True)
class Part:
    """A program of the run.

    Attributes:
        name: of its folder and of its entry.
        words: of its command, after the interpreter; `{out}` is its folder.
        seconds: that it may take.
        gpus: that it needs.
        report: file that it writes, in its folder; None for one that only passes or fails.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    gpus: int = 1
    report: str | None = "report.json"


def _module(name: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"mim_torchrec.{name}", *words)


def _own(name: str, *words: str) -> tuple[str, ...]:
    return _module(f"benchmarks.gpu.{name}", "--out", "{out}", *words)


_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PARTS: Sequence[Part] = (
    Part("doctor", _module("doctor"), 90, report=None),
    Part(
        "tests",
        ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")),
        120,
        report=None,
    ),
    Part("table6", _module("benchmarks.paper.efficiency.main", "--out", "{out}"), 240),
    Part("lookups", _own("lookups"), 120),
    Part("steps", _own("steps"), 240),
    Part("contrast", _own("contrast"), 60),
    Part("export", _module("benchmarks.speed.export_throughput", "--out", "{out}"), 180),
    Part("steps_2_gpus", (*_TORCHRUN, *_own("steps")), 240, gpus=2),
)
"""In order of worth."""


@dataclass(frozen=True, kw_only=True)
class GPUConfig:
    """Check and measure on the GPUs of this machine, and write a record of each part."""

    out: Path = Path("runs/gpu")
    """Directory of report.json, and of a folder of each part."""
    budget_minutes: Positive = 8.0
    """Minutes for all parts together; what does not fit is left out."""
    only: tuple[str, ...] = tuple(part.name for part in PARTS)
    """Parts to run."""


def run_part(part: Part, out: Path, limit: float) -> dict[str, Any]:
    """Run a part, for so many seconds at most.

    Returns:
        `state` (done, failed or cut off), `seconds`, and `report`, what it has written.
    """
    folder = out / part.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *(word.replace("{out}", str(folder)) for word in part.words)]
    if part.report is not None:
        (folder / part.report).unlink(missing_ok=True)  # of an earlier run
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
            state = "done" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut off"
        finally:
            _end(process)
    found: dict[str, Any] = {"state": state, "seconds": time.monotonic() - started}
    if state != "done":
        found["log"] = (folder / "log.txt").read_text(errors="replace").splitlines()[-SHOWN:]
    if part.report is not None and (folder / part.report).is_file():
        found["report"] = json.loads((folder / part.report).read_text())
    return found


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a part with all its processes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(
    config: GPUConfig, parts: Sequence[Part], gpus: int, clock: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Run parts in turn and enter each into report.json when it ends; returns the report."""
    until = clock() + 60 * config.budget_minutes
    report: dict[str, Any] = {"parts": {}, "budget_minutes": config.budget_minutes, **environment()}
    config.out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = until - clock()
        if part.gpus > gpus:
            found: dict[str, Any] = {"state": f"left out: needs {part.gpus} GPUs, there are {gpus}"}
        elif left < LEAST:
            found = {"state": "left out: the budget is spent"}
        else:
            print(f"{part.name}: at most {min(part.seconds, left):.0f} s …", flush=True)
            found = run_part(part, config.out, min(part.seconds, left))
        report["parts"][part.name] = found
        write_json(config.out / "report.json", report)
        took = f", {found['seconds']:.0f} s" if "seconds" in found else ""
        print(f"{part.name}: {found['state']}{took}", flush=True)
        for line in found.get("log", ()):
            print(f"    {line}")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.gpu.main`.

    Raises:
        OptionError: there is no such part, or no budget.
        SetupError: there is no GPU.
    """
    config = tyro.cli(GPUConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)
    names = [part.name for part in PARTS]
    if unknown := sorted(set(config.only) - set(names)):
        raise OptionError(f"--only {unknown[0]}: there are {', '.join(names)}")
    if not torch.cuda.is_available():
        raise SetupError("there is no GPU; make rehearsal says without one what a step would take")
    parts = [part for part in PARTS if part.name in config.only]
    report = run_all(config, parts, torch.cuda.device_count())
    report["config"] = dataclasses.asdict(config)
    write_json(config.out / "report.json", report)
    print(config.out / "report.json")
    if any(found["state"] == "failed" for found in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    program.run(main)
