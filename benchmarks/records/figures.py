"""Images of the benchmark report: what each record shows, drawn from the record alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mim_torchrec.benchmarks.harness.drawing import (
    BASE_COLOR,
    MIM_COLOR,
    PALE_COLOR,
    THIRD_COLOR,
    subplots,
    tidy,
    to_png,
)
from mim_torchrec.benchmarks.harness.pages import number
from mim_torchrec.benchmarks.paper.efficiency.pages import PAPER, TITLES
from mim_torchrec.benchmarks.speed.scaling_pages import scaling

Record = Mapping[str, Any]


def panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """Axes side by side."""
    figure, axes = subplots(1, count, figsize=(4.6 * count, 3.2), squeeze=False)
    return figure, axes[0]


def bars(
    axes: Axes, series: Mapping[str, Sequence[float]], groups: Sequence[str], colors: Sequence[str],
    title: str, *, log: bool = False, show: Callable[[float], str] = number,
) -> None:  # fmt: skip
    """Groups of bars with their values above them."""
    drawn = axes.grouped_bar(dict(series), tick_labels=list(groups), colors=list(colors)[: len(series)])
    for container in drawn.bar_containers:  # type: ignore[attr-defined]  # matplotlib's stubs say it is a list
        axes.bar_label(container, [show(v) for v in container.datavalues], fontsize=7, padding=1)
    axes.set_title(title, fontsize=9)
    if log:
        axes.set_yscale("log")
    axes.margins(y=0.15)
    if len(series) > 1:
        axes.legend(fontsize=7)
    tidy(axes)


def efficiency(record: Record) -> Figure:
    """Operations and memory of the four rows beside the paper's."""
    figure, axes = panels(2)
    rows = record["rows"]
    for panel, key, place, title in ((axes[0], "gflops", 0, "training, GFLOPs a sample"),
                                     (axes[1], "memory_gb", 2, "training, peak memory (GB)")):  # fmt: skip
        series = {"ours": [rows[name]["train"][key] for name in rows],
                  "paper": [PAPER[name]["train"][place] for name in rows]}  # fmt: skip
        names = [TITLES[name].removeprefix("Base + ") for name in rows]
        bars(panel, series, names, (MIM_COLOR, BASE_COLOR), title, log=True)
    return figure


def frozen_table(record: Record) -> Figure:
    """Step time, memory and lookups of four variants."""
    figure, axes = panels(3)
    names = {"frozen": "frozen", "trainable": "trainable", "lr0": "lr 0", "unsharded": "unsharded"}
    colors = (MIM_COLOR, PALE_COLOR)
    for panel, part, key, scale, title in (
        (axes[0], "step", "seconds", 1e3, "a step (ms)"),
        (axes[1], "memory", "bytes", 2.0**-20, "memory of a rank (MiB)"),
    ):
        series = {f"{ranks} rank(s)": [scale * own[name][key] for name in names]
                  for ranks, own in record[part].items()}  # fmt: skip
        bars(panel, series, list(names.values()), colors, title, show="{:.0f}".format)
    bars(axes[2], {"": [own["vs_index_select"] for own in record["lookup"].values()]}, list(record["lookup"]),
         colors, "rows a second, over index_select", show="{:.2f}".format)  # fmt: skip
    axes[2].axhline(1, color="gray", linewidth=0.6)
    return figure


def csft_loss(record: Record) -> Figure:
    """Memory and time beside the loss that is written with the whole matrix."""
    figure, axes = panels(2)
    own, beside = record["paper_scale"], record["naive"]
    bars(axes[0], {"": [own["logits_mib"], own["extra_mib"]]}, ["matrix of logits", "ours"], (MIM_COLOR,),
         f"MiB, {own['queries']:,} queries against {own['items']:,} items", log=True)  # fmt: skip
    series = {name: [beside[f"{key}_seconds{part}"] for part in ("", "_all_gradients")]
              for name, key in (("naive", "naive"), ("ours", "tiled"))}  # fmt: skip
    bars(axes[1], series, ["items of a queue", "a gradient for all"], (BASE_COLOR, MIM_COLOR),
         "seconds, where both fit", show="{:.2f}".format)  # fmt: skip
    return figure


