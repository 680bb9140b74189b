"""What content interest adds to items old and new: `make coldstart [DATA=<films>]`.

Figure 6 of the paper: test impressions in ten sets by the age of their item, and the gain of MIM over Base in
each; beside it, MIM trained with hidden item ids, which is ours.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

from benchmarks import corpora, demo
from benchmarks.corpora import Comparison, Corpus, Model
from benchmarks.stages import Run
from mim_torchrec import program
from mim_torchrec.ctr.config import UBM
from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.training import comparison
from mim_torchrec.training.comparison import target
from mim_torchrec.training.pages import Section, write_pages
from mim_torchrec.training.report import BASE_COLOR, MIM_COLOR, tidy, to_png

TUNING_SEED = 1000
HIDDEN = "mim-hidden-ids"
ID_DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Compare Base and MIM on items by age, and write a report."""

    data: Path | None = None
    """Folder with ratings.csv, movies.csv and posters.parquet; without it, films are left out."""
    out: Path = Path("runs/coldstart")
    """Directory of the run; a run that was interrupted there resumes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that are reported, fixed beforehand."""
    ubm: UBM = "sim"
    """User behavior model; the paper's is SIM."""
    shop: demo.DemoConfig = demo.DemoConfig()
    """The synthetic shop; its `out` and `seed` of training are not used."""
    jobs: int = 2
    """CTR runs side by side, one process and one thread each."""


def by_age(run: Run, runs: Comparison) -> list[dict[str, Any]]:
    """Figure 6: of every set, AUC of both models and what MIM gains, S1 the newest."""
    data = runs.corpus.data
    items = ItemStore.open(Dataset(data.out), run.root / "items" / data.name)
    of_item = age_sets(items)
    base, mim, hidden = (runs.runs[name] for name in ("base", "mim", HIDDEN))
    sets = comparison.cold_start(base, mim)
    for k, entry in enumerate(sets):
        ids = items.item_ids[of_item == k]
        found, other = (comparison.gain(base, models, items=ids) for models in (mim, hidden))
        entry |= {**found, "hidden_ids_gain": other["gain"], "hidden_ids_ci": other["ci"]}
    return sets


def summarize(corpus: Corpus, sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the newest gain most."""
    gains = [entry["gain"] for entry in sets]
    defined = [(k, value) for k, value in enumerate(gains) if value is not None]
    trend = spearmanr(*zip(*defined, strict=True)).statistic if len(defined) > 2 else None
    half = NUM_AGE_SETS // 2
    newer, older = (comparison.mean(part) for part in (gains[:half], gains[half:]))
    largest = max(defined, key=lambda entry: entry[1])[0] if defined else None
    has_all = newer is not None and older is not None
    return {
        "spearman_of_age_and_gain": None if trend is None or np.isnan(trend) else float(trend),
        "targets": [
            target(f"{corpus.name}: the newest tenth of the items gains", gains[0],
                   gains[0] is not None and gains[0] > 0),
            target(f"{corpus.name}: the set that gains most is one of the three newest; 0 is the newest",
                   largest, largest is not None and largest < 3),
            target(f"{corpus.name}: the newer half gains more than the older half, difference",
                   newer - older if has_all else None, has_all and newer > older),
        ],
    }  # fmt: skip


def draw(sets: list[dict[str, Any]]) -> bytes:
    """Gains by age with their intervals."""
    figure, axes = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
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


def section(corpus: Corpus, sets: list[dict[str, Any]], said: dict[str, Any]) -> Section:
    """The table of a corpus."""
    trend = said["spearman_of_age_and_gain"]
    text = [f"{corpus.title}. Rank correlation of age and gain: {'–' if trend is None else f'{trend:+.2f}'}."]
    text += [f"{'Met' if t['met'] else 'Not met'}: {t['claim']}." for t in said["targets"]]
    rows = [
        [e["set"], e["n"], e["positives"], _number(e["base_auc"], ".4f"), _number(e["mim_auc"], ".4f"),
         _number(e["gain"], "+.4f"), _interval(e["ci"]), _number(e["hidden_ids_gain"], "+.4f"),
         _interval(e["hidden_ids_ci"])]
        for e in sets
    ]  # fmt: skip
    columns = ["set", "impressions", "clicks", "Base", "MIM", "gain", "95% of users", "hidden ids: gain",
               "95% of users"]  # fmt: skip
    return Section(f"Figure 6: {corpus.name}", text=text, columns=columns, rows=rows,
                   pictures=[f"{corpus.name}.png"])  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(ci: list[float] | None) -> str:
    return "–" if ci is None else f"[{ci[0]:+.4f}, {ci[1]:+.4f}]"


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.coldstart`."""
    config = tyro.cli(ColdStartConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    run = Run(config.out)
    options = {**demo.CTR, "ubm": config.ubm}
    found = [corpora.shop(run, config.shop, options)]
    if config.data is not None:
        found.append(corpora.films(run, config.data.resolve(), options))
    report: dict[str, Any] = {}
    sections, pictures = [], {}
    for corpus in found:
        runs = Comparison(run, corpus, config.seeds, TUNING_SEED, config.jobs)
        runs.train(
            [
                Model(name="base", mim=False),
                Model(name="mim", mim=True),
                Model(name=HIDDEN, mim=True, options={"id-dropout": ID_DROPOUT}),
            ]
        )
        sets = by_age(run, runs)
        said = summarize(corpus, sets)
        part = {"sets": sets, **said, "settings": runs.tuning}
        report |= part if corpus.name == "shop" else {corpus.name: part}
        sections.append(section(corpus, sets, said))
        pictures[f"{corpus.name}.png"] = draw(sets)
    report |= {"stages": run.seconds, "config": dataclasses.asdict(config)}
    summary = (
        f"Test AUC of {config.ubm.upper()} without and with MIM, means of the seeds {list(config.seeds)}. "
        "The paper says that the newest items gain most and gives a plot without figures."
    )
    write_pages(report, "Figure 6: gains by the age of an item", summary, sections, pictures, run.root)
    print((run.root / "report.md").read_text())
    print(f"report: {config.out / 'report.html'}")


if __name__ == "__main__":
    program.run(main)
