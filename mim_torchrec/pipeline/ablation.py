"""`mim ablate`: which encoder is worth most in click prediction, and which cheap metric says so beforehand.

A click model takes hours, an image search minutes. MOON (arXiv 2511.11305) steers its encoders by the rate at
which one is exchanged for the other. `docs/ablation.md` describes the file and the report.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.domains import Count, check_domains
from mim_torchrec.embeddings.files import write_json, write_text
from mim_torchrec.embeddings.remote.places import LocalPath
from mim_torchrec.pipeline.ablation_grid import FIXED, Grid, load_grid, pipeline_of
from mim_torchrec.pipeline.execution import RunOptions
from mim_torchrec.pipeline.reporting import StageResult, columns, read_json
from mim_torchrec.pipeline.running import run
from mim_torchrec.pipeline.submission import LOCAL

SEARCH = ("log_rank", "mrr", "recall_at_10", "recall_at_100", "mean_rank")
LOWER_IS_BETTER = ("log_rank", "mean_rank", "loss")
LEAST = 3
"""Runs that a correlation needs."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Compare encoders by an image search and by the AUC of one click model on their tables."""

    grid: tyro.conf.Positional[LocalPath]
    """TOML file of the encoders; docs/ablation.md describes it."""
    data: LocalPath
    """Data set with pairs and requests."""
    out: LocalPath
    """Directory of the run; one that was interrupted there resumes."""
    scheduler: str = LOCAL
    """Scheduler of TorchX: local_cwd, slurm, kubernetes, ..."""
    scheduler_args: str = ""
    """Options of the scheduler, key=value,key=value."""
    jobs: Count | None = None
    """Stages side by side; by default one on local_cwd, all that can run elsewhere."""


def points_of(grid: Grid, results: Mapping[str, StageResult]) -> list[dict[str, Any]]:
    """What every run has: an encoder and a seed each.

    Returns:
        `encoder`, `seed`, `trained` (False of plain towers), `overlaps` (whether pairs that it was trained on
        are later than searches of its image search: fractions of clicks and of purchases end at different
        times), the metrics of the search, the training `loss` of its C-SFT (None of plain towers), `auc` and
        `ne` of the click model, and `gain`, its AUC less that of Base with this seed.
    """
    points = []
    for name, encoder in grid.encoders.items():
        for seed in grid.seeds:
            trained = f"{name}.{FIXED if encoder.plain is not None else seed}"
            found = _json(results[f"search.{trained}"], "retrieval.json")
            probe, base = results[f"ctr.{name}.{seed}"].metrics(), results[f"base.{seed}"].metrics()
            csft = {} if encoder.plain is not None else results[f"csft.{trained}"].metrics()
            points.append({
                "encoder": name, "seed": seed, "trained": encoder.plain is None,
                "overlaps": bool(csft) and csft["trained_until"] > found["held_out_from"],
                **{metric: found[metric] for metric in SEARCH}, "loss": csft.get("loss"),
                "auc": probe["auc"], "ne": probe["ne"], "gain": probe["auc"] - base["auc"],
            })  # fmt: skip
    return points


