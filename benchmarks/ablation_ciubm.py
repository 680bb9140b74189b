"""What the parts of CiUBM are worth in click prediction: `make ablation-ciubm [DATA=<films>]`.

The lower half of the paper's Table 5 on a synthetic shop and, with a folder of MovieLens and posters, on
films too; below it what goes beyond the paper, one switch at a time. All runs have the settings of MIM:
nothing is tuned for a row.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import pyplot as plt

from benchmarks import corpora, demo
from benchmarks.corpora import Comparison, Corpus, Model, Options
from benchmarks.stages import Run
from mim_torchrec import program
from mim_torchrec.ctr.config import UBM
from mim_torchrec.training.comparison import deviation
from mim_torchrec.training.pages import Section, write_pages
from mim_torchrec.training.report import BASE_COLOR, MIM_COLOR, tidy, to_png

TUNING_SEED = 1000


@dataclass(frozen=True)
class Version:
    """A row: what it changes, and its AUC in the paper's Table 5 where it is there."""

    name: str
    options: Options
    paper_auc: float | None = None
    mim: bool = True

    @property
    def model(self) -> Model:
        """The CTR model of the row, by a name that a file can have."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return Model(name=name, mim=self.mim, options=self.options)


TABLE5 = (
    Version("MIM", {}, 0.7062),
    Version("w/o ID interest", {"id-interest": False}, 0.7057),
    Version("w/o content interest", {"content-interest": False}, 0.7052),
    Version("w/o fusion interest", {"fusion-interest": False}, 0.7054),
    Version("Base", {}, 0.7024, mim=False),
)
MIM = TABLE5[0].model
BEYOND = (
    Version("sums, without products", {"dot_product_features": False, "content-pooling": "sum"}),
    Version("+ similarity interest", {"similarity-interest": True}),
    Version("+ temperature", {"content-temperature": 0.2}),
    Version("+ content dropout", {"content-dropout": 0.1}),
    Version("+ ID dropout", {"id-dropout": 0.1}),
    Version("+ similarity interest, temperature", {"similarity-interest": True, "content-temperature": 0.2}),
)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Measure what the parts of CiUBM are worth, and write a report."""

    data: Path | None = None
    """Folder with ratings.csv, movies.csv and posters.parquet; without it, films are left out."""
    out: Path = Path("runs/ablation_ciubm")
    """Directory of the run; a run that was interrupted there resumes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that are reported, fixed beforehand."""
    ubm: UBM = "sim"
    """User behavior model; the paper's is SIM."""
    shop: demo.DemoConfig = demo.DemoConfig()
    """The synthetic shop; its `out` and `seed` of training are not used."""
    jobs: int = 2
    """CTR runs side by side, one process and one thread each."""


def line(runs: Comparison, version: Version) -> dict[str, Any]:
    """A row: AUC, and its difference from MIM."""
    name = version.model.name
    auc, mim = (np.array(runs.auc(model)) for model in (name, MIM.name))
    paper = TABLE5[0].paper_auc
    return {
        "version": version.name,
        "auc_mean": float(auc.mean()),
        "auc_std": deviation(auc),
        "delta": float((auc - mim).mean()),
        "delta_std": deviation(auc - mim),
        "ci": runs.gain(MIM.name, name)["ci"],
        "paper_auc": version.paper_auc,
        "paper_delta": None if version.paper_auc is None else round(version.paper_auc - paper, 4),
        "options": dict(version.options),
    }


def other_signs(lines: list[dict[str, Any]]) -> list[str]:
    """Parts that are not missed here as they are in the paper, in words."""
    said = [
        f"{row['version']} is {row['delta']:+.4f} from MIM here, {row['paper_delta']:+.4f} in the paper."
        for row in lines
        if row["paper_delta"] and row["delta"] * row["paper_delta"] < 0
    ]
    return said or ["Whatever the paper misses is missed here."]


def section(corpus: Corpus, heading: str, text: list[str], lines: list[dict[str, Any]]) -> Section:
    """A table of rows."""
    rows = [
        [row["version"], f"{row['auc_mean']:.4f}", _or_dash(row["auc_std"], ".4f"), f"{row['delta']:+.4f}",
         _or_dash(row["delta_std"], ".4f"), f"[{row['ci'][0]:+.4f}, {row['ci'][1]:+.4f}]",
         _or_dash(row["paper_delta"], "+.4f")]
        for row in lines
    ]  # fmt: skip
    columns = ["version", "AUC", "± seeds", "Δ from MIM", "± seeds", "95% of users", "paper's Δ"]
    return Section(f"{heading}: {corpus.name}", text=text, columns=columns, rows=rows)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(lines: list[dict[str, Any]]) -> bytes:
    """Differences from MIM, ours beside the paper's."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    place = np.arange(len(lines))
    axes.barh(place - 0.2, [row["delta"] for row in lines], 0.38, label="here", color=MIM_COLOR,
              xerr=[row["delta_std"] or 0.0 for row in lines], error_kw={"linewidth": 0.8})  # fmt: skip
    axes.barh(place + 0.2, [row["paper_delta"] or 0.0 for row in lines], 0.38, label="paper, Table 5",
              color=BASE_COLOR)  # fmt: skip
    axes.set_yticks(place, [row["version"] for row in lines])
    axes.invert_yaxis()
    axes.set_xlabel("AUC over MIM", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return to_png(figure)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.ablation_ciubm`."""
    config = tyro.cli(AblationConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    run = Run(config.out)
    options = {**demo.CTR, "ubm": config.ubm}
    found = [corpora.shop(run, config.shop, options)]
    if config.data is not None:
        found.append(corpora.films(run, config.data.resolve(), options))
    report: dict[str, Any] = {}
    sections, pictures = [], {}
    for corpus in found:
        runs = Comparison(run, corpus, config.seeds, TUNING_SEED, config.jobs)
        runs.train([MIM])
        chosen = runs.tuning[MIM.name]["chosen"]
        runs.train((version.model for version in (*TABLE5[1:], *BEYOND)), setting=chosen)
        table5, beyond = ([line(runs, version) for version in part] for part in (TABLE5, BEYOND))
        part = {"table5": table5, "beyond": beyond, "setting": chosen}
        report |= part if corpus.name == "shop" else {corpus.name: part}
        title = f"{corpus.title}; {config.ubm.upper()}."
        sections += [
            section(corpus, "Table 5, CiUBM: what is left out", [title, *other_signs(table5)], table5),
            section(corpus, "Beyond the paper: what is changed or added", [title], beyond),
            Section(f"Differences from MIM: {corpus.name}", pictures=[f"{corpus.name}.png"]),
        ]
        pictures[f"{corpus.name}.png"] = draw(table5[1:] + beyond)
    report |= {"stages": run.seconds, "config": dataclasses.asdict(config)}
    summary = (
        f"AUC on test requests, means of the seeds {list(config.seeds)}; ± is the standard deviation over "
        "the seeds, the interval is of the mean difference, by resampling users."
    )
    write_pages(report, "What the parts of CiUBM are worth", summary, sections, pictures, run.root)
    print((run.root / "report.md").read_text())
    print(f"report: {config.out / 'report.html'}")


if __name__ == "__main__":
    program.run(main)
