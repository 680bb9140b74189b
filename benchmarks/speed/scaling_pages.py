"""The pages of `scaling`; what is measured and what is simulated do not share a table."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from mim_torchrec.benchmarks.harness.drawing import BASE_COLOR, MIM_COLOR, subplots, tidy
from mim_torchrec.benchmarks.harness.pages import Section, targets_section

AXES = {"history": "longest history", "batch": "candidates a step of a rank",
        "table_rows": "rows of the frozen table"}  # fmt: skip
IMAGE = "scaling.png"


def scaling(report: Mapping[str, Any]) -> Figure:
    """Step time by axis, and bytes a GPU by cluster."""
    figure, panels = subplots(1, 4, figsize=(15, 3.6))
    for panel, (axis, name) in zip(panels, AXES.items(), strict=False):
        for ranks, own in report["measured"].items():
            for model, color, label in (("base", BASE_COLOR, "Base"), ("mim", MIM_COLOR, "MIM")):
                known = {int(v): f[model]["step_ms"] for v, f in own[axis].items() if model in f}
                if known:
                    panel.plot(known.keys(), known.values(), "-" if ranks == "1" else "--", color=color,
                               marker=".", label=f"{label}, {ranks} rank(s)")  # fmt: skip
        panel.set(xlabel=name, ylabel="step (ms), measured")
    last = panels[-1]
    for items in dict.fromkeys(row["items"] for row in report["simulated"]):
        own = [row for row in report["simulated"] if row["items"] == items and row["fits"]]
        last.plot([row["gpus"] for row in own], [row["hbm_gib"] + row["host_gib"] for row in own], marker=".",
                  label=f"{items / 1e6:,.0f} M items")  # fmt: skip
    last.set(xlabel="GPUs", ylabel="GiB a GPU, simulated")
    for panel in panels:
        panel.set(xscale="log", yscale="log")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.yaxis.set_major_formatter("{x:g}")
        for side in (panel.xaxis, panel.yaxis):
            side.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=7)
        tidy(panel)
    return figure


def sections(report: dict[str, Any]) -> list[Section]:
    """The sections of the report."""
    pages = []
    for axis, heading in AXES.items():
        rows = []
        for ranks, own in report["measured"].items():
            for value, by_model in own[axis].items():
                base, mim = by_model.get("base"), by_model["mim"]
                cells = [f"{int(value):,}", ranks, f"{mim['step_ms']:.1f}", f"{mim['step_mb']:.0f}"]
                if axis == "table_rows":
                    cells += [f"{mim['table_gb']:.2f}", f"{mim['table_private_mb']:.0f}"]
                else:
                    cells += [f"{base['step_ms']:.1f}", f"{base['step_mb']:.0f}",
                              f"{by_model['mim_over_base']['step_ms']:.2f}",
                              f"{by_model['mim_over_base']['step_mb']:.2f}"]  # fmt: skip
                rows.append(cells)
        more = (["table, GB on disk", "private memory of it, MB"] if axis == "table_rows" else
                ["Base: step, ms", "Base: memory, MB", "MIM over Base: step", "memory"])  # fmt: skip
        columns = [heading, "ranks", "MIM: step, ms", "MIM: memory of a step, MB", *more]
        pages.append(Section(f"Measured: {heading}", rows=rows, columns=columns))
    lines = []
    for ranks, growth in report["growth"].items():
        for axis in ("history", "batch"):
            mim, base = growth[axis]["mim"], growth[axis]["base"]
            lines.append(
                f"{ranks} rank(s), {AXES[axis]}: the step of MIM grows with the power {mim['step_ms']:.2f} "
                f"of it in time and {mim['step_mb']:.2f} in memory; that of Base with {base['step_ms']:.2f} "
                f"and {base['step_mb']:.2f}."
            )
    pages.append(Section("Growth", text=lines, images=[IMAGE]))
    pages.append(Section(
        "Simulated: where a table would go",
        text=["By TorchRec's planner, for fp16 vectors; nothing of it ran. Host memory is of the machine, "
              "divided by its GPUs."],
        columns=["items", "GPUs", "table, GiB", "sharding", "memory", "HBM a GPU, GiB", "host a GPU, GiB"],
        rows=[[f"{row['items']:,}", row["gpus"], f"{row['table_gib']:,.0f}",
               *([row["sharding"], row["kernel"], f"{row['hbm_gib']:.1f}", f"{row['host_gib']:.1f}"]
                 if row["fits"] else ["does not fit", "–", "–", "–"])]
              for row in report["simulated"]],
    ))  # fmt: skip
    pages.append(targets_section(report["targets"]))
    return pages