def export_throughput(record: Record) -> Figure:
    """Items a second of export over those of forward passes alone."""
    figure, axes = panels(1)
    encoders = record["encoders"]
    threads = list(next(iter(encoders.values())))
    series = {f"{count} thread(s)": [own[count]["ratio"] for own in encoders.values()] for count in threads}
    bars(axes[0], series, [name.replace(":", ", ") + " px" for name in encoders], (PALE_COLOR, MIM_COLOR),
         "items a second, export over bare forward passes", show="{:.2f}".format)  # fmt: skip
    axes[0].axhline(1, color="gray", linewidth=0.6)
    return figure


def ctr_throughput(record: Record) -> Figure:
    """Samples a second over FuxiCTR's."""
    figure, axes = panels(2)
    for panel, key, title in ((axes[0], "models", "1 candidate a history"),
                              (axes[1], "models_5_candidates", "5 candidates a history")):  # fmt: skip
        own = record[key]
        dims = list(next(iter(own.values())))
        series = {f"dim {dim}": [by_dim[dim]["ratio"] for by_dim in own.values()] for dim in dims}
        bars(panel, series, [name.upper() for name in own], (PALE_COLOR, MIM_COLOR),
             f"samples per CPU-second over FuxiCTR's, {title}", show="{:.1f}".format)  # fmt: skip
        panel.axhline(1, color="gray", linewidth=0.6)
    return figure


def rim_latency(record: Record) -> Figure:
    """From arrival to lookup, single items and bursts."""
    figure, axes = panels(2)
    for panel, part, title in ((axes[0], "", "an item at a time"), (axes[1], "burst_", "bursts")):
        places = [(store, way) for store, by_way in record[f"{part}p50_ms"].items() for way in by_way]
        series = {name: [record[f"{part}{name}_ms"][store][way] for store, way in places]
                  for name in ("p50", "p99")}  # fmt: skip
        bars(panel, series, [f"{store},\n{way}" for store, way in places], (PALE_COLOR, MIM_COLOR),
             f"arrival to lookup (ms), {title}", show="{:.0f}".format)  # fmt: skip
    return figure


def serving(record: Record) -> Figure:
    """Interests by the form they are computed in, and answers over HTTP, by length of the history."""
    figure, axes = panels(len(record["forms"]) + 1)
    forms = (("direct", BASE_COLOR, "direct sum"), ("matrix", MIM_COLOR, "matrix built"),
             ("cached", THIRD_COLOR, "matrix known"))  # fmt: skip
    for panel, (dim, by_length) in zip(axes, record["forms"].items(), strict=False):
        lengths = [int(length) for length in by_length]
        for key, color, label in forms:
            panel.plot(lengths, [own[f"{key}_ms"] for own in by_length.values()], marker=".", color=color,
                       label=label)  # fmt: skip
        panel.set_title(f"content and fusion interest (ms), d = {dim}", fontsize=9)
    for (model, by_length), color in zip(record["models"].items(), (MIM_COLOR, THIRD_COLOR, BASE_COLOR),
                                         strict=False):  # fmt: skip
        lengths = [int(length) for length in by_length]
        for key, style in (("p50_ms", "-"), ("p99_ms", "--")):
            axes[-1].plot(lengths, [own[key] for own in by_length.values()], style, marker=".", color=color,
                          label=f"{model}, {key[:3]}")  # fmt: skip
    axes[-1].set_title("a request over HTTP (ms)", fontsize=9)
    for panel in axes:
        panel.set(xscale="log", yscale="log", xlabel="behaviors")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(fontsize=7)
        tidy(panel)
    return figure


