"""Raw logs of a synthetic shop through `mim prepare` to the demo's models: `make prepare-demo`.

The logs hold copies, events in the folder of a later day, rows without a user, unknown items, missing
images and times of three kinds (`data/shop_raw.py`). None of it loses what happened, so `mim prepare` has to
find the shop's own requests again, row by row; only requests too young for their label are missing. Base and
MIM are trained on both, MIM with the same table.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.paper.shop import ShopSizes
from mim_torchrec.data.schema import REQUESTS, SPLITS, Dataset
from mim_torchrec.pipeline.loading import load
from mim_torchrec.pipeline.running import run
from mim_torchrec.pipeline.spec import Pipeline

FILE = Path(__file__).with_suffix(".toml")
MODELS = ("base", "mim")
AUC_DIFFERENCE = 0.002


@dataclass(frozen=True, kw_only=True)
class PrepareDemoConfig(ShopSizes):
    """Prepare a shop's raw logs, train on the result and on the shop's own requests, and compare."""

    out: Path = Path("runs/prepare_demo")
    """Directory of the run; a run that was interrupted there resumes."""


def describe(config: PrepareDemoConfig) -> Pipeline:
    """The stages of `prepare_demo.toml`, of the sizes that were asked for."""
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "nproc")}
    return load(FILE, sizes | {"browsing": 3 * config.requests, "ranks": f"1x{config.nproc}"})


def requests_of(root: Path, split: str) -> pa.Table:
    """Requests of a part in the columns of the schema, in order of id."""
    columns = REQUESTS.names
    files = Dataset(root).requests(split)
    tables = [pq.read_table(file, columns=columns, partitioning=None) for file in files]
    return pa.concat_tables(tables).cast(REQUESTS).sort_by("request_id")


def compare_rows(ours: Path, theirs: Path) -> dict[str, dict[str, int]]:
    """Requests by part: of the shop, prepared, and those of both that are equal in every column."""
    found = {}
    for split in SPLITS:
        prepared, shop = requests_of(ours, split), requests_of(theirs, split)
        rows = {row["request_id"]: row for row in shop.to_pylist()}
        equal = sum(rows.get(row["request_id"]) == row for row in prepared.to_pylist())
        found[split] = {"shop": len(shop), "prepared": len(prepared), "equal": equal}
    return found


def build_report(config: PrepareDemoConfig, root: Path) -> dict[str, Any]:
    """Put the report together from what the stages wrote."""
    rows = compare_rows(root / "prepared", root / "shop")
    left_out = json.loads((root / "prepared" / "prepare.json").read_text())
    auc = {
        model: {
            source: json.loads((root / "ctr" / name / "metrics.json").read_text())["auc"]
            for source, name in (("prepared", model), ("shop", f"{model}-shop"))
        }
        for model in MODELS
    }
    young = left_out["requests"]["too_young_for_their_label"]
    missing = sum(part["shop"] - part["prepared"] for part in rows.values())
    different = sum(part["prepared"] - part["equal"] for part in rows.values())
    targets = [
        target("prepared requests that differ from the shop's own: none", different, different == 0),
        target("requests that are missing, beside those too young for their label: none", missing - young,
               missing == young),
        *(
            target(f"{model}: test AUC from raw logs less that from the shop, within ±{AUC_DIFFERENCE}",
                   found["prepared"] - found["shop"],
                   abs(found["prepared"] - found["shop"]) <= AUC_DIFFERENCE)
            for model, found in auc.items()
        ),
    ]  # fmt: skip
    return {"rows": rows, "auc": auc, "left_out": left_out, "targets": targets,
            "config": dataclasses.asdict(config)}  # fmt: skip


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    left_out = report["left_out"]
    kinds = left_out["input"]
    reasons = ("rows", "incomplete", "repeated", "of_unknown_items", "kept")
    return [
        Section("Requests", ["Equal in every column."], ["part", "shop", "prepared", "equal"],
                [[split, *(f"{part[key]:,}" for key in ("shop", "prepared", "equal"))]
                 for split, part in report["rows"].items()]),
        Section("Test AUC", ["MIM has the table of the encoder that was trained on what was prepared."],
                ["model", "from raw logs", "from the shop"],
                [[model, f"{found['prepared']:.4f}", f"{found['shop']:.4f}"]
                 for model, found in report["auc"].items()]),
        Section("What was left out", [
                    f"{left_out['requests']['too_young_for_their_label']} requests were too young for their "
                    f"label, {left_out['items']['without_image']} items and "
                    f"{left_out['pairs']['without_image']} pairs have no image."],
                ["events", *reasons],
                [[kind, *(f"{counts.get(key, 0):,}" for key in reasons)]
                 for kind, counts in kinds.items() if kind != "catalog"]),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.prepare_demo`."""
    config = tyro.cli(
        PrepareDemoConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    root = config.out.resolve()
    run(describe(config), root)
    report = build_report(config, root)
    for model, found in report["auc"].items():
        print(f"{model}: test AUC {found['prepared']:.4f} from raw logs, {found['shop']:.4f} from the shop")
    summary = (
        f"{config.items:,} items, {config.users:,} users, {config.requests:,} requests; every training stage "
        f"launched by TorchX on {config.nproc} ranks."
    )
    write_pages(report, "From raw logs to a model", summary, sections(report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
