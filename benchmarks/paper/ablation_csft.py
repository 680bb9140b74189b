"""What pre-training, C-SFT and its parts are worth in click prediction: `make ablation-csft`.

Tables 3, 4 and the upper half of Table 5 on a synthetic shop: every version's table goes into the same CTR
model, over several seeds of C-SFT and CTR; pre-training has one. Beside them the recall of an image search
with each encoder, and what a point of it was worth in AUC.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import deviation, exchange_rate, read_metrics
from mim_torchrec.benchmarks.harness.drawing import beside_the_paper, subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, formatted, write_pages
from mim_torchrec.benchmarks.harness.stages import Run, Stage, Value, ctr_stage, export_stage
from mim_torchrec.benchmarks.paper import shop

# --- settings, all in one place -----------------------------------------------------------------------------
PRETRAIN: dict[str, Value] = {
    "vision.name": "efficientnet_lite0", "vision.image-size": 64, "text.name": "minilm",
    "dda-vision.epochs": 2, "dda-vision.batch-size": 128, "dda-vision.mask-size": 16,
    "dda-text.epochs": 2, "dda-text.batch-size": 128, "dma.epochs": 3, "dma.batch-size": 128,
}  # fmt: skip
CSFT: dict[str, Value] = {"epochs": 10, "batch-size": 256, "freeze-towers": True,
                          "queue-batches": 4, "queue-start-step": 20, "validation-fraction": 0.1}  # fmt: skip
CTR: dict[str, Value] = shop.CTR | {"epochs": 3}
HELD_OUT = CSFT["validation-fraction"]
TRAINED_TOWERS: dict[str, Value] = {"freeze-towers": False, "epochs": 3, "batch-size": 128, "tower-lr": 1e-4}
PAPER: dict[str, Value] = {"preset": "paper"}
# ------------------------------------------------------------------------------------------------------------

BASE_AUC = 0.7024  # Table 3
PLAIN, DDA, DMA, MIM = "plain", "dda", "dma", "mim"
NO_QUEUE: dict[str, Value] = {"queue-batches": 0, "queue-start-step": 0}
CROSS_ENTROPY = NO_QUEUE | {"loss": "cross_entropy"}
TRAINED: dict[str, dict[str, Value]] = {
    MIM: {},
    "category-ce": CROSS_ENTROPY | {"interest-signal": "category"},
    "click-ce": CROSS_ENTROPY | {"interest-signal": "click"},
    "purchase-ce": CROSS_ENTROPY | {"interest-signal": "purchase"},
    "click-cl": {"interest-signal": "click"},
    "no-tfn": {"head.fusion": "concat"},
    "no-st-nsg": NO_QUEUE | {"hard-negatives": False},
    "no-multi-level": {"alpha": 0.0, "beta": 0.0},
}
"""C-SFT runs and what they change."""


@dataclass(frozen=True)
class Scale:
    """How large the models are, and what of them C-SFT trains: flags of every stage."""

    pretrain: dict[str, Value]
    csft: dict[str, Value]
    ctr: dict[str, Value]
    plain: str
    plain_options: dict[str, Value]


SCALES = {
    "frozen": Scale(PRETRAIN, CSFT, CTR, shop.PLAIN, shop.PLAIN_OPTIONS),
    "trained": Scale(PRETRAIN, CSFT | TRAINED_TOWERS, CTR, shop.PLAIN, shop.PLAIN_OPTIONS),
    "paper": Scale(PAPER, PAPER | {"validation-fraction": HELD_OUT}, PAPER, "plain:eva02+bge_base", {}),
}


@dataclass(frozen=True)
class Version:
    """A line of one of the paper's tables: our name of its encoder, and the AUC printed there."""

    name: str
    encoder: str
    paper_auc: float


