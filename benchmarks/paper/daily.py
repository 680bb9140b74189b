"""Ids that keep coming: a model of every day, begun from that of the day before: `make daily [DATA=<films>]`.

The requests are divided by time. A day's model is trained on its requests, from the weights of the day
before (`mim ctr --warm-start`), and tested on those of the next day. Tables of ids grow with every day, or
are bounded to a part of all ids (`--max-ids`); the multi-modal table is frozen and has every item.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.drawing import BASE_COLOR, MIM_COLOR, subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, formatted, interval
from mim_torchrec.benchmarks.harness.stages import Run, Stage, Words, ctr_stage
from mim_torchrec.benchmarks.paper import shop
from mim_torchrec.benchmarks.paper.data_sets import DataSet
from mim_torchrec.benchmarks.paper.model_runs import ModelsConfig, write_experiment
from mim_torchrec.ctr.vocabularies import load_vocabularies
from mim_torchrec.data.ages import age_sets
from mim_torchrec.data.id_scan import count_ids
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.domains import Domain, check_domains

BOUNDED = ("item_id", "user_id")
VALIDATION = 0.2
"""Fraction of the next day's requests that the epoch is chosen on; the rest is the test."""
NEWEST = 3
"""Tenths of the items that count as new."""


@dataclass(frozen=True, kw_only=True)
class DailyConfig(ModelsConfig):
    """Train a model a day, with tables that grow and with tables that are bounded, and write a report."""

    out: Path = Path("runs/daily")
    """Directory of the run; a run that was interrupted there resumes."""
    ubm: str = "din"
    """User behavior model."""
    days: Annotated[int, Domain(least=2)] = 5
    """Days that are trained on; one more is tested on."""
    kept: Annotated[float, Domain(above=0, below=1)] = 0.25
    """Ids of items and users that a bounded model has rows for, as a fraction of all."""


def divide(data: Path, root: Path, days: int) -> list[Path]:
    """Write a data set for every day: trained on its requests, tested on those of the next.

    Args:
        data: a data set whose requests have times.
        root: folder of the data sets; made again.
        days: how many, with equally many requests.
    """
    if root.exists():
        shutil.rmtree(root)
    files = [file for split in SPLITS for file in Dataset(data).requests(split)]
    whole = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    whole = whole.sort_by([("ts", "ascending"), ("request_id", "ascending")])
    cuts = np.linspace(0, len(whole), days + 2).astype(int)
    found = []
    for day in range(days):
        today, tomorrow = (whole.slice(cuts[k], cuts[k + 1] - cuts[k]) for k in (day, day + 1))
        held_out = int(VALIDATION * len(tomorrow))
        parts = (today, tomorrow.slice(0, held_out), tomorrow.slice(held_out))
        found.append(root / f"day-{day}")
        for split, rows in zip(SPLITS, parts, strict=True):
            folder = found[-1] / "requests" / split
            folder.mkdir(parents=True)
            pq.write_table(rows, folder / "part-00000.parquet", row_group_size=1000, compression="zstd")
        shutil.copytree(data / "items", found[-1] / "items", copy_function=os.link)
    return found


def limits(data: Path, kept: float) -> Words:
    """Words of `--max-ids`: a part of all items, and of all users of the training requests."""
    dataset = Dataset(data)
    found = count_ids(dataset.requests("train"), conventions=dataset.conventions)
    counts = {"item_id": len(ItemStore.read(dataset, ("item_id",))), "user_id": len(found["user_id"].ids)}
    return [word for name in BOUNDED for word in (name, max(int(kept * counts[name]), 1))]


class DailyRuns:
    """Chains of models, one model a day.

    Args:
        run: the run directory.
        data_set: that was divided.
        days: data sets of the days.
        config: flags.
    """

    def __init__(self, run: Run, data_set: DataSet, days: Sequence[Path], config: DailyConfig) -> None:
        self._run, self._data_set, self._days, self._config = run, data_set, days, config
        self.outs: dict[str, list[list[Path]]] = {}
        """By model, seed and day."""

    def train(self, name: str, mim: bool, options: dict[str, Words]) -> None:
        """Train a model on every day in turn, with every seed."""
        for seed in self._config.seeds:
            stages: list[Stage] = []
            for day, data in enumerate(self._days):
                begun = {} if not stages else {"warm-start": stages[-1].out}
                stage = ctr_stage(
                    f"{self._data_set.name}-{name}-{seed}-day-{day}",
                    root=self._run.root,
                    data=dataclasses.replace(self._data_set.data, out=data),
                    table=self._data_set.table if mim else None,
                    seed=seed,
                    options={**self._data_set.options, **options, **begun},
                    ranks="1x1",
                )
                stages.append(dataclasses.replace(stage, after=(*stage.after, *stages[-1:])))
            self._run.run(stages, jobs=self._config.jobs, threads=1)
            self.outs.setdefault(name, []).append([stage.out for stage in stages])

    def of_day(self, name: str, day: int) -> list[Path]:
        """Runs of a model on a day, one a seed."""
        return [outs[day] for outs in self.outs[name]]


