"""What content interest adds to items old and new: `make coldstart [DATA=<films>]`.

Figure 6 of the paper: test impressions in ten sets by the age of their item, and the gain of MIM over Base in
each; beside it, MIM trained with hidden item ids, which is ours.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import spearmanr

from mim_torchrec import program
from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.drawing import BASE_COLOR, MIM_COLOR, subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, formatted, interval
from mim_torchrec.benchmarks.harness.stages import Run
from mim_torchrec.benchmarks.paper import shop
from mim_torchrec.benchmarks.paper.data_sets import DataSet
from mim_torchrec.benchmarks.paper.model_runs import Model, ModelRuns, ModelsConfig, write_experiment
from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset

HIDDEN = "mim-hidden-ids"
ID_DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig(ModelsConfig):
    """Compare Base and MIM on items by age, and write a report."""

    out: Path = Path("runs/coldstart")
    """Directory of the run; a run that was interrupted there resumes."""
    ubm: str = "sim"
    """User behavior model; the paper's is SIM."""


def by_age(run: Run, runs: ModelRuns) -> list[dict[str, Any]]:
    """Figure 6: of every set, AUC of both models and what MIM gains, S1 the newest."""
    data = runs.data_set.data
    items = ItemStore.read(Dataset(data.out), ("item_id", "listed_at"))
    of_item = age_sets(items)
    base, mim, hidden = (runs.runs[name] for name in ("base", "mim", HIDDEN))
    sets = comparison.cold_start(base, mim, items)
    for k, entry in enumerate(sets):
        other = comparison.gain(base, hidden, items=items.item_ids[of_item == k])
        entry |= {"hidden_ids_gain": other["gain"], "hidden_ids_ci": other["ci"]}
    return sets


def summarize(data_set: DataSet, sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the newest gain most."""
    gains = [entry["gain"] for entry in sets]
    defined = [(k, value) for k, value in enumerate(gains) if value is not None]
    trend = spearmanr(*zip(*defined, strict=True)).statistic if len(defined) > 2 else None
    half = NUM_AGE_SETS // 2
    newer, older = (comparison.mean(part) for part in (gains[:half], gains[half:]))
    largest = max(defined, key=lambda entry: entry[1])[0] if defined else None
    difference = newer - older if newer is not None and older is not None else None
    return {
        "spearman_of_age_and_gain": None if trend is None or np.isnan(trend) else float(trend),
        "targets": [
            target(f"{data_set.name}: the newest tenth of the items gains", gains[0],
                   gains[0] is not None and gains[0] > 0),
            target(f"{data_set.name}: the set that gains most is one of the three newest; 0 is the newest",
                   largest, largest is not None and largest < 3),
            target(f"{data_set.name}: the newer half gains more than the older half, difference",
                   difference, difference is not None and difference > 0),
        ],
    }  # fmt: skip


def draw(sets: list[dict[str, Any]]) -> bytes:
    """Gains by age with their intervals."""
    figure, axes = subplots(figsize=(7.4, 3.6))
    bars = ((-0.2, "", "MIM", MIM_COLOR),
            (0.2, "hidden_ids_", f"MIM, {ID_DROPOUT:.0%} of ids hidden", BASE_COLOR))  # fmt: skip
    for shift, key, label, color in bars:
        shown = [(k, entry) for k, entry in enumerate(sets) if entry[f"{key}gain"] is not None]
        place = np.array([k for k, _ in shown])
        gains = np.array([entry[f"{key}gain"] for _, entry in shown])
        low, high = np.array([entry[f"{key}ci"] for _, entry in shown]).T
        error = np.clip([gains - low, high - gains], 0, None)
        axes.bar(place + shift, gains, 0.38, yerr=error, label=label, color=color,
                 error_kw={"linewidth": 0.8})  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(sets)), [entry["set"] for entry in sets])
    axes.set_xlabel("items by age, S1 the newest tenth", fontsize=9)
    axes.set_ylabel("AUC over Base", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return to_png(figure)


def section(data_set: DataSet, sets: list[dict[str, Any]], said: dict[str, Any]) -> Section:
    """The table of a data set."""
    trend = said["spearman_of_age_and_gain"]
    text = [
        f"{data_set.title}. Rank correlation of age and gain: {'–' if trend is None else f'{trend:+.2f}'}."
    ]
    text += [f"{'Met' if t['met'] else 'Not met'}: {t['claim']}." for t in said["targets"]]
    rows = [
        [e["set"], e["n"], e["positives"], formatted(e["base_auc"]), formatted(e["mim_auc"]),
         formatted(e["gain"], "+.4f"), interval(e["ci"]), formatted(e["hidden_ids_gain"], "+.4f"),
         interval(e["hidden_ids_ci"])]
        for e in sets
    ]  # fmt: skip
    columns = ["set", "impressions", "clicks", "Base", "MIM", "gain", "95% of users", "hidden ids: gain",
               "95% of users"]  # fmt: skip
    return Section(f"Figure 6: {data_set.name}", text=text, columns=columns, rows=rows,
                   images=[f"{data_set.name}.png"])  # fmt: skip


def experiment(
    config: ColdStartConfig, run: Run, data_set: DataSet
) -> tuple[dict[str, Any], list[Section], bytes]:
    """The models on one data set."""
    runs = ModelRuns(run, data_set, config.seeds, config.jobs)
    hidden = Model(name=HIDDEN, mim=True, options={"id-dropout": ID_DROPOUT})
    runs.train([Model(name="base", mim=False), Model(name="mim", mim=True), hidden])
    sets = by_age(run, runs)
    said = summarize(data_set, sets)
    return {"sets": sets, **said, "settings": runs.tuning}, [section(data_set, sets, said)], draw(sets)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.coldstart`."""
    config = tyro.cli(ColdStartConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    summary = (
        f"Test AUC of {config.ubm.upper()} without and with MIM, means of the seeds {list(config.seeds)}. "
        "The paper says that the newest items gain most and gives a plot without figures."
    )
    options, title = {**shop.CTR, "ubm": config.ubm}, "Figure 6: gains by the age of an item"
    write_experiment(config, options, partial(experiment, config), title, summary)


if __name__ == "__main__":
    program.run(main)
