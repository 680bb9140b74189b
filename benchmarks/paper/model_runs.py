"""Runs of many CTR models on one data set, side by side, one rank and one thread each."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.pages import Section, print_targets, write_pages
from mim_torchrec.benchmarks.harness.stages import Run, Stage, ctr_stage
from mim_torchrec.benchmarks.paper.data_sets import DataSet, Options, make_all
from mim_torchrec.benchmarks.paper.shop import ShopSizes
from mim_torchrec.errors import OptionError

TUNING_SEED = 1000
"""Of the runs that choose a setting from the grid of a data set; it is not reported."""


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Flags of the experiments that compare CTR models on data sets."""

    out: Path
    """Directory of the run; a run that was interrupted there resumes."""
    data: Path | None = None
    """Folder with ratings.csv, movies.csv and posters.parquet; without it, films are left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that are reported, fixed beforehand."""
    shop: ShopSizes = ShopSizes()
    """The synthetic shop; its seed is not that of training."""
    jobs: int = 2
    """CTR runs side by side, one process and one thread each."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A CTR model of a benchmark.

    Args:
        name: unique in the benchmark.
        mim: with the table, or Base.
        options: flags beyond those of the data set.
    """

    name: str
    mim: bool
    options: Options = field(default_factory=dict)


class ModelRuns:
    """CTR runs of several models on one data set.

    Args:
        run: the run directory.
        data_set: the data set.
        seeds: of the runs that are reported.
        jobs: runs side by side.

    Raises:
        ValueError: the tuning seed would be reported.
    """

    def __init__(self, run: Run, data_set: DataSet, seeds: Sequence[int], jobs: int) -> None:
        if TUNING_SEED in seeds:
            raise OptionError(f"seed {TUNING_SEED} is for tuning and cannot be reported")
        self.data_set, self.seeds = data_set, tuple(seeds)
        self.runs: dict[str, list[Path]] = {}
        self.tuning: dict[str, dict[str, Any]] = {}
        self._run, self._jobs = run, jobs

    def train(self, models: Iterable[Model], setting: Options | None = None) -> None:
        """Train models with every seed.

        Args:
            models: with names that are not in use yet.
            setting: of all of them; None lets every model choose from the data set's grid on validation.
        """
        models = list(models)
        grid = list(enumerate(self.data_set.grid)) if setting is None else []
        tried = {
            (model.name, k): self._stage(model, f"tune-{model.name}-{k}", TUNING_SEED, tried_setting)
            for model in models for k, tried_setting in grid
        }  # fmt: skip
        self._side_by_side(tried.values())
        for model in models:
            scores = [comparison.validation_auc(tried[model.name, k].out) for k, _ in grid]
            chosen = self.data_set.grid[scores.index(max(scores))] if grid else setting or {}
            self.tuning[model.name] = {"validation_auc": scores, "chosen": dict(chosen)}
        stages = {
            model.name: [
                self._stage(model, f"{model.name}-{seed}", seed, self.tuning[model.name]["chosen"])
                for seed in self.seeds
            ]
            for model in models
        }
        self._side_by_side(itertools.chain.from_iterable(stages.values()))
        self.runs |= {name: [stage.out for stage in of_seeds] for name, of_seeds in stages.items()}

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """metrics.json of a model, seed by seed."""
        return comparison.read_metrics(self.runs[name])

    def auc(self, name: str) -> list[float]:
        """Test AUC of a model, seed by seed."""
        return [metrics["auc"] for metrics in self.metrics(name)]

    def gain(self, base: str, other: str) -> dict[str, Any]:
        """What one model has over another, see `comparison.gain`."""
        return comparison.gain(self.runs[base], self.runs[other])

    def _stage(self, model: Model, name: str, seed: int, setting: Options) -> Stage:
        return ctr_stage(
            f"{self.data_set.name}-{name}",
            root=self._run.root,
            data=self.data_set.data,
            table=self.data_set.table if model.mim else None,
            seed=seed,
            options={**self.data_set.options, **setting, **model.options},
            ranks="1x1",
        )

    def _side_by_side(self, stages: Iterable[Stage]) -> None:
        self._run.run(stages, jobs=self._jobs, threads=1)


def write_experiment(
    config: ModelsConfig,
    options: Options,
    experiment: Callable[[Run, DataSet], tuple[dict[str, Any], list[Section], bytes]],
    title: str,
    summary: str,
) -> None:
    """Run an experiment on every data set, write one report of all and print it.

    Args:
        config: flags.
        options: flags of every CTR run.
        experiment: gives its part of report.json, its sections and an image, `<data set>.png`.
        title: of the pages.
        summary: first paragraph.
    """
    run = Run(config.out)
    report: dict[str, Any] = {}
    sections: list[Section] = []
    images = {}
    for data_set in make_all(run, config.shop, config.data, options):
        part, own, images[f"{data_set.name}.png"] = experiment(run, data_set)
        sections += own
        if data_set.name == "shop":
            report |= part  # its targets are printed with the report
        else:
            report[data_set.name] = part
            print_targets(part.get("targets", ()))
    report |= {"stages": run.seconds, "config": dataclasses.asdict(config)}
    write_pages(report, title, summary, sections, images, run.root)
    print((run.root / "report.md").read_text())
