"""The report of an experiment that compares Base and MIM: figures, controls, cold start and loss curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mim_torchrec.benchmarks.harness.drawing import (
    BASE_COLOR,
    MIM_COLOR,
    PALE_COLOR,
    THIRD_COLOR,
    dots,
    subplots,
    tidy,
    to_png,
)
from mim_torchrec.benchmarks.harness.pages import (
    Section,
    Strip,
    formatted,
    interval,
    targets_section,
    write_pages,
)
from mim_torchrec.training.history import read_history

MAX_CURVE_POINTS = 200
WIDTH = 6.6  # inches: letters stay readable on a phone
VALIDATION = {"ne": "validation NE", "log_rank": "validation mean log rank", "auc": "validation AUC"}
"""Metrics of epochs that are drawn beside the loss, the first that there is."""


def loss_curve(history: Path) -> dict[str, Any]:
    """Loss by step, averaged over equal spans to at most 200 points, and metrics by epoch.

    Args:
        history: history.jsonl of a stage.

    Returns:
        `step` and `loss` lists of equal length, `epochs` as in the history, `epoch_step`, the last step of
        each (None where a crash has lost its steps), and `best_epoch`.
    """
    content = read_history(history)
    steps = np.array([entry["step"] for entry in content.steps], float)
    losses = np.array([entry["loss"] for entry in content.steps], float)
    last = {entry["epoch"]: entry["step"] for entry in content.steps}
    parts = min(MAX_CURVE_POINTS, max(len(steps), 1))
    return {
        "step": [float(part.mean()) for part in np.array_split(steps, parts) if len(part)],
        "loss": [float(part.mean()) for part in np.array_split(losses, parts) if len(part)],
        "epochs": content.epochs,
        "epoch_step": [last.get(entry["epoch"]) for entry in content.epochs],
        "best_epoch": content.best_epoch,
    }


def write_report(
    report: dict[str, Any], out: Path, moved: Sequence[Strip] = (), search: Path | None = None
) -> dict[str, Any]:
    """Write report.json, report.md, report.html and the plots into `out`.

    Args:
        report: `title`, `summary`, `ctr`, `cold_start`, `by_category`, `table`, `stages`, `controls`,
            `targets`, `curves`, `config`, and optionally `notes`, `seeds`, `variants`, `tuning`.
        out: directory; made if missing.
        moved: pictures of clicked items that content moved up.
        search: PNG file of an image search.

    Returns:
        The report with versions, hardware, date and commit.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot hold; undefined ones are None.
    """
    report = {"seeds": [], "variants": {}, "tuning": {}, "notes": [], **report}
    images = {
        "differences.png": to_png(_draw_differences(report)),
        "cold_start.png": to_png(_draw_cold_start(report["cold_start"])),
        "curves.png": to_png(_draw_curves(report["curves"])),
    }
    if search is not None:
        images["search.png"] = search.read_bytes()
    figures = report["ctr"]
    headline = (
        f"MIM − Base: {formatted(figures['mim_minus_base_auc'], '+.4f')} AUC, 95% interval "
        f"{interval(figures['mim_minus_base_ci'])} (users resampled)"
    )
    return write_pages(
        report,
        report["title"],
        report["summary"],
        sections(report, moved, list(images)),
        images,
        out,
        headline=headline,
    )


def sections(report: Mapping[str, Any], moved: Sequence[Strip], images: Sequence[str]) -> list[Section]:
    """The parts of the pages."""
    seeds, tuning, table = report["seeds"], report["tuning"], report["table"]
    bytes_kept = table.get("digest_before") == table.get("digest_after")
    found = [
        Section(
            "Base and MIM", columns=["model", "test AUC", "grouped AUC", "normalized entropy"],
            rows=[[name, *(formatted(report["ctr"][key][figure]) for figure in ("auc", "gauc", "ne"))]
                  for name, key in (("Base", "base"), ("MIM", "mim"))],
            images=["differences.png"],
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
            "Items that content moved up", strips=moved,
            text=["What users did last, and with a frame the item that they clicked next."] if moved else [],
        ),
        Section(
            "Image search by the encoder", images=[name for name in images if name == "search.png"],
            text=["Held-out queries on the left, and the items found for them; green is the bought item."]
            if "search.png" in images else [],
        ),
        Section(
            "Cold start",
            columns=["items by age", "Base AUC", "MIM AUC", "difference", "95% interval", "impressions"],
            rows=[[s["set"], *(pair := _pair(s))[:-1], interval(s.get("ci")), pair[-1]]
                  for s in report["cold_start"]],
            images=["cold_start.png"],
        ),
        Section(
            "Categories", columns=["category", "Base AUC", "MIM AUC", "difference", "impressions"],
            rows=[[name or "(none)", *_pair(c)] for name, c in report["by_category"].items()],
        ),
        Section("Training loss, and validation after each epoch", images=["curves.png"]),
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
    return [formatted(part["base_auc"]), formatted(part["mim_auc"]), _signed(_difference(part)),
            f"{part['n']:,}"]  # fmt: skip


def _difference(part: Mapping[str, Any]) -> float | None:
    base, mim = part["base_auc"], part["mim_auc"]
    return None if base is None or mim is None else mim - base


def _signed(value: float | None) -> str:
    return formatted(value, "+.4f")


def _draw_differences(report: Mapping[str, Any]) -> Figure:
    """All differences that the report has, with their intervals."""
    figures = report["ctr"]
    lines = [("MIM − Base", figures["mim_minus_base_auc"], figures["mim_minus_base_ci"])]
    lines += [(name.replace("_", " "), v["gain"], v["ci"]) for name, v in report["variants"].items()]
    lines += [
        (f"control: {name.replace('_', ' ')}", c["gain"], c["ci"]) for name, c in report["controls"].items()
    ]
    figure, axes = subplots(figsize=(WIDTH, 0.9 + 0.32 * len(lines)))
    dots(axes, lines, MIM_COLOR)
    axes.set_xlabel("difference in test AUC, 95% interval", fontsize=9)
    return figure


def _draw_cold_start(sets: list[dict[str, Any]]) -> Figure:
    """AUC of both models by the age of items, and their difference with its interval."""
    figure, (left, right) = subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    for place, entry in enumerate(sets):
        base, mim = entry["base_auc"], entry["mim_auc"]
        if base is not None and mim is not None:
            left.plot([base, mim], [place, place], color=PALE_COLOR, linewidth=1.5, zorder=1)
    for label, key, color in (("Base", "base_auc", BASE_COLOR), ("MIM", "mim_auc", MIM_COLOR)):
        shown = [(entry[key], place) for place, entry in enumerate(sets) if entry[key] is not None]
        left.plot(*(np.array(shown).T if shown else ([], [])), "o", color=color, markersize=5, label=label)
    dots(right, [(entry["set"], _difference(entry), entry.get("ci")) for entry in sets], MIM_COLOR)
    left.set_xlabel("test AUC", fontsize=9)
    left.set_ylabel("items by age, S1 newest", fontsize=9)
    right.set_xlabel("MIM − Base, 95% interval", fontsize=9)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(left)
    left.grid(axis="x", alpha=0.25, linewidth=0.6)
    return figure


def _draw_curves(curves: dict[str, dict[str, Any]]) -> Figure:
    """Training loss by step, and on the right axis a validation metric by epoch, a ring at the best."""
    columns = min(2, max(len(curves), 1))
    rows = max(math.ceil(len(curves) / columns), 1)
    figure, grid = subplots(rows, columns, figsize=(WIDTH, 2.1 * rows), squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
        marker = "." if len(curve["step"]) < 3 else None
        axes.plot(curve["step"], curve["loss"], color=THIRD_COLOR, linewidth=1.2, marker=marker)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("training loss", fontsize=8, color=THIRD_COLOR)
        tidy(axes)
        _draw_validation(axes, curve)
    return figure


def _draw_validation(axes: Axes, curve: Mapping[str, Any]) -> None:
    metric = next((name for name in VALIDATION if curve["epochs"] and name in curve["epochs"][0]), None)
    if metric is None:
        return
    known = {
        entry["epoch"]: (step, entry[metric])
        for step, entry in zip(curve["epoch_step"], curve["epochs"], strict=True)
        if step is not None and entry[metric] is not None
    }
    other = axes.twinx()
    other.plot(
        *(np.array([*known.values()]).T if known else ([], [])),
        "o--",
        color=MIM_COLOR,
        markersize=4,
        linewidth=0.8,
    )
    if curve["best_epoch"] in known:
        other.plot(*known[curve["best_epoch"]], "o", markersize=9, markerfacecolor="none", color=MIM_COLOR)
    other.set_ylabel(VALIDATION[metric], fontsize=8, color=MIM_COLOR)
    other.tick_params(labelsize=8)
    other.spines["top"].set_visible(False)
