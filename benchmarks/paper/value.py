"""Whether MIM ever loses to something simpler: `make value [DATA=<films>]`.

Cells of data (shop, films), share of the training requests and user behavior model. In each cell, for every
seed: Base, the content-only form of MIM (no id of anything), logistic regression on statistics of the
relevance (`alpha_regression.py`), the ensemble of these three (mean of their log-odds), and MIM by the preset
`recommended`, which shrinks embeddings of rare ids, in Base too. Nothing is tuned for a row. Vectors are
those of the whole data set, as an encoder needs no click log.

Every seed of a cell is kept when it is done, so an interrupted run goes on where it was, and `--only`,
`--share`, `--ubm` and `--seeds` run parts whose results come together in one report.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from scipy.special import logit

from mim_torchrec import program
from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, formatted, targets_section, write_pages
from mim_torchrec.benchmarks.harness.stages import Run
from mim_torchrec.benchmarks.paper import alpha_regression, films, subsets
from mim_torchrec.benchmarks.paper.data_sets import DataSet, Options, import_films, make_shop
from mim_torchrec.benchmarks.paper.model_runs import Model, ModelRuns, ModelsConfig
from mim_torchrec.domains import Domain, check_domains
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.errors import OptionError
from mim_torchrec.training.history import read_history
from mim_torchrec.training.metrics import auc
from mim_torchrec.training.run_directory import RunDirectory

# --- settings that the report states ------------------------------------------------------------------------
MODEL: Options = {"preset": "recommended"}
OPTIONS: dict[str, Options] = {
    "shop": {**MODEL, "epochs": 20, "patience": 3},
    "films": {**MODEL, **films.TRAINING, **films.GRID[1], "patience": 3},
}
NO_IDS: Options = {"id-interest": False, "fusion-interest": False, "min-count": 2**31 - 1}
"""Ids that occur less often than ever have the one row of unknown ids, which says nothing."""
MAY_LOSE, MAY_LACK, MAY_FALL = 0.002, 0.005, 0.005
FIRST_EPOCHS = 4
# ------------------------------------------------------------------------------------------------------------

ROWS = ("base", "content_only", "regression", "ensemble", "mim")
SIMPLER = ("base", "content_only", "regression")
Place = tuple[str, float, str, int]
"""Data set, share, user behavior model and seed."""
SHARES = Annotated[float, Domain(above=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class ValueConfig(ModelsConfig):
    """Compare MIM with what is simpler, on whole data and on thin data, and write a report."""

    out: Path = Path("runs/value")
    """Directory of the run; a run that was interrupted there resumes."""
    only: tuple[Literal["shop", "films"], ...] = ("shop", "films")
    """Data sets that are run; films need `data`."""
    share: tuple[SHARES, ...] = (1.0, 0.1)
    """Fractions of the training requests that are trained on; validation and test requests are all used."""
    ubm: tuple[str, ...] = ("avg_pooling", "din", "dien", "bst", "sim", "twin")
    """User behavior models."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A seed of a cell of the report.

    Args:
        data: `shop` or `films`.
        share: of the training requests.
        ubm: user behavior model.
        seed: of training.
        made_of: what it depends on; results of something else are not reported beside each other.
        auc: on test requests by row.
        validation_auc: likewise, of the epoch that was kept; the ensemble has none.
        validation_fall: how far MIM's validation AUC fell below its best within the first four epochs.
    """

    data: str
    share: float
    ubm: str
    seed: int
    made_of: Mapping[str, Any]
    auc: Mapping[str, float]
    validation_auc: Mapping[str, float]
    validation_fall: float

    @property
    def margin(self) -> float:
        """MIM's test AUC over the best of what is simpler."""
        return self.auc["mim"] - max(self.auc[row] for row in SIMPLER)

    @property
    def gap(self) -> float:
        """MIM's test AUC over that of the ensemble."""
        return self.auc["mim"] - self.auc["ensemble"]

    def file(self, root: Path) -> Path:
        """Where it is kept."""
        return root / "cells" / f"{self.data}-{self.share:g}-{self.ubm}-{self.seed}.json"


def with_share(root: Path, whole: DataSet, share: float) -> DataSet:
    """A data set with a share of its training requests."""
    name = f"{whole.name}-{share:g}"
    if share == 1:
        return dataclasses.replace(whole, name=name, grid=())
    out = subsets.write_share(whole.data.out, share, root / "shares" / name)
    data = dataclasses.replace(whole.data, out=out)
    return dataclasses.replace(whole, name=name, data=data, grid=())


