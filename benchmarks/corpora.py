"""The data sets of the CTR benchmarks, with their tables, and runs of many CTR models on them.

The synthetic shop is there for everyone; films and posters where somebody has them. CTR models are small
here: several run side by side, one rank and one thread each.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import demo, movielens
from benchmarks.stages import Run, Stage, Value, ctr_stage, export_stage
from mim_torchrec.errors import OptionError
from mim_torchrec.training import comparison

Options = Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set whose CTR models can be compared.

    Args:
        name: of its folder and in reports.
        title: what it is, in a line.
        data: stage that makes the data set.
        table: stage that makes the multi-modal table of its items.
        options: flags of every CTR run.
        grid: settings that are tried on validation, for Base and MIM alike; empty: none is.
    """

    name: str
    title: str
    data: Stage
    table: Stage
    options: Options
    grid: Sequence[Options] = ()


def shop(run: Run, sizes: demo.DemoConfig, options: Options) -> Corpus:
    """Make a synthetic shop and the table of its items, both on as many ranks as the sizes say."""
    root = run.root / "shop"
    data = demo.shop_stage(sizes, root, "data", 1.0)
    csft = demo.csft_stage(sizes, root, "csft", data)
    table = _named(export_stage(root, "table", data, csft, f"1x{sizes.nproc}"), "shop-table")
    run.run([data, csft, table], threads=1)
    title = f"A synthetic shop of {sizes.items:,} items, {sizes.users:,} users, {sizes.requests:,} requests"
    return Corpus(name="shop", title=title, data=data, table=table,
                  options={"epochs": sizes.ctr_epochs, **options})  # fmt: skip


def films(run: Run, source: Path, options: Options) -> Corpus:
    """Import MovieLens with posters, and make the table of its films."""
    root = run.root / "films"
    data = movielens.import_stage(source, root, "user")
    csft = movielens.csft_stage(root, data)
    table = _named(export_stage(root, "table", data, csft, "1x1"), "films-table")
    run.run([data, csft, table], threads=2)
    title = "MovieLens ml-latest-small with posters, divided by each user's time"
    return Corpus(name="films", title=title, data=data, table=table,
                  options={**movielens.TRAINING, **options}, grid=movielens.GRID)  # fmt: skip


def _named(stage: Stage, name: str) -> Stage:
    """A stage under a name that no other corpus of the run has: its record goes by the name."""
    return dataclasses.replace(stage, name=name)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A CTR model of a benchmark.

    Args:
        name: unique in the benchmark.
        mim: with the table, or Base.
        options: flags beyond those of the corpus.
    """

    name: str
    mim: bool
    options: Options = field(default_factory=dict)


class Comparison:
    """CTR runs of several models on one corpus.

    Args:
        run: the run directory.
        corpus: the data set.
        seeds: of the runs that are reported.
        tuning_seed: of the runs that choose a setting from the grid, not reported.
        jobs: runs side by side.

    Raises:
        ValueError: the tuning seed would be reported.
    """

    def __init__(self, run: Run, corpus: Corpus, seeds: Sequence[int], tuning_seed: int, jobs: int) -> None:
        if tuning_seed in seeds:
            raise OptionError(f"seed {tuning_seed} is for tuning and cannot be reported")
        self.corpus, self.seeds, self.tuning_seed = corpus, tuple(seeds), tuning_seed
        self.runs: dict[str, list[Path]] = {}
        self.tuning: dict[str, dict[str, Any]] = {}
        self._run, self._jobs = run, jobs

    def train(self, models: Iterable[Model], setting: Options | None = None) -> None:
        """Train models with every seed.

        Args:
            models: with names that are not in use yet.
            setting: of all of them; None lets every model choose from the corpus's grid on validation.
        """
        models = list(models)
        grid = list(enumerate(self.corpus.grid)) if setting is None else []
        tried = {
            (model.name, k): self._stage(model, f"tune-{model.name}-{k}", self.tuning_seed, tried_setting)
            for model in models for k, tried_setting in grid
        }  # fmt: skip
        self._side_by_side(tried.values())
        for model in models:
            scores = [comparison.validation_auc(tried[model.name, k].out) for k, _ in grid]
            chosen = self.corpus.grid[scores.index(max(scores))] if grid else setting or {}
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
        """What one model has over another, see `training.comparison.gain`."""
        return comparison.gain(self.runs[base], self.runs[other])

    def _stage(self, model: Model, name: str, seed: int, setting: Options) -> Stage:
        return ctr_stage(
            f"{self.corpus.name}-{name}",
            root=self._run.root,
            data=self.corpus.data,
            table=self.corpus.table if model.mim else None,
            seed=seed,
            options={**self.corpus.options, **setting, **model.options},
            ranks="1x1",
        )

    def _side_by_side(self, stages: Iterable[Stage]) -> None:
        self._run.run(stages, jobs=self._jobs, threads=1)
