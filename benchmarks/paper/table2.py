"""What content interest adds to six user behavior models: `make table2 [DATA=<films>] [SUBSETS=1]`.

Table 2 of the paper on a synthetic shop and, with a folder of MovieLens and posters, on films too. Base and
Base+MIM of a model have the same settings; where a data set has a grid, each chooses from it on validation.
With SUBSETS=1 the shop has the paper's eight columns: all requests and seven categories (`subsets.py`).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import deviation, target
from mim_torchrec.benchmarks.harness.drawing import beside_the_paper, subplots, to_png
from mim_torchrec.benchmarks.harness.pages import Section, interval
from mim_torchrec.benchmarks.harness.stages import Run
from mim_torchrec.benchmarks.paper import shop, subsets
from mim_torchrec.benchmarks.paper.data_sets import DataSet
from mim_torchrec.benchmarks.paper.model_runs import (
    TUNING_SEED,
    Model,
    ModelRuns,
    ModelsConfig,
    write_experiment,
)
from mim_torchrec.domains import Count, check_domains

DIN_TARGET = 0.760
OF_SUBSETS = ("base_auc", "base_std", "mim_auc", "mim_std", "delta", "delta_std", "ci", "per_seed")


@dataclass(frozen=True, kw_only=True)
class Table2Config(ModelsConfig):
    """Compare six user behavior models without and with MIM, and write a report."""

    out: Path = Path("runs/table2")
    """Directory of the run; a run that was interrupted there resumes."""
    models: tuple[str, ...] = ("avg_pooling", "din", "dien", "bst", "sim", "twin")
    """User behavior models."""
    subsets: bool = False
    """Train and test on the subsets of categories of the shop as well, which takes several times as long."""
    categories: Count = 7
    """Categories that have a subset, those with the most impressions."""


def compare(run: Run, data_set: DataSet, config: Table2Config) -> ModelRuns:
    """Train every model without and with MIM."""
    runs = ModelRuns(run, data_set, config.seeds, config.jobs)
    runs.train(
        Model(name=f"{ubm}-{kind}", mim=kind == "mim", options={"ubm": ubm})
        for ubm in config.models for kind in ("base", "mim")
    )  # fmt: skip
    return runs


def line(runs: ModelRuns, ubm: str) -> dict[str, Any]:
    """A model's line: ours beside the paper's."""
    base, mim = (np.array(runs.auc(f"{ubm}-{kind}")) for kind in ("base", "mim"))
    gain = runs.gain(f"{ubm}-base", f"{ubm}-mim")
    paper_base, paper_mim, paper_delta = (values[0] for values in subsets.PAPER[ubm])
    return {
        "base_auc": float(base.mean()),
        "base_std": deviation(base),
        "mim_auc": float(mim.mean()),
        "mim_std": deviation(mim),
        "delta": float((mim - base).mean()),
        "delta_std": deviation(mim - base),
        "ci": gain["ci"],
        "per_seed": gain["per_seed"],
        "paper_base_auc": paper_base,
        "paper_mim_auc": paper_mim,
        "paper_delta": paper_delta,
        "reaches_paper_delta": bool((mim - base).mean() >= paper_delta),
        "settings": {kind: runs.tuning[f"{ubm}-{kind}"] for kind in ("base", "mim")},
    }


def targets(data_set: DataSet, lines: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the data set is to show."""
    found = [
        target(f"{data_set.name}: {ubm} gains by MIM, mean of the seeds", row["delta"], row["delta"] > 0)
        for ubm, row in lines.items()
    ]
    if data_set.grid and "din" in lines:
        auc = lines["din"]["base_auc"]
        found.append(target(f"{data_set.name}: Base of DIN is at least {DIN_TARGET}", auc, auc >= DIN_TARGET))
    return found


def section(data_set: DataSet, lines: dict[str, dict[str, Any]]) -> Section:
    """The table of a data set."""
    reached = [ubm for ubm, row in lines.items() if row["reaches_paper_delta"]]
    text = [f"{data_set.title}. The paper's Δ is reached by {', '.join(reached) or 'no model'}."]
    if data_set.grid:
        text.append(f"Settings of each model and kind were chosen from {len(data_set.grid)} on the "
                    f"validation AUC of seed {TUNING_SEED}, which is not reported.")  # fmt: skip
    rows = [
        [ubm, f"{row['base_auc']:.4f}{_plus_minus(row['base_std'])}",
         f"{row['mim_auc']:.4f}{_plus_minus(row['mim_std'])}",
         f"{row['delta']:+.4f}{_plus_minus(row['delta_std'])}",
         interval(row["ci"]), f"{row['paper_delta']:+.4f}"]
        for ubm, row in lines.items()
    ]  # fmt: skip
    columns = ["model", "Base", "Base+MIM", "Δ ± seeds", "95% of users", "paper's Δ"]
    return Section(f"Table 2: {data_set.name}", text=text, columns=columns, rows=rows,
                   images=[f"{data_set.name}.png"])  # fmt: skip


def _plus_minus(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"


def draw(lines: dict[str, dict[str, Any]]) -> bytes:
    """Our gains beside the paper's."""
    figure, axes = subplots(figsize=(7, 3.4))
    beside_the_paper(axes, list(lines), list(lines.values()))
    axes.set_ylabel("AUC of MIM over Base", fontsize=9)
    return to_png(figure)


def experiment(
    config: Table2Config, run: Run, data_set: DataSet
) -> tuple[dict[str, Any], list[Section], bytes]:
    """The models on one data set."""
    runs = compare(run, data_set, config)
    lines = {ubm: line(runs, ubm) for ubm in config.models}
    part: dict[str, Any] = {"models": lines, "targets": targets(data_set, lines)}
    sections = [section(data_set, lines)]
    if config.subsets and data_set.name == "shop":
        part["subsets"], more = by_category(config, run, data_set, lines)
        sections += more
    return part, sections, draw(lines)


def by_category(
    config: Table2Config, run: Run, data_set: DataSet, lines: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], list[Section]]:
    """The models on the subset of every category, beside those on all requests."""
    requests = subsets.read_requests(data_set.data.out)
    columns = [subsets.ALL, *subsets.largest_categories(requests, config.categories)]
    counts = {subsets.ALL: subsets.counts(requests)}
    table: dict[str, dict[str, Any]] = {ubm: {subsets.ALL: lines[ubm]} for ubm in config.models}
    for place, category in enumerate(columns[1:]):
        folder = run.root / "shop-subsets" / f"category-{place}"
        out = subsets.write_subset(data_set.data.out, requests, category, folder)
        counts[category] = subsets.counts(subsets.read_requests(out))
        own = dataclasses.replace(
            data_set, name=f"shop-category-{place}", data=dataclasses.replace(data_set.data, out=out)
        )
        runs = compare(run, own, config)
        for ubm in config.models:
            found = line(runs, ubm)
            table[ubm][category] = {name: found[name] for name in OF_SUBSETS}
    report = {"columns": columns, "counts": counts, "models": table}
    return report, subsets.sections(columns, table, counts)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.table2`."""
    config = tyro.cli(Table2Config, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)
    summary = (
        f"AUC on test requests, means of the seeds {list(config.seeds)}; ± is the standard deviation over "
        "the seeds, the interval is of the mean gain, by resampling users."
    )
    title = "Table 2: six user behavior models without and with MIM"
    write_experiment(config, shop.CTR, partial(experiment, config), title, summary)


if __name__ == "__main__":
    program.run(main)
