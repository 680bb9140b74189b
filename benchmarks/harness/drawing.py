"""How all figures look. Figures are made without pyplot, which keeps global state and chooses a display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASE_COLOR, MIM_COLOR, THIRD_COLOR, PALE_COLOR = "#8a94a6", "#c2410c", "#3b6ea5", "#e3b29b"


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **words: Any) -> Any:
    """A figure and its axes, as `matplotlib.pyplot.subplots` returns them."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **words)


def to_png(figure: Figure) -> bytes:
    """The bytes of a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def tidy(axes: Axes) -> None:
    """Make axes look as in all reports."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def beside_the_paper(
    axes: Axes, names: Sequence[str], lines: Sequence[Mapping[str, Any]], **words: Any
) -> None:
    """Bars of differences here and in the paper.

    Args:
        axes: to draw on.
        names: of the lines.
        lines: with `delta`, `delta_std` (None of a single seed) and `paper_delta`.
        words: how the names are set.
    """
    place = np.arange(len(lines))
    axes.bar(place - 0.2, [row["delta"] for row in lines], 0.38, label="here", color=MIM_COLOR,
             yerr=[row["delta_std"] or 0.0 for row in lines], error_kw={"linewidth": 0.8})  # fmt: skip
    axes.bar(place + 0.2, [row["paper_delta"] for row in lines], 0.38, label="paper", color=BASE_COLOR)
    axes.set_xticks(place, names, **words)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)


def dots(axes: Axes, lines: Sequence[tuple[str, float | None, Sequence[float] | None]], color: str) -> None:
    """Differences as dots with their intervals beside a line at zero, the first one at the top.

    Args:
        axes: to draw on.
        lines: name, value and interval of each; a value that is undefined (None) has no dot.
        color: of the dots.
    """
    for place, (_, value, ci) in enumerate(lines):
        if value is not None:
            axes.plot(value, place, "o", color=color, markersize=5)
        if ci is not None:
            axes.plot(ci, [place, place], color=color, linewidth=1.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    tidy(axes)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.grid(axis="y", visible=False)
