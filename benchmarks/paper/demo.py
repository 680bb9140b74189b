"""Every stage on a synthetic shop, by TorchX on two ranks, and a report: `make demo`.

Two controls take the content away: the table's vectors permuted among the items, and a shop of the very same
items whose users do not care for style. One seed, no tuning: it shows that everything works, not how well.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.experiment_report import loss_curve, write_report
from mim_torchrec.benchmarks.harness.moved_clicks import moved_clicks
from mim_torchrec.benchmarks.harness.pages import Strip, formatted, interval
from mim_torchrec.benchmarks.paper.shop import CTR, ENCODER, ShopSizes
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.pipeline.loading import load
from mim_torchrec.pipeline.reporting import StageResult
from mim_torchrec.pipeline.running import run
from mim_torchrec.pipeline.spec import Pipeline

FILE = Path(__file__).with_suffix(".toml")
PREFIX = "ctr-"


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ShopSizes):
    """Run every stage on a synthetic shop and write a report."""

    out: Path = Path("runs/demo")
    """Directory of the run; a run that was interrupted there resumes."""


def describe(config: DemoConfig) -> Pipeline:
    """The stages of `demo.toml`, of the sizes that were asked for."""
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "nproc")}
    return load(FILE, sizes | {
        "browsing": 3 * config.requests, "ranks": f"1x{config.nproc}", "permutation_seed": config.seed + 1,
    })  # fmt: skip


def check_items(root: Path) -> None:
    """See that one table can serve both shops.

    Raises:
        DataError: their items differ.
    """
    first, second = (pq.read_table(root / shop / "items") for shop in ("shop", "shop-no-style"))
    if not first.equals(second):
        raise DataError("the two shops differ in their items: one table cannot serve both")


def build_report(
    config: DemoConfig, pipeline: Pipeline, root: Path, results: Mapping[str, StageResult]
) -> dict[str, Any]:
    """Put the report together from what the stages wrote."""
    ctr = {name.removeprefix(PREFIX): root / "ctr" / name.removeprefix(PREFIX)
           for name in results if name.startswith(PREFIX)}  # fmt: skip
    items = ItemStore.read(Dataset(root / "shop"), ("item_id", "listed_at"))
    compared = comparison.compare([ctr["base"]], [ctr["mim"]], items)
    controls = {
        "permuted": comparison.control(
            "MIM on the same shop with the table's vectors permuted among the items.",
            [ctr["base"]], [ctr["permuted"]],
        ),
        "no_style": comparison.control(
            "Base and MIM on a shop of the same items whose users do not care for style.",
            [ctr["no-style-base"]], [ctr["no-style-mim"]],
        ),
    }  # fmt: skip
    variants = comparison.csft_variants([ctr["base"]], [ctr["plain"]], [ctr["mim"]])
    figures, newest = compared["ctr"], compared["cold_start"][0]
    targets = [
        comparison.target_of_interval("MIM − Base in test AUC: the interval lies above zero",
                                      figures["mim_minus_base_auc"], figures["mim_minus_base_ci"]),
        comparison.target_of_difference("MIM − Base on the newest tenth of the items is positive", newest),
        comparison.target_of_gain("C-SFT adds to the plain towers", variants["csft_over_plain"]),
        *(comparison.target_of_control(name, control) for name, control in controls.items()),
    ]  # fmt: skip
    return {
        "title": "MIM on a synthetic shop",
        "summary": f"{config.items:,} items, {config.users:,} users, {config.requests:,} requests; every "
        f"training stage launched by TorchX on {config.nproc} ranks.",
        **compared,
        "controls": controls,
        "variants": variants,
        "targets": targets,
        "stages": {name: result.seconds for name, result in results.items()},
        "curves": {
            name: loss_curve(path / "history.jsonl")
            for name, path in {"csft": root / "csft", **{f"ctr-{k}": v for k, v in ctr.items()}}.items()
        },
        "config": {
            **dataclasses.asdict(config),
            "encoder": {flag: pipeline.stages["csft"].flags[flag] for flag in ENCODER},
            "ctr": {flag: pipeline.stages["ctr-mim"].flags[flag] for flag in CTR},
        },
        "notes": [
            "One seed and no tuning; the interval is of the test users only.",
            "Pretrained EfficientNet-Lite0 and MiniLM are frozen: C-SFT trains what is above them.",
        ],
    }


def pictures(root: Path) -> list[Strip]:
    """Clicked items that MIM ranks above where Base ranks them."""
    shop, (base, mim) = Dataset(root / "shop"), (root / "ctr" / name for name in ("base", "mim"))
    return moved_clicks(base, mim, shop, ItemStore.read(shop, ("item_id", "title", "image")))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.demo`."""
    config = tyro.cli(DemoConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    pipeline, root = describe(config), config.out.resolve()
    results = run(pipeline, root)
    check_items(root)
    report = build_report(config, pipeline, root, results)
    figures = report["ctr"]
    print(f"\nBase test AUC {formatted(figures['base']['auc'])}")
    print(f"MIM test AUC  {formatted(figures['mim']['auc'])}  "
          f"({formatted(figures['mim_minus_base_auc'], '+.4f')}, "
          f"95% interval {interval(figures['mim_minus_base_ci'])})")  # fmt: skip
    for name, control in report["controls"].items():
        print(f"control {name}: {formatted(control['gain'], '+.4f')} {interval(control['ci'])}, "
              f"{control['verdict']}")  # fmt: skip
    write_report(report, root, moved=pictures(root), search=root / "csft" / "retrieval.png")


if __name__ == "__main__":
    program.run(main)