TABLES = {
    "table3": (
        Version("Plain FoM", PLAIN, 0.7030),
        Version("+DDA", DDA, 0.7034),
        Version("+DDA+DMA", DMA, 0.7040),
        Version("+DDA+DMA+C-SFT", MIM, 0.7062),
    ),
    "table4": (
        Version("v1 (CE, category)", "category-ce", 0.7043),
        Version("v2 (CE, click)", "click-ce", 0.7053),
        Version("v3 (CE, purchase)", "purchase-ce", 0.7059),
        Version("v4 (CL, click)", "click-cl", 0.7055),
        Version("v5 (CL, purchase)", MIM, 0.7062),
    ),
    "table5": (
        Version("MIM", MIM, 0.7062),
        Version("w/o TFN", "no-tfn", 0.7058),
        Version("w/o ST-NSG", "no-st-nsg", 0.7056),
        Version("w/o Multi-level InfoNCE", "no-multi-level", 0.7052),
        Version("w/o C-SFT", DMA, 0.7040),
    ),
}
TITLES = {"table3": "Table 3: pre-training", "table4": "Table 4: loss and signal of C-SFT",
          "table5": "Table 5, C-SFT stage: what is left out"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Measure what pre-training, C-SFT and its parts are worth, and write a report."""

    out: Path = Path("runs/ablation_csft")
    """Directory of the run; a run that was interrupted there resumes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of C-SFT and of the CTR models."""
    items: int = 4000
    """Items of the shop."""
    users: int = 3000
    """Users of the shop."""
    requests: int = 20_000
    """Requests of the shop, five candidates each."""
    searches: int = 4000
    """Image searches of the shop, each with a click and a purchase."""
    towers: Literal["frozen", "trained", "paper"] = "frozen"
    """What C-SFT trains: the head above frozen towers, small towers as well, or everything as the paper does
    (`--preset paper` of every stage: EVA-02 and BGE, 1,024 pairs a rank, k = 10), which needs GPUs and more
    searches than steps take."""
    jobs: int = 2
    """Stages that run side by side, one process and one thread each."""


class Job:
    """The stages of the run, and where their results are."""

    def __init__(self, config: AblationConfig) -> None:
        self.config, self.run, self.scale = config, Run(config.out), SCALES[config.towers]
        self.root = self.run.root
        self.ctr: dict[tuple[str, int], Path] = {}
        self.found: dict[tuple[str, int], Path] = {}

    def _side_by_side(self, stages: Sequence[Stage]) -> None:
        self.run.run(stages, jobs=self.config.jobs, threads=1)

    def prepare(self) -> None:
        """The shop and the towers."""
        c = self.config
        sizes = shop.ShopSizes(items=c.items, users=c.users, requests=c.requests, searches=c.searches)
        self.shop = shop.shop_stage(sizes, self.root, "shop", 1.0)
        out = self.root / "pretrain"
        options: dict[str, Value] = {"data": self.shop.out, "out": out, "seed": 0, **self.scale.pretrain}
        self.pretrain = Stage(name="pretrain", command=("pretrain",), options=options, out=out,
                              ranks=f"1x{c.jobs}", after=(self.shop,))  # fmt: skip
        self.run.run([self.shop, self.pretrain], threads=1)

    def encode(self) -> None:
        """C-SFT of every version and seed, image search and export with every encoder."""
        seeds = self.config.seeds
        csft = {(name, seed): self._csft(name, seed) for seed in seeds for name in TRAINED}
        first, *others = csft.values()
        self.run.run([first], threads=1)  # the features that it keeps are there for all others
        self._side_by_side(others)
        encoders: dict[tuple[str, int], Stage | str] = {key: stage for key, stage in csft.items()}
        towers = {PLAIN: self.scale.plain, DDA: f"plain:{self.pretrain.out / 'dda-text' / 'towers'}",
                  DMA: f"plain:{self.pretrain.out / 'dma' / 'towers'}"}  # fmt: skip
        encoders |= {(name, 0): spec for name, spec in towers.items()}
        searches = {key: self._retrieve(key, encoder) for key, encoder in encoders.items()}
        self._side_by_side(list(searches.values()))
        self.found = {key: stage.out for key, stage in searches.items()}
        cache: dict[str, Value] = {"feature-cache": self.root / "features"}
        self.tables = {
            key: export_stage(self.root, f"table-{key[0]}-{key[1]}", self.shop, encoder, "1x1",
                              cache | (self.scale.plain_options if key[0] == PLAIN else {}))
            for key, encoder in encoders.items()
        }  # fmt: skip
        self._side_by_side(list(self.tables.values()))

    def _csft(self, name: str, seed: int) -> Stage:
        out = self.root / f"csft-{name}-{seed}"
        options: dict[str, Value] = {
            "data": self.shop.out, "out": out, "seed": seed, "towers": self.pretrain.out / "dma" / "towers",
            "feature-cache": self.root / "features",
        }  # fmt: skip
        options |= self.scale.csft | TRAINED[name]
        return Stage(name=out.name, command=("csft",), options=options, out=out, ranks="1x1",
                     after=(self.shop, self.pretrain))  # fmt: skip

    def _retrieve(self, key: tuple[str, int], encoder: Stage | str) -> Stage:
        out = self.root / f"found-{key[0]}-{key[1]}"
        options: dict[str, Value] = {
            "data": self.shop.out, "out": out, "held-out-fraction": HELD_OUT,
            "encoder": encoder.out / "encoder" if isinstance(encoder, Stage) else encoder,
            "feature-cache": self.root / "features",
        }  # fmt: skip
        after = (self.shop, encoder) if isinstance(encoder, Stage) else (self.shop, self.pretrain)
        if key[0] == PLAIN:
            options |= self.scale.plain_options
        return Stage(name=out.name, command=("retrieve",), options=options, out=out, after=after)

    def train(self) -> None:
        """The CTR model on every table, and without one, for every seed."""
        stages: dict[tuple[str, int], Stage] = {}
        for seed in self.config.seeds:
            names = ["base", PLAIN, DDA, DMA, *TRAINED]
            for name in names:
                table = self.tables.get((name, seed), self.tables.get((name, 0)))
                stages[name, seed] = ctr_stage(
                    f"{name}-{seed}", root=self.root, data=self.shop, table=None if name == "base" else table,
                    seed=seed, options=self.scale.ctr, ranks="1x1",
                )  # fmt: skip
        self._side_by_side(list(stages.values()))
        self.ctr = {key: stage.out for key, stage in stages.items()}

    def auc(self, name: str) -> np.ndarray:
        """Test AUC of one version, (num_seeds,)."""
        runs = [self.ctr[name, seed] for seed in self.config.seeds]
        return np.array([metrics["auc"] for metrics in read_metrics(runs)])

    def recall(self, name: str, seed: int) -> dict[str, Any]:
        """What the image search found with an encoder."""
        key = (name, seed) if (name, seed) in self.found else (name, 0)
        return json.loads((self.found[key] / "retrieval.json").read_text())


def line(job: Job, version: Version, base: np.ndarray) -> dict[str, Any]:
    """A line of a table: ours beside the paper's."""
    auc = job.auc(version.encoder)
    found = [job.recall(version.encoder, seed) for seed in job.config.seeds]
    return {
        "version": version.name,
        "auc_mean": float(auc.mean()),
        "auc_std": deviation(auc),
        "delta": float((auc - base).mean()),
        "delta_std": deviation(auc - base),
        "paper_auc": version.paper_auc,
        "paper_delta": round(version.paper_auc - BASE_AUC, 4),
        "recall_at_10": float(np.mean([f["recall_at_10"] for f in found])),
        "mean_rank": float(np.mean([f["mean_rank"] for f in found])),
    }


def other_orders(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Pairs of versions that stand the other way round than in the paper, in words."""
    said = []
    for i, one in enumerate(lines):
        for two in lines[i + 1 :]:
            ours, paper = one["auc_mean"] - two["auc_mean"], one["paper_auc"] - two["paper_auc"]
            if ours * paper < 0:
                high, low = (one, two) if ours > 0 else (two, one)
                noise = max(one["delta_std"] or 0.0, two["delta_std"] or 0.0)
                size = "within" if abs(ours) <= noise else "beyond"
                said.append(
                    f"{high['version']} is above {low['version']} here by {abs(ours):.4f}, {size} one "
                    f"standard deviation of the seeds ({noise:.4f}); in the paper it is below by "
                    f"{abs(paper):.4f}."
                )
    return said or ["The order is the paper's."]


def exchange(job: Job, base: np.ndarray) -> dict[str, Any]:
    """AUC for a point of recall, over the runs with an encoder of C-SFT and over all."""
    points = []
    for name in [PLAIN, DDA, DMA, *TRAINED]:
        for k, seed in enumerate(job.config.seeds):
            points.append({
                "encoder": name, "seed": seed, "recall_at_10": job.recall(name, seed)["recall_at_10"],
                "gain": float(job.auc(name)[k] - base[k]),
            })  # fmt: skip
    report: dict[str, Any] = {"points": points}
    for which, names in (("csft", set(TRAINED)), ("all", {p["encoder"] for p in points})):
        kept = [p for p in points if p["encoder"] in names]
        report[which] = exchange_rate([p["recall_at_10"] for p in kept], [p["gain"] for p in kept])
    return report


def draw_tables(tables: dict[str, list[dict[str, Any]]]) -> bytes:
    """Our gains beside the paper's, a panel a table."""
    figure, panels = subplots(1, len(tables), figsize=(11, 3.6))
    for axes, (name, lines) in zip(panels, tables.items(), strict=True):
        names = [row["version"].replace(" (", "\n(") for row in lines]
        beside_the_paper(axes, names, lines, rotation=40, ha="right")
        axes.set_title(TITLES[name], fontsize=9)
        axes.set_ylabel("AUC over Base", fontsize=8)
    return to_png(figure)


def draw_exchange(report: dict[str, Any]) -> bytes:
    """Gain in AUC over recall, a point a run."""
    figure, axes = subplots(figsize=(6.4, 3.8))
    for name in dict.fromkeys(p["encoder"] for p in report["points"]):
        mine = [p for p in report["points"] if p["encoder"] == name]
        axes.scatter([p["recall_at_10"] for p in mine], [p["gain"] for p in mine], s=22, label=name)
    axes.set_xlabel("recall@10 of the bought item, image search", fontsize=9)
    axes.set_ylabel("AUC over Base", fontsize=9)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    tidy(axes)
    return to_png(figure)


def build(job: Job) -> tuple[dict[str, Any], list[Section], dict[str, bytes]]:
    """The report, its sections and its images."""
    base = job.auc("base")
    tables = {name: [line(job, version, base) for version in rows] for name, rows in TABLES.items()}
    orders = {name: other_orders(lines) for name, lines in tables.items()}
    rate = exchange(job, base)
    report: dict[str, Any] = {
        **tables, "orders": orders, "exchange_rate": rate,
        "base": {"auc_mean": float(base.mean()), "auc_std": deviation(base), "paper_auc": BASE_AUC},
        "stages": job.run.seconds,
        "config": {**dataclasses.asdict(job.config), "pretrain": job.scale.pretrain,
                   "csft": job.scale.csft, "ctr": job.scale.ctr, "versions": TRAINED},
    }  # fmt: skip
    columns = ["version", "AUC", "± seeds", "Δ", "± seeds", "paper's Δ", "recall@10", "mean rank"]
    sections = [
        Section(
            TITLES[name], text=orders[name], columns=columns,
            rows=[[row["version"], f"{row['auc_mean']:.4f}", formatted(row["auc_std"]),
                   f"{row['delta']:+.4f}", formatted(row["delta_std"]), f"{row['paper_delta']:+.4f}",
                   f"{row['recall_at_10']:.3f}", f"{row['mean_rank']:.0f}"] for row in lines],
        )
        for name, lines in tables.items()
    ]  # fmt: skip
    sections.append(Section("Gains beside the paper's", images=["gains.png"]))
    said = [
        f"{which}: {found['n']} runs, {_rate(found)}" for which, found in rate.items() if which != "points"
    ]
    sections.append(
        Section("What recall was worth", text=[
            "Recall@10 of the bought item among all items by image search with an encoder, against the gain "
            "in AUC of the CTR model on its table. Towers without C-SFT compare images with images.", *said,
        ], images=["exchange.png"])
    )  # fmt: skip
    seed = job.config.seeds[0]
    images = {
        "gains.png": draw_tables(tables),
        "exchange.png": draw_exchange(rate),
        "retrieval.png": (job.found[MIM, seed] / "retrieval.png").read_bytes(),
    }
    sections.append(
        Section("What a search finds", text=[
            "Left the query image, then the ten items that MIM's encoder finds for it; the bought one in a "
            "green frame, at the right end where it is not among the ten.",
        ], images=["retrieval.png"])
    )  # fmt: skip
    return report, sections, images


def _rate(found: dict[str, Any]) -> str:
    if found["auc_per_point"] is None:
        return "too few or too equal to say"
    return (
        f"{found['auc_per_point']:+.5f} AUC for a point of recall, Pearson {found['pearson']:+.2f}, "
        f"Spearman {found['spearman']:+.2f}"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.ablation_csft`."""
    config = tyro.cli(AblationConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    job = Job(config)
    job.prepare()
    job.encode()
    job.train()
    report, sections, images = build(job)
    base = report["base"]
    summary = (
        f"A synthetic shop, {len(config.seeds)} seeds of C-SFT and CTR, one of pre-training. Base without "
        f"content: AUC {base['auc_mean']:.4f} ± {formatted(base['auc_std'])} (paper {BASE_AUC}). Δ is the "
        "difference to Base on the same seed. The paper prints +0.0060 for plain FoM; its AUC column says "
        "+0.0006, which stands here."
    )
    write_pages(report, "What pre-training and C-SFT are worth", summary, sections, images, job.root)
    print((job.root / "report.md").read_text())


if __name__ == "__main__":
    program.run(main)