def rows_of(run: Path) -> int:
    """Rows of the bounded tables of a run."""
    vocabularies = load_vocabularies(run)
    return sum(vocabularies[name].num_embeddings for name in BOUNDED)


def experiment(
    config: DailyConfig, run: Run, data_set: DataSet
) -> tuple[dict[str, Any], list[Section], bytes]:
    """Base and MIM, growing and bounded, on one data set."""
    check_domains(config)
    data = data_set.data.out
    days = divide(data, run.root / f"{data_set.name}-days", config.days)
    bound = limits(data, config.kept)
    runs = DailyRuns(run, data_set, days, config)
    models = {"base": (False, {}), "base-bounded": (False, {"max-ids": bound}),
              "mim": (True, {}), "mim-bounded": (True, {"max-ids": bound})}  # fmt: skip
    for name, (mim, options) in models.items():
        runs.train(name, mim, options)
    last = config.days - 1
    items = ItemStore.read(Dataset(data), ("item_id", "listed_at"))
    newest = items.item_ids[age_sets(items) < NEWEST]
    report = {
        "auc": {name: [comparison.mean_metrics(runs.of_day(name, day))["auc"] for day in range(config.days)]
                for name in models},
        "rows": {name: [rows_of(runs.of_day(name, day)[0]) for day in range(config.days)] for name in models},
        "bounded": {part: comparison.gain(runs.of_day(part, last), runs.of_day(f"{part}-bounded", last))
                    for part in ("base", "mim")},
        "mim_over_base": {
            what: comparison.gain(runs.of_day("base", last), runs.of_day("mim-bounded", last), items=ids)
            for what, ids in (("all items", None), ("newest items", newest))
        },
    }  # fmt: skip
    report["targets"] = targets(data_set.name, report)
    return report, [section(data_set, report)], draw(report)


def targets(name: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the frozen table holds the line where rows of ids are missing."""
    lost = report["bounded"]["mim"]["gain"]
    gained = report["mim_over_base"]["newest items"]["gain"]
    rows = {model: counts[-1] for model, counts in report["rows"].items()}
    return [
        target(f"{name}: MIM with bounded tables loses at most .005 AUC on the last day", lost,
               lost is not None and lost >= -0.005),
        target(f"{name}: MIM with bounded tables has more AUC on the newest items than Base with all rows",
               gained, gained is not None and gained > 0),
        target(f"{name}: rows of a bounded model over those of one that grows",
               rows["mim-bounded"] / rows["mim"], rows["mim-bounded"] < rows["mim"]),
    ]  # fmt: skip


def section(data_set: DataSet, report: dict[str, Any]) -> Section:
    """AUC and rows by day."""
    text = [
        f"{data_set.title}. AUC of a day's model on the requests of the next day; rows of items and users."
    ]
    compared = {"MIM, bounded over growing": report["bounded"]["mim"],
                "Base, bounded over growing": report["bounded"]["base"],
                **{f"MIM bounded over Base growing, {what}": one
                   for what, one in report["mim_over_base"].items()}}  # fmt: skip
    text += [f"Last day: {what} {formatted(one['gain'], '+.4f')} {interval(one['ci'])}."
             for what, one in compared.items()]  # fmt: skip
    rows = [
        [
            name,
            *(
                f"{formatted(auc)} ({count:,})"
                for auc, count in zip(found, report["rows"][name], strict=True)
            ),
        ]
        for name, found in report["auc"].items()
    ]
    days = [f"day {day}" for day in range(len(rows[0]) - 1)]
    return Section(f"Models of every day: {data_set.name}", text=text, columns=["model", *days], rows=rows,
                   images=[f"{data_set.name}.png"])  # fmt: skip


def draw(report: dict[str, Any]) -> bytes:
    """AUC by day; bounded models dashed."""
    figure, axes = subplots(figsize=(6, 3.6))
    for name, found in report["auc"].items():
        axes.plot(range(len(found)), found, "--o" if name.endswith("bounded") else "-o", label=name,
                  color=MIM_COLOR if name.startswith("mim") else BASE_COLOR, markersize=3)  # fmt: skip
    axes.set_xlabel("day", fontsize=9)
    axes.set_ylabel("AUC on the next day", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return to_png(figure)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.daily`."""
    config = tyro.cli(DailyConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    summary = (
        f"{config.ubm.upper()}, means of the seeds {list(config.seeds)}; bounded models have rows for "
        f"{config.kept:.0%} of the items and users, the most frequent ones by decayed counts."
    )
    options, title = {**shop.CTR, "ubm": config.ubm}, "Ids that keep coming"
    write_experiment(config, options, partial(experiment, config), title, summary)


if __name__ == "__main__":
    program.run(main)
