"""Write the report of a run: report.json for programs, report.md and report.html for people.

The report is a plain dictionary, put together by the program that ran the stages. This module adds where and
when it was made, draws the plots and renders the pages; it draws no conclusion of its own.
"""

import base64
import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import psutil
import torch

from mim_torchrec.embeddings.files import write_bytes, write_text
from mim_torchrec.training.history import read_history
from mim_torchrec.training.report_pages import HTML, MARKDOWN, STYLE

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend is chosen first

PACKAGES = (
    "mim-torchrec",
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "timm",
    "transformers",
    "torchx",
    "pyarrow",
    "numpy",
    "scikit-learn",
)
BASE_COLOR, MIM_COLOR = "#8a94a6", "#c2410c"
MAX_CURVE_POINTS = 200


def environment() -> dict[str, Any]:
    """Versions, hardware, date and git commit (None outside a repository) of this process."""
    installed = {
        d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    return {
        "versions": {"python": platform.python_version()}
        | {name: installed[name] for name in PACKAGES if name in installed},
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" with local changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def loss_curve(history: Path) -> dict[str, Any]:
    """Loss by step, averaged over equal spans to at most 200 points, and metrics by epoch.

    Args:
        history: history.jsonl of a stage.

    Returns:
        `step` and `loss` lists of equal length, `epochs` as in the history, `best_epoch`.
    """
    content = read_history(history)
    steps = np.array([entry["step"] for entry in content.steps], float)
    losses = np.array([entry["loss"] for entry in content.steps], float)
    parts = min(MAX_CURVE_POINTS, max(len(steps), 1))
    return {
        "step": [float(part.mean()) for part in np.array_split(steps, parts) if len(part)],
        "loss": [float(part.mean()) for part in np.array_split(losses, parts) if len(part)],
        "epochs": content.epochs,
        "best_epoch": content.best_epoch,
    }


def write_report(report: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write report.json, report.md, report.html and the plots (PNG, which Markdown refers to) into `out`.

    Args:
        report: `title`, `summary`, `ctr`, `cold_start`, `by_category`, `table`, `stages`, `controls`,
            `targets`, `curves`, `config`, and optionally `notes`, `seeds`, `variants`, `tuning`.
        out: directory; made if missing.

    Returns:
        The report with versions, hardware, date and commit.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot hold; undefined ones are None.
    """
    report = {"seeds": [], "variants": {}, "tuning": {}, "notes": [], **report, **environment()}
    text = json.dumps(report, indent=2, default=str, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    plots = {
        "cold_start": to_png(_draw_cold_start(report["cold_start"])),
        "curves": to_png(_draw_curves(report["curves"])),
    }
    for name, png in plots.items():
        write_bytes(out / f"{name}.png", png)
    embedded = {name: base64.b64encode(png).decode() for name, png in plots.items()}
    pages = {"report.json": text + "\n"}
    pages["report.md"] = _environment(False).from_string(MARKDOWN).render(r=report).rstrip() + "\n"
    pages["report.html"] = _environment(True).from_string(HTML).render(r=report, plots=embedded, style=STYLE)
    for name, page in pages.items():
        write_text(out / name, page)
    return report


def _environment(autoescape: bool) -> jinja2.Environment:
    made = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    made.filters |= {
        "auc": lambda x: "–" if x is None else f"{x:.4f}",
        "signed": lambda x: "–" if x is None else f"{x:+.4f}",
        "ci": lambda x: f"[{x[0]:+.4f}, {x[1]:+.4f}]",
        "seconds": lambda x: f"{x:.0f} s" if x < 120 else f"{x / 60:.1f} min",
        "count": lambda x: f"{x:,}",
        "minus": lambda pair: None if None in pair else pair[0] - pair[1],
        "words": lambda x: x.replace("_", " ").replace("auc", "AUC"),
        "cell": lambda x, key: (
            "–"
            if x is None
            else f"{x:+.4f}"
            if "gain" in key
            else f"{x:.4f}"
            if isinstance(x, float)
            else str(x)
        ),
        "setting": lambda x: ", ".join(f"{key} {value}" for key, value in x.items()) or "defaults",
        "pretty": lambda x: json.dumps(x, indent=2, default=str),
    }
    return made


def to_png(figure: plt.Figure) -> bytes:
    """Draw a figure and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def tidy(axes: plt.Axes) -> None:
    """Make axes look as in all reports."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_cold_start(sets: list[dict[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.4), layout="constrained")
    place = np.arange(len(sets))
    values = {
        key: np.array([math.nan if s[key] is None else s[key] for s in sets])
        for key in ("base_auc", "mim_auc")
    }
    axes.bar(place - 0.2, values["base_auc"], 0.38, label="Base", color=BASE_COLOR)
    axes.bar(place + 0.2, values["mim_auc"], 0.38, label="MIM", color=MIM_COLOR)
    for x, (base, mim) in enumerate(zip(*values.values(), strict=True)):
        if not math.isnan(base + mim):
            axes.annotate(
                f"{mim - base:+.3f}",
                (x, max(base, mim)),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    known = np.concatenate(list(values.values()))
    known = known[~np.isnan(known)]
    if len(known):
        span = max(known.max() - known.min(), 0.02)
        axes.set_ylim(max(known.min() - 0.4 * span, 0), min(known.max() + 0.3 * span, 1.05))
    axes.set_xticks(place, [s["set"] for s in sets])
    axes.set_xlabel("items by age, S1 newest (the axis does not start at zero)", fontsize=9)
    axes.set_ylabel("test AUC", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.14))
    tidy(axes)
    return figure


def _draw_curves(curves: dict[str, dict[str, Any]]) -> plt.Figure:
    columns = min(3, max(len(curves), 1))
    rows = max(math.ceil(len(curves) / columns), 1)
    figure, grid = plt.subplots(rows, columns, figsize=(8.4, 2.3 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
        axes.plot(
            curve["step"],
            curve["loss"],
            color="#1d4e89",
            linewidth=1.2,
            marker="." if len(curve["step"]) < 3 else None,
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("training loss", fontsize=8)
        tidy(axes)
    return figure
