"""The states of a run's stages, as a table and as `<run>/pipeline/report.json`."""

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.pipeline.outputs import local_files
from mim_torchrec.pipeline.records import Records
from mim_torchrec.pipeline.spec import Pipeline

TAIL_LINES = 40
OF_A_RANK = re.compile(r"(\S+/\d+ )?\[\d+\]:.*\S")
FIGURES = ("auc", "gauc", "ne")
"""Metrics of the table; the report has all numbers of a metrics.json."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage at the end of a run.

    Args:
        name: of the stage.
        state: done, kept, failed, cancelled, blocked (one before it failed), submitted, running or waiting.
        seconds: that it took.
        why: of a failure.
        handle: of its job, as TorchX writes it.
        command: what was run.
        out: what it has written.
    """

    name: str
    state: str
    seconds: float = 0.0
    why: str = ""
    handle: str | None = None
    command: str = ""
    out: Path | Url | None = None

    def metrics(self) -> dict[str, float]:
        """The numbers of `metrics.json` in the output; empty without one."""
        return metrics_of(self.out)


def metrics_of(out: Path | Url | None) -> dict[str, float]:
    """The numbers of `metrics.json` in a directory; empty where there is none."""
    folder = None if out is None else local_files(out, "metrics.json")
    file = None if folder is None else folder / "metrics.json"
    if file is None or not file.is_file():
        return {}
    content = read_json(file)
    return {k: v for k, v in content.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(file.read_text())


def write_report(
    records: Records, pipeline: Pipeline, scheduler: str, began: float, results: dict[str, StageResult]
) -> dict[str, Any]:
    """Write the report of a run.

    Returns:
        `name`, `scheduler`, `state`, `began`, `seconds` and, by name, `stages`.

    Raises:
        LeaseError: another process has taken the directory over.
    """
    states = {result.state for result in results.values()}
    ended = {"failed", "cancelled"} & states
    state = sorted(ended)[-1] if ended else "done" if states <= {"done", "kept"} else "interrupted"
    report = {
        "name": pipeline.name,
        "scheduler": scheduler,
        "state": state,
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(began)),
        "seconds": time.time() - began,
        "stages": {
            name: {**asdict(result), "log": records.log(name), "metrics": result.metrics()}
            for name, result in results.items()
        },
    }
    records.check_lease()
    write_json(records.report, report)
    return report


def end_of_log(lines: Sequence[str]) -> str:
    """What says why a stage failed: what a rank said comes before the long farewell of its launchers.

    >>> end_of_log(["[1]:ValueError: 3 pairs", "[1]:", "torchrun: 2 ranks have ended"])
    '[1]:ValueError: 3 pairs'
    """
    of_ranks = [line for line in lines if OF_A_RANK.match(line)]
    return "\n".join((of_ranks or lines)[-TAIL_LINES:])


def table(results: Iterable[StageResult]) -> str:
    """The results as a table for a terminal."""
    results = list(results)
    figures = [name for name in FIGURES if any(name in result.metrics() for result in results)]
    rows = [["stage", "state", "time", *figures]]
    for result in results:
        metrics = result.metrics()
        time_taken = _time(result.seconds) if result.seconds else ""
        rows.append([result.name, result.state, time_taken,
                     *(f"{metrics[name]:.4f}" if name in metrics else "" for name in figures)])  # fmt: skip
    return columns(rows)


def columns(rows: list[list[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