def windows(record: Record) -> Figure:
    """What a window costs by the number of windows before."""
    figure, axes = panels(1)
    costs = record["microseconds"]
    ages = [f"{int(age):,}" for age in next(iter(costs.values()))]
    series = {step.replace("_", " "): list(by_age.values()) for step, by_age in costs.items()}
    bars(axes[0], {age: [own[k] for own in series.values()] for k, age in enumerate(ages)}, list(series),
         (PALE_COLOR, THIRD_COLOR, MIM_COLOR), "CPU (µs) by windows before", log=True,
         show="{:.0f}".format)  # fmt: skip
    return figure


def reader_input(record: Record) -> Figure:
    """The reader beside a raw scan, its memory, and what a start takes by the size of the data."""
    figure, axes = panels(3)
    reader, names = record["reader"], [f"{int(rows):,}" for rows in record["reader"]["cpu_over_raw"]]
    bars(axes[0], {"": list(reader["cpu_over_raw"].values())}, names, (MIM_COLOR,),
         "CPU over a raw scan, by rows of a row group", show="{:.2f}".format)  # fmt: skip
    axes[0].axhline(1, color="gray", linewidth=0.6)
    bars(axes[1], {"": list(reader["peak_mib_by_row_group"].values())}, names, (THIRD_COLOR,),
         "memory (MiB), by rows of a row group", show="{:.0f}".format)  # fmt: skip
    parts = record["startup_parts"]
    series = {"start": [own["seconds"] for own in parts.values()],
              "scan of ids": [own["scan"] for own in parts.values()]}  # fmt: skip
    bars(axes[2], series, [f"{size}×" for size in parts], (PALE_COLOR, MIM_COLOR), "start (s), by data",
         show="{:.1f}".format)  # fmt: skip
    return figure


def prepare(record: Record) -> Figure:
    """Preparation beside the bare query, and its rate and memory by the size of the log."""
    figure, axes = panels(3)
    bars(axes[0], {"": [record["bare_seconds"], record["seconds"]]}, ["read, sort, write", "mim prepare"],
         (PALE_COLOR,), "seconds", show="{:.1f}".format)  # fmt: skip
    sizes = list(record["scale"]["sizes"].values())
    names = [f"{one['events'] / 1e6:.1f} M" for one in sizes]
    bars(axes[1], {"": [one["events_per_cpu_second"] for one in sizes]}, names, (MIM_COLOR,),
         "events a second of CPU, by events", show="{:,.0f}".format)  # fmt: skip
    bars(axes[2], {"": [one["added_mib"] for one in sizes]}, names, (THIRD_COLOR,),
         "memory beyond the start (MiB), by events", show="{:.0f}".format)  # fmt: skip
    return figure


def chaos(record: Record) -> Figure:
    """Kills by process, and what was compared."""
    figure, axes = panels(2)
    outcomes = record["transports"].values()
    names = list(next(iter(outcomes))["kills"])
    kills = [sum(o["kills"].get(name, 0) for o in outcomes) for name in names]
    working = [sum(o["at_work"].get(name, 0) for o in outcomes) for name in names]
    bars(axes[0], {"killed": kills, "of them at work": working}, names, (PALE_COLOR, MIM_COLOR), "SIGKILLs",
         show="{:.0f}".format)  # fmt: skip
    parts = ["log", *next(iter(outcomes))["readers"]]
    found = {part: [o["log"] if part == "log" else o["readers"][part] for o in outcomes] for part in parts}
    bars(axes[1], {"compared": [sum(f["rows"] for f in own) for own in found.values()],
                   "wrong, lost or doubled": [sum(f["wrong"] + f["lost"] + f["doubled"] for f in own)
                                              for own in found.values()]},
         parts, (THIRD_COLOR, MIM_COLOR), "rows", show="{:,.0f}".format)  # fmt: skip
    return figure


DRAWN: Mapping[str, Callable[[Record], Figure]] = {
    draw.__name__: draw
    for draw in (efficiency, scaling, frozen_table, csft_loss, export_throughput, ctr_throughput, rim_latency,
                 serving, windows, prepare, chaos)
} | {"input": reader_input}  # fmt: skip


def draw(name: str, record: Record) -> bytes:
    """The image of a benchmark, as PNG."""
    return to_png(DRAWN[name](record))
