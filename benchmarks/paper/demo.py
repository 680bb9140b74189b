"""Every stage on a synthetic shop, by TorchX on two ranks, and a report: `make demo`.

Two controls take the content away: the table's vectors permuted among the items, and a shop of the very same
items whose users do not care for style. One seed, no tuning: it shows that everything works, not how well.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.experiment_report import loss_curve, write_report
from mim_torchrec.benchmarks.harness.pages import formatted, interval
from mim_torchrec.benchmarks.harness.stages import Run, Stage, ctr_stage, export_stage, permute_stage
from mim_torchrec.benchmarks.paper.shop import (
    CTR,
    ENCODER,
    PLAIN,
    PLAIN_OPTIONS,
    ShopSizes,
    csft_stage,
    shop_stage,
)
from mim_torchrec.data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ShopSizes):
    """Run every stage on a synthetic shop and write a report."""

    out: Path = Path("runs/demo")
    """Directory of the run; a run that was interrupted there resumes."""


def run_stages(config: DemoConfig, run: Run) -> dict[str, Path]:
    """Run everything; returns the directories of the CTR runs by name."""
    root, ranks = run.root, f"1x{config.nproc}"
    shop = shop_stage(config, root, "shop", 1.0)
    no_style = shop_stage(config, root, "shop-no-style", 0.0)
    csft = csft_stage(config, root, "csft", shop)
    export = export_stage(root, "table", shop, csft, ranks)
    plain = export_stage(root, "table-plain", shop, PLAIN, ranks, PLAIN_OPTIONS)
    permuted = permute_stage(export, out=root / "table-permuted", seed=config.seed + 1)
    run.run([shop, no_style, csft, export, plain, permuted])
    if not _items(shop).equals(_items(no_style)):
        raise DataError("the two shops differ in their items: one table cannot serve both")
    runs = {
        name: ctr_stage(name, root=root, data=data, table=table, seed=config.seed,
                        options=CTR | {"epochs": config.ctr_epochs}, ranks=ranks)
        for name, data, table in (
            ("base", shop, None),
            ("mim", shop, export),
            ("plain", shop, plain),
            ("permuted", shop, permuted),
            ("no-style-base", no_style, None),
            ("no-style-mim", no_style, export),
        )
    }  # fmt: skip
    run.run(runs.values())
    return {name: stage.out for name, stage in runs.items()}


def _items(shop: Stage) -> Any:
    return pq.read_table(shop.out / "items")


def build_report(config: DemoConfig, run: Run, ctr: dict[str, Path]) -> dict[str, Any]:
    """Put the report together from what the stages wrote."""
    compared = comparison.compare([ctr["base"]], [ctr["mim"]])
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
        comparison.target("MIM − Base in test AUC: the interval lies above zero",
                          figures["mim_minus_base_auc"], (figures["mim_minus_base_ci"] or [0.0])[0] > 0),
        comparison.target_of_difference("MIM − Base on the newest tenth of the items is positive", newest),
        comparison.target_of_gain("C-SFT adds to the plain towers", variants["csft_over_plain"]),
        *(
            comparison.target(f"Control {name}: the interval of the gain contains zero",
                              control["gain"], control["contains_zero"])
            for name, control in controls.items()
        ),
    ]  # fmt: skip
    return {
        "title": "MIM on a synthetic shop",
        "summary": f"{config.items:,} items, {config.users:,} users, {config.requests:,} requests; every "
        f"training stage launched by TorchX on {config.nproc} ranks.",
        **compared,
        "controls": controls,
        "variants": variants,
        "targets": targets,
        "stages": run.seconds,
        "curves": {
            name: loss_curve(path / "history.jsonl")
            for name, path in {"csft": run.root / "csft", **{f"ctr-{k}": v for k, v in ctr.items()}}.items()
        },
        "config": {**dataclasses.asdict(config), "encoder": ENCODER, "ctr": CTR},
        "notes": [
            "One seed and no tuning; the interval is of the test users only.",
            "Pretrained EfficientNet-Lite0 and MiniLM are frozen: C-SFT trains what is above them.",
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.demo`."""
    config = tyro.cli(DemoConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    run = Run(config.out)
    report = build_report(config, run, run_stages(config, run))
    figures = report["ctr"]
    print(f"\nBase test AUC {formatted(figures['base']['auc'])}")
    print(f"MIM test AUC  {formatted(figures['mim']['auc'])}  "
          f"({formatted(figures['mim_minus_base_auc'], '+.4f')}, "
          f"95% interval {interval(figures['mim_minus_base_ci'])})")  # fmt: skip
    for name, control in report["controls"].items():
        print(f"control {name}: {formatted(control['gain'], '+.4f')} {interval(control['ci'])}, "
              f"{control['verdict']}")  # fmt: skip
    write_report(report, run.root)


if __name__ == "__main__":
    program.run(main)
