"""What the parts of CiUBM are worth in click prediction: `make ablation-ciubm [DATA=<films>]`.

The lower half of the paper's Table 5 on a synthetic shop and, with a folder of MovieLens and posters, on
films too; below it what goes beyond the paper, one switch at a time. All runs have the settings of MIM:
nothing is tuned for a row.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import deviation
from mim_torchrec.benchmarks.harness.drawing import BASE_COLOR, MIM_COLOR, subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, formatted, interval
from mim_torchrec.benchmarks.harness.stages import Run
from mim_torchrec.benchmarks.paper import shop
from mim_torchrec.benchmarks.paper.data_sets import DataSet, Options
from mim_torchrec.benchmarks.paper.model_runs import Model, ModelRuns, ModelsConfig, write_experiment


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


MIM_PAPER_AUC = 0.7062
TABLE5 = (
    Version("MIM", {}, MIM_PAPER_AUC),
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
class AblationConfig(ModelsConfig):
    """Measure what the parts of CiUBM are worth, and write a report."""

    out: Path = Path("runs/ablation_ciubm")
    """Directory of the run; a run that was interrupted there resumes."""
    ubm: str = "sim"
    """User behavior model; the paper's is SIM."""


def line(runs: ModelRuns, version: Version) -> dict[str, Any]:
    """A row: AUC, and its difference from MIM."""
    name = version.model.name
    auc, mim = (np.array(runs.auc(model)) for model in (name, MIM.name))
    return {
        "version": version.name,
        "auc_mean": float(auc.mean()),
        "auc_std": deviation(auc),
        "delta": float((auc - mim).mean()),
        "delta_std": deviation(auc - mim),
        "ci": runs.gain(MIM.name, name)["ci"],
        "paper_auc": version.paper_auc,
        "paper_delta": None if version.paper_auc is None else round(version.paper_auc - MIM_PAPER_AUC, 4),
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


def section(data_set: DataSet, heading: str, text: list[str], lines: list[dict[str, Any]]) -> Section:
    """A table of rows."""
    rows = [
        [row["version"], f"{row['auc_mean']:.4f}", formatted(row["auc_std"]), f"{row['delta']:+.4f}",
         formatted(row["delta_std"]), interval(row["ci"]),
         formatted(row["paper_delta"], "+.4f")]
        for row in lines
    ]  # fmt: skip
    columns = ["version", "AUC", "± seeds", "Δ from MIM", "± seeds", "95% of users", "paper's Δ"]
    return Section(f"{heading}: {data_set.name}", text=text, columns=columns, rows=rows)


def draw(lines: list[dict[str, Any]]) -> bytes:
    """Differences from MIM, ours beside the paper's."""
    figure, axes = subplots(figsize=(7, 3.8))
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


def experiment(
    config: AblationConfig, run: Run, data_set: DataSet
) -> tuple[dict[str, Any], list[Section], bytes]:
    """The versions on one data set."""
    runs = ModelRuns(run, data_set, config.seeds, config.jobs)
    runs.train([MIM])
    chosen = runs.tuning[MIM.name]["chosen"]
    runs.train((version.model for version in (*TABLE5[1:], *BEYOND)), setting=chosen)
    table5, beyond = ([line(runs, version) for version in part] for part in (TABLE5, BEYOND))
    title = f"{data_set.title}; {config.ubm.upper()}."
    sections = [
        section(data_set, "Table 5, CiUBM: what is left out", [title, *other_signs(table5)], table5),
        section(data_set, "Beyond the paper: what is changed or added", [title], beyond),
        Section(f"Differences from MIM: {data_set.name}", images=[f"{data_set.name}.png"]),
    ]
    return {"table5": table5, "beyond": beyond, "setting": chosen}, sections, draw(table5[1:] + beyond)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.ablation_ciubm`."""
    config = tyro.cli(AblationConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    summary = (
        f"AUC on test requests, means of the seeds {list(config.seeds)}; ± is the standard deviation over "
        "the seeds, the interval is of the mean difference, by resampling users."
    )
    options, title = {**shop.CTR, "ubm": config.ubm}, "What the parts of CiUBM are worth"
    write_experiment(config, options, partial(experiment, config), title, summary)


if __name__ == "__main__":
    program.run(main)
