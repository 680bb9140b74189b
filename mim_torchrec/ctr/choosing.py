"""`mim choose`: the best of several click models by a validation metric, for the settings of later runs.

A pipeline refers to the result: `${choose/best.json#config.weight_decay}`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import Place, Url
from mim_torchrec.program import run
from mim_torchrec.training.history import read_history
from mim_torchrec.training.run_directory import RunDirectory

READ = ("config.json", "history.jsonl")
LOWER_IS_BETTER = ("ne", "logloss")


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """Choose the best of several click models on validation."""

    runs: tyro.conf.Positional[tuple[Place, ...]]
    """Directories that `mim ctr` has written."""
    out: Place
    """Directory for best.json: run, value, values (of all runs) and config (of the best)."""
    metric: Literal["auc", "gauc", "ne", "logloss"] = "auc"
    """Validation metric of a run's best epoch; ne and logloss are best when lowest."""


def best_of(runs: tuple[Path | Url, ...], metric: str) -> dict[str, Any]:
    """The best run; of equal ones the first.

    Args:
        runs: directories that the CTR stage has written.
        metric: a validation metric.

    Returns:
        `run` and `name`, `metric`, `value`, `values` in the order of the runs, and `config` of the best.

    Raises:
        DataError: a run has no such metric, because it has not ended an epoch or the metric is undefined.
    """
    values = [_value(path, metric) for path in runs]
    best = values.index((min if metric in LOWER_IS_BETTER else max)(values))
    return {
        "run": str(runs[best]),
        "name": runs[best].name,
        "metric": metric,
        "value": values[best],
        "values": values,
        "config": json.loads(RunDirectory(fetched(runs[best], READ)).config.read_text()),
    }


def _value(path: Path | Url, metric: str) -> float:
    history = read_history(RunDirectory(fetched(path, READ)).history)
    value = None if history.best_epoch is None else history.best().get(metric)
    if value is None:
        raise DataError(f"{path}: no epoch has a validation {metric}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim choose``."""
    config = tyro.cli(ChooseConfig, args=argv, prog="mim choose", description=__doc__)
    found = best_of(config.runs, config.metric)
    with written(config.out, replace=True) as out, atomic_directory(out) as folder:
        write_json(folder / "best.json", found)
    print(f"{found['run']}: validation {config.metric} {found['value']:.4f}, the best of {len(config.runs)}")


if __name__ == "__main__":
    run(main)