def validation_fall(run: Path) -> float:
    """How far the validation AUC of a run fell below its best so far, within the first epochs."""
    scores = [epoch["auc"] for epoch in read_history(RunDirectory(run).history).epochs[:FIRST_EPOCHS]]
    return float(np.max(np.maximum.accumulate(scores) - scores))


def ensemble_auc(runs: Sequence[Path]) -> float:
    """Test AUC of the mean log-odds of several models."""
    labels, scores = comparison.scores(runs)
    smallest = np.finfo(np.float32).tiny
    logits = [logit(np.clip(score.astype(np.float64), smallest, 1 - 1e-12)) for score in scores]
    found = auc(labels, np.mean(logits, axis=0))
    if found is None:
        raise OptionError("the test requests hold no click, or nothing else: take a larger data set")
    return found


def run_share(config: ValueConfig, run: Run, data_set: DataSet, share: float) -> None:
    """Train and compare the models of a data set, user behavior model by user behavior model."""
    table = Table.open(data_set.table.out)
    regression = alpha_regression.fit(data_set.data.out, table, run.root / "regression" / data_set.name)
    of_regression = json.loads((regression / "metrics.json").read_text())
    runs = ModelRuns(run, data_set, config.seeds, config.jobs)
    runs.train([Model(name="content-only", mim=True, options=NO_IDS)], setting={})
    for ubm in config.ubm:
        base, mim = (Model(name=f"{ubm}-{kind}", mim=kind == "mim", options={"ubm": ubm})
                     for kind in ("base", "mim"))  # fmt: skip
        runs.train([base, mim], setting={})
        for place, seed in enumerate(config.seeds):
            trained = {"base": runs.runs[base.name][place], "content_only": runs.runs["content-only"][place],
                       "mim": runs.runs[mim.name][place]}  # fmt: skip
            metrics = dict(zip(trained, comparison.read_metrics(list(trained.values())), strict=True))
            simpler = [trained["base"], trained["content_only"], regression]
            cell = Cell(
                data=data_set.name.partition("-")[0], share=share, ubm=ubm, seed=seed,
                made_of=made_of(config, data_set, table),
                auc={row: found["auc"] for row, found in metrics.items()}
                | {"regression": of_regression["auc"], "ensemble": ensemble_auc(simpler)},
                validation_auc={row: comparison.validation_auc(out) for row, out in trained.items()}
                | {"regression": of_regression["validation_auc"]},
                validation_fall=validation_fall(trained["mim"]),
            )  # fmt: skip
            file = cell.file(run.root)
            file.parent.mkdir(exist_ok=True)
            write_json(file, dataclasses.asdict(cell))


def made_of(config: ValueConfig, data_set: DataSet, table: Table) -> dict[str, Any]:
    """What the cells of a data set depend on, in the form that JSON gives back."""
    return {
        "table_version": table.manifest.table_version,
        "options": dict(data_set.options),
        "shop": dataclasses.asdict(config.shop) if data_set.name.startswith("shop") else {},
        "source": alpha_regression.source(),
    }


def read_cells(root: Path, current: Mapping[str, Mapping[str, Any]]) -> tuple[list[Cell], list[str]]:
    """All results in the directory of a run, and the names of those that were made of something else.

    Args:
        root: of the run.
        current: by data set, what its cells are made of now; of those that are not run now only the code is
            compared.
    """
    found, outdated, source = [], [], alpha_regression.source()
    for file in sorted((root / "cells").glob("*.json")):
        cell = Cell(**json.loads(file.read_text()))
        is_current = cell.made_of == current.get(cell.data, {**cell.made_of, "source": source})
        if is_current:
            found.append(cell)
        else:
            outdated.append(file.stem)
    return found, outdated


def whole() -> set[Place]:
    """What has to be run before it can be said that MIM never loses."""
    config = ValueConfig()
    return set(itertools.product(config.only, config.share, config.ubm, config.seeds))