def rates_of(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How well each cheap metric tells the gain, over runs with a trained encoder.

    Plain towers do not count: their searches compare images with images, and no titles.

    Args:
        points: as `points_of` gives them.

    Returns:
        By metric: `n` (runs), `spearman`, `pearson`, and `auc_per_deviation` (AUC for one
        standard deviation of the metric, by least squares). Metrics of which less is better are turned round,
        so that positive numbers agree. None where fewer than three runs, or runs that do not differ, say
        nothing.
    """
    # takes seconds that --help does not need
    from torchmetrics.functional import spearman_corrcoef

    rates = {}
    for metric in (*SEARCH, "loss"):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        pairs = [(sign * point[metric], point["gain"]) for point in points
                 if point["trained"] and point[metric] is not None]  # fmt: skip
        found: dict[str, Any] = {
            "n": len(pairs),
            "spearman": None,
            "pearson": None,
            "auc_per_deviation": None,
        }
        if len(pairs) >= LEAST:
            values, gains = torch.tensor(pairs, dtype=torch.float64).T
            if values.min() < values.max() and gains.min() < gains.max():
                pearson = float(torch.corrcoef(torch.stack([values, gains]))[0, 1])
                found |= {"spearman": float(spearman_corrcoef(values, gains)), "pearson": pearson,
                          "auc_per_deviation": pearson * float(gains.std())}  # fmt: skip
        rates[metric] = found
    return rates


def encoders_of(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds by encoder, the highest gain first, and the deviation of the gain."""
    rows = []
    for name in dict.fromkeys(point["encoder"] for point in points):
        mine = [point for point in points if point["encoder"] == name]
        gains = [point["gain"] for point in mine]
        means = {
            key: None if mine[0][key] is None else fmean(point[key] for point in mine)
            for key in (*SEARCH, "loss", "auc", "ne", "gain")
        }
        rows.append({"encoder": name, **means, "gain_deviation": stdev(gains) if len(gains) > 1 else None})
    return sorted(rows, key=lambda row: -row["gain"])


def report_of(grid: Grid, results: Mapping[str, StageResult]) -> dict[str, Any]:
    """What report.json holds: `base`, `encoders`, `metrics`, `watch` and `points`.

    `watch` is the metric of the search with the highest rank correlation, None where none is above zero. The
    loss is no candidate: objectives differ in it.
    """
    points = points_of(grid, results)
    rates = rates_of(points)
    known = {name: rates[name]["spearman"] or 0.0 for name in SEARCH}
    watch = max(known, key=lambda name: known[name])
    return {
        "name": grid.name,
        "base": {str(seed): results[f"base.{seed}"].metrics()["auc"] for seed in grid.seeds},
        "encoders": encoders_of(points),
        "metrics": rates,
        "watch": watch if known[watch] > 0 else None,
        "points": points,
        "grid": grid.model_dump(),
    }


def shown(report: Mapping[str, Any]) -> str:
    """The report as two tables and a sentence."""
    keys = ("auc", "gain", "gain_deviation", "log_rank", "mrr", "recall_at_10", "loss")
    rows = [["encoder", "AUC", "gain", "± seeds", "log rank", "MRR", "recall@10", "loss"]]
    rows += [[row["encoder"], *(_number(row[key], key) for key in keys)] for row in report["encoders"]]
    of_rates = ("spearman", "pearson", "auc_per_deviation")
    rates = [["metric", "runs", "Spearman", "Pearson", "AUC per deviation"]]
    rates += [[name, str(rate["n"]), *(_number(rate[key], key) for key in of_rates)]
              for name, rate in report["metrics"].items()]  # fmt: skip
    runs = sum(point["trained"] for point in report["points"])
    watch = report["watch"]
    said = (
        f"Of {runs} runs none of these metrics says which is best."
        if watch is None
        else f"Watch {watch}: over {runs} runs it orders encoders most as their AUC does."
    )
    if overlapping := dict.fromkeys(point["encoder"] for point in report["points"] if point["overlaps"]):
        said += f"\nTrained on pairs later than the first that is searched: {', '.join(overlapping)}."
    base = fmean(report["base"].values())
    return f"{columns(rows)}\n\nBase {base:.4f}\n\n{columns(rates)}\n\n{said}"


def _number(value: float | None, key: str) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:+.4f}" if key in ("gain", "auc_per_deviation") else f"{value:.4f}"


def _json(result: StageResult, name: str) -> dict[str, Any]:
    assert isinstance(result.out, Path)  # stages of a grid write into the run's directory
    return read_json(result.out / name)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim ablate`."""
    config = tyro.cli(AblateConfig, args=argv, prog="mim ablate", description=__doc__)
    check_domains(config)
    grid = load_grid(Path(config.grid))
    options = RunOptions(scheduler=config.scheduler, scheduler_args=config.scheduler_args, jobs=config.jobs)
    results = run(pipeline_of(grid, Path(config.data).resolve()), Path(config.out), options)
    report = report_of(grid, results)
    write_json(Path(config.out) / "report.json", report)
    write_text(Path(config.out) / "report.md", f"# {grid.name}\n\n```\n{shown(report)}\n```\n")
    print(shown(report))


if __name__ == "__main__":
    program.run(main)
