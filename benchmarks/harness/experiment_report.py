"""The report of an experiment that compares Base and MIM: figures, controls, cold start and loss curves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mim_torchrec.benchmarks.harness.drawing import BASE_COLOR, MIM_COLOR, subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, formatted, interval, targets_section, write_pages
from mim_torchrec.training.history import read_history

MAX_CURVE_POINTS = 200


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
    """Write report.json, report.md, report.html and the plots into `out`.

    Args:
        report: `title`, `summary`, `ctr`, `cold_start`, `by_category`, `table`, `stages`, `controls`,
            `targets`, `curves`, `config`, and optionally `notes`, `seeds`, `variants`, `tuning`.
        out: directory; made if missing.

    Returns:
        The report with versions, hardware, date and commit.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot hold; undefined ones are None.
    """
    report = {"seeds": [], "variants": {}, "tuning": {}, "notes": [], **report}
    images = {
        "cold_start.png": to_png(_draw_cold_start(report["cold_start"])),
        "curves.png": to_png(_draw_curves(report["curves"])),
    }
    figures = report["ctr"]
    headline = (
        f"MIM − Base: {formatted(figures['mim_minus_base_auc'], '+.4f')} AUC, 95% interval "
        f"{interval(figures['mim_minus_base_ci'])} (users resampled)"
    )
    return write_pages(
        report, report["title"], report["summary"], sections(report), images, out, headline=headline
    )


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The parts of the pages."""
    seeds, tuning, table = report["seeds"], report["tuning"], report["table"]
    bytes_kept = table.get("digest_before") == table.get("digest_after")
    found = [
        Section(
            "Base and MIM", columns=["model", "test AUC", "grouped AUC", "normalized entropy"],
            rows=[[name, *(formatted(report["ctr"][key][figure]) for figure in ("auc", "gauc", "ne"))]
                  for name, key in (("Base", "base"), ("MIM", "mim"))],
        ),
        targets_section(report["targets"]),
        Section(
            "Negative controls", columns=["control", "", "gain over its Base", "95% interval", ""],
            rows=[[name, c["what"], _signed(c["gain"]), interval(c["ci"]), c["verdict"]]
                  for name, c in report["controls"].items()],
        ),
        Section(
            "Variants", columns=["variant", "", "Base AUC", "AUC", "difference", "95% interval"],
            rows=[[name, v["what"], formatted(v["base_auc"]), formatted(v["auc"]), _signed(v["gain"]),
                   interval(v["ci"])] for name, v in report["variants"].items()],
        ),
        Section(
            "Seeds", columns=[key.replace("_", " ").replace("auc", "AUC") for key in (seeds or [{}])[0]],
            rows=[[_signed(value) if "gain" in key else value if key == "seed" else formatted(value)
                   for key, value in row.items()] for row in seeds],
        ),
        Section(
            "Tuning", text=[tuning["how"]] if tuning else [],
            columns=["setting", "Base validation AUC", "MIM validation AUC"],
            rows=[[", ".join(f"{key} {value}" for key, value in row["setting"].items()) or "defaults",
                   *(formatted(row[model]) + (" (chosen)" if row[f"chosen_for_{model}"] else "")
                     for model in ("base", "mim"))]
                  for row in tuning.get("grid", [])],
        ),
        Section(
            "Cold start", columns=["items by age", "Base AUC", "MIM AUC", "difference", "impressions"],
            rows=[[s["set"], *_pair(s)] for s in report["cold_start"]], images=["cold_start.png"],
        ),
        Section(
            "Categories", columns=["category", "Base AUC", "MIM AUC", "difference", "impressions"],
            rows=[[name or "(none)", *_pair(c)] for name, c in report["by_category"].items()],
        ),
        Section("Loss curves", images=["curves.png"]),
        Section(
            "Table and stages",
            text=[f"MM table: {table['rows']:,} rows of {table['dim']} {table['dtype']}, version "
                  f"{table['table_version']}" + (
                      f"; its bytes on the ranks were {'the same' if bytes_kept else 'NOT the same'} before "
                      "and after training." if table.get("digest_before") else ".")],
            columns=["stage", "time"],
            rows=[[name, f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"]
                  for name, seconds in report["stages"].items()],
        ),
        Section("Notes", text=report["notes"]),
    ]  # fmt: skip
    return [part for part in found if part.rows or part.text or part.images]


def _pair(part: Mapping[str, Any]) -> list[str]:
    base, mim = part["base_auc"], part["mim_auc"]
    difference = None if base is None or mim is None else mim - base
    return [formatted(base), formatted(mim), _signed(difference), f"{part['n']:,}"]


def _signed(value: float | None) -> str:
    return formatted(value, "+.4f")


def _draw_cold_start(sets: list[dict[str, Any]]) -> Figure:
    figure, axes = subplots(figsize=(8.4, 3.4))
    values = {
        label: np.array([math.nan if s[key] is None else s[key] for s in sets])
        for label, key in (("Base", "base_auc"), ("MIM", "mim_auc"))
    }
    names = [s["set"] for s in sets]
    drawn = axes.grouped_bar(values, tick_labels=names, colors=[BASE_COLOR, MIM_COLOR])
    gains = [f"{gain:+.3f}" if gain == gain else "" for gain in values["MIM"] - values["Base"]]
    axes.bar_label(drawn.bar_containers[1], gains, fontsize=8, padding=2)
    known = np.concatenate(list(values.values()))
    known = known[~np.isnan(known)]
    if len(known):
        span = max(known.max() - known.min(), 0.02)
        axes.set_ylim(max(known.min() - 0.4 * span, 0), min(known.max() + 0.3 * span, 1.05))
    axes.set_xlabel("items by age, S1 newest (the axis does not start at zero)", fontsize=9)
    axes.set_ylabel("test AUC", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.14))
    tidy(axes)
    return figure


def _draw_curves(curves: dict[str, dict[str, Any]]) -> Figure:
    columns = min(3, max(len(curves), 1))
    rows = max(math.ceil(len(curves) / columns), 1)
    figure, grid = subplots(rows, columns, figsize=(8.4, 2.3 * rows), squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
        marker = "." if len(curve["step"]) < 3 else None
        axes.plot(curve["step"], curve["loss"], color="#1d4e89", linewidth=1.2, marker=marker)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("training loss", fontsize=8)
        tidy(axes)
    return figure