def build_report(cells: Iterable[Cell], outdated: Sequence[str], wanted: Set[Place]) -> dict[str, Any]:
    """The report of results: cells, and what the worst of them say.

    Args:
        cells: all results.
        outdated: names of others, which are left out.
        wanted: data, share, model and seed of every result without which `never_loses` is None, unless one
            loses.
    """
    groups: dict[tuple[str, float, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.share, cell.ubm), []).append(cell)
    lines = [
        {
            "data": data, "share": share, "ubm": ubm,
            "auc": {row: {str(one.seed): one.auc[row] for one in own} for row in ROWS},
            "validation_auc": {
                row: {str(one.seed): one.validation_auc[row] for one in own} for row in (*SIMPLER, "mim")
            },
            "margin": {str(one.seed): one.margin for one in own},
            "gap_to_ensemble": {str(one.seed): one.gap for one in own},
            "validation_fall": {str(one.seed): one.validation_fall for one in own},
        }
        for (data, share, ubm), own in groups.items()
    ]  # fmt: skip
    every = [one for own in groups.values() for one in own]
    margin, gap = min(one.margin for one in every), min(one.gap for one in every)
    fall = max(one.validation_fall for one in every)
    missing = len(wanted - {(one.data, one.share, one.ubm, one.seed) for one in every})
    undecided = margin >= -MAY_LOSE and missing > 0
    return {
        "cells": lines, "never_loses": None if undecided else margin >= -MAY_LOSE, "worst_margin": margin,
        "missing": missing,
        "worst_gap_to_ensemble": gap, "worst_validation_fall": fall, "outdated": list(outdated),
        "targets": [
            target(f"MIM over the best of {', '.join(SIMPLER)}, in the worst cell, is at least {-MAY_LOSE}",
                   margin, margin >= -MAY_LOSE),
            target(f"MIM over the ensemble, in the worst cell, is at least {-MAY_LACK}", gap,
                   gap >= -MAY_LACK),
            target(f"the validation AUC of MIM falls by at most {MAY_FALL} within {FIRST_EPOCHS} epochs",
                   fall, fall <= MAY_FALL),
        ],
    }  # fmt: skip


def sections(report: Mapping[str, Any]) -> list[Section]:
    """A table of the cells, means of their seeds, with the seed that is worst for MIM."""
    rows = [
        [line["data"], f"{line['share']:.0%}", line["ubm"],
         *(formatted(comparison.mean(list(line["auc"][row].values()))) for row in ROWS),
         formatted(min(line["margin"].values()), "+.4f"),
         formatted(min(line["gap_to_ensemble"].values()), "+.4f"),
         formatted(max(line["validation_fall"].values())), ", ".join(line["margin"])]
        for line in report["cells"]
    ]  # fmt: skip
    text = [
        "Test AUC, means of the seeds. The last columns are of the seed that is worst for MIM: MIM over the "
        "best of the three simpler ones, over their ensemble, and how far its validation AUC fell within "
        f"{FIRST_EPOCHS} epochs."
    ]
    if report["missing"]:
        text.append(f"{report['missing']} results are missing: whether MIM never loses is open.")
    if report["outdated"]:
        text.append(f"Made with other settings and left out: {', '.join(report['outdated'])}.")
    columns = ["data", "share", "model", *(row.replace("_", " ") for row in ROWS), "worst margin",
               "worst gap to ensemble", "fall", "seeds"]  # fmt: skip
    return [Section("MIM beside what is simpler", text=text, columns=columns, rows=rows),
            targets_section(report["targets"])]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.value`."""
    config = tyro.cli(ValueConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)
    if not (config.only and config.share and config.ubm and config.seeds):
        raise OptionError("--only, --share, --ubm and --seeds each need at least one value")
    names = [name for name in config.only if name == "shop" or config.data is not None]
    if not names:
        raise OptionError(
            "films are read from the folder that --data names: give it, or leave --only films out"
        )
    run, current = Run(config.out), dict[str, dict[str, Any]]()
    for name in names:
        if name == "shop":
            data_set = make_shop(run, config.shop, {})
        else:
            assert config.data is not None
            data_set = import_films(run, config.data.resolve(), {})
        data_set = dataclasses.replace(data_set, options=OPTIONS[name])
        current[name] = made_of(config, data_set, Table.open(data_set.table.out, verify=False))
        for share in config.share:
            run_share(config, run, with_share(run.root, data_set, share), share)
    report = build_report(*read_cells(run.root, current), whole())
    report |= {"stages": run.seconds, "config": {**dataclasses.asdict(config), "options": OPTIONS}}
    summary = (
        "Base, MIM without ids, logistic regression on statistics of the relevance, the ensemble of these, "
        "and MIM, on all training requests and on a random share of them."
    )
    write_pages(report, "MIM beside what is simpler", summary, sections(report), {}, run.root)
    print((run.root / "report.md").read_text())


if __name__ == "__main__":
    program.run(main)
