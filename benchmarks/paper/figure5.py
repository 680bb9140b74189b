"""Vision and text models by what they cost and what they are worth in click prediction: `make figure5`.

Every model whose weights are here goes through C-SFT (above frozen towers), export and CTR; its AUC stands
over its parameters and GFLOPs, as in Figure 5. Models without local weights, as a rule those of the paper,
are built with random ones, run forward once, and left out of the plot.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import read_metrics
from mim_torchrec.benchmarks.harness.drawing import subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, write_pages
from mim_torchrec.benchmarks.harness.stages import Run, Stage, Value, ctr_stage, export_stage
from mim_torchrec.benchmarks.measures.encoders import word_tokenizer
from mim_torchrec.benchmarks.measures.flops import Cost, tower_cost
from mim_torchrec.benchmarks.paper import shop
from mim_torchrec.encoders.foundation import TEXT, VISION
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, learns_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.errors import OptionError

HEAD_DIM = 128
CSFT: dict[str, Value] = {"freeze-towers": True, "epochs": 10, "batch-size": 256, "head.dim": HEAD_DIM}
CTR: dict[str, Value] = shop.CTR | {"epochs": 3}


@dataclass(frozen=True)
class Tower:
    """A model as it is named on the command line: `<name>[@<image size>][=<weights>]`."""

    name: str
    size: int | None = None
    weights: str = "pretrained"

    @classmethod
    def parse(cls, words: str) -> "Tower":
        """Read the name.

        >>> Tower.parse("efficientnet_lite0@64")
        Tower(name='efficientnet_lite0', size=64, weights='pretrained')
        >>> Tower.parse("bge_base=models/bge")
        Tower(name='bge_base', size=None, weights='models/bge')
        """
        name, _, weights = words.partition("=")
        name, _, size = name.partition("@")
        return cls(name, int(size) if size else None, weights or "pretrained")

    def __str__(self) -> str:
        size = f"@{self.size}" if self.size else ""
        return f"{self.name}{size}" + (f" ({self.weights})" if self.weights != "pretrained" else "")


@dataclass(frozen=True, kw_only=True)
class Figure5Config:
    """Run vision and text models through C-SFT, export and CTR, and plot AUC over cost."""

    data: Path | None = None
    """Dataset directory; by default a synthetic shop is made."""
    out: Path = Path("runs/figure5")
    """Directory of the run; a run that was interrupted there resumes."""
    vision: tuple[str, ...] = ("efficientnet_lite0@64", "efficientnet_lite0@32", "resnet10t@64=random")
    """Vision models, `<name>[@<image size>][=<weights>]`; the first is the one text models are run with."""
    text: tuple[str, ...] = ("minilm", "bert-tiny=random")
    """Text models, `<name>[=<weights>]`; the first is the one that vision models are run with."""
    all_pairs: bool = False
    """Run every vision model with every text model."""
    forward_paper: bool = True
    """Build every model of the paper's Figure 5 and run it forward, whether or not its weights are here."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of C-SFT and CTR."""
    max_length: int = 32
    """Tokens of a title, for the cost."""
    jobs: int = 2
    """Stages that run side by side, one process and one thread each."""


@dataclass(frozen=True)
class Built:
    """A tower that was built and run forward; with random weights where there is a problem with its own."""

    cost: Cost
    feature_dim: int
    problem: str | None = None


def pairs_of(config: Figure5Config) -> list[tuple[Tower, Tower]]:
    """Which vision model runs with which text model."""
    vision, text = ([Tower.parse(words) for words in names] for names in (config.vision, config.text))
    if config.all_pairs:
        return [(v, t) for v in vision for t in text]
    return [(v, text[0]) for v in vision] + [(vision[0], t) for t in text[1:]]


def build_vision(tower: Tower) -> Built:
    """Build a vision model and run it on one image."""
    config = VisionEncoderConfig(name=tower.name, weights=tower.weights, image_size=tower.size)
    problem = None
    try:
        encoder = VisionEncoder(config)
    except ValueError as error:
        problem = str(error)
        encoder = VisionEncoder(dataclasses.replace(config, weights="random"))
    shape = (1, 3, encoder.image_size, encoder.image_size)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Built(_checked(encoder, image), encoder.feature_dim, problem)


def build_text(tower: Tower, max_length: int) -> Built:
    """Build a text model and run it on a title of that many tokens."""
    config = TextEncoderConfig(name=tower.name, weights=tower.weights, max_length=max_length)
    problem = None
    try:
        encoder = TextEncoder(config, tokenizer=word_tokenizer() if learns_tokenizer(config) else None)
    except ValueError as error:
        problem = str(error)
        encoder = TextEncoder(dataclasses.replace(config, weights="random"), tokenizer=word_tokenizer())
    ids = torch.randint(0, 64, (1, max_length), generator=torch.Generator().manual_seed(0))
    cost = _checked(encoder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return Built(cost, encoder.feature_dim, problem)


def _checked(encoder: VisionEncoder | TextEncoder, inputs: Any) -> Cost:
    """Run forward once; RuntimeError unless that gives one finite vector of the size that it says."""
    found: list[torch.Tensor] = []
    cost = tower_cost(encoder, lambda: found.append(encoder(inputs)))
    if found[0].shape != (1, encoder.feature_dim) or not torch.isfinite(found[0]).all():
        raise RuntimeError(f"{encoder.config.name} gives {tuple(found[0].shape)}, or what is not finite")
    return cost


class Job:
    """The stages of the run, and what they found.

    Attributes:
        base: (num_seeds,) test AUC without content.
        auc: (num_pairs, num_seeds) test AUC of every pair of models.
    """

    def __init__(
        self, config: Figure5Config, pairs: Sequence[tuple[Tower, Tower]], built: dict[Tower, Built]
    ) -> None:
        self._config, self._pairs, self._built, self.run = config, pairs, built, Run(config.out)
        self.root = self.run.root
        if config.data is None:
            self._data = shop.shop_stage(shop.ShopSizes(), self.root, "shop", 1.0)
            self.run.run([self._data])
        else:  # stands for data that is there
            out = config.data.resolve()
            self._data = Stage(name="data", command=("shop",), out=out, files=(out / "dataset.json",))
        cache: dict[str, Value] = {"feature-cache": self.root / "features"}
        keys = [(pair, seed) for seed in config.seeds for pair in range(len(pairs))]
        csft = {key: self._csft(*key) for key in keys}
        self._side_by_side(list(csft.values()))  # the first of each pair keeps its features for the others
        tables = {
            (pair, seed): export_stage(self.root, f"table-{pair}-{seed}", self._data, stage, "1x1", cache)
            for (pair, seed), stage in csft.items()
        }
        self._side_by_side(list(tables.values()))
        every: list[int | None] = [None, *range(len(pairs))]
        runs = {(pair, seed): self._ctr(pair, seed, tables) for seed in config.seeds for pair in every}
        self._side_by_side(list(runs.values()))
        auc = [
            [metrics["auc"] for metrics in read_metrics([runs[pair, seed].out for seed in config.seeds])]
            for pair in every
        ]
        self.base, self.auc = np.array(auc[0]), np.array(auc[1:])

    def _side_by_side(self, stages: Sequence[Stage]) -> None:
        self.run.run(stages, jobs=self._config.jobs, threads=1)

    def _csft(self, pair: int, seed: int) -> Stage:
        vision, text = self._pairs[pair]
        out = self.root / f"csft-{pair}-{seed}"
        options: dict[str, Value] = {
            "data": self._data.out, "out": out, "seed": seed, "feature-cache": self.root / "features",
            "vision.name": vision.name, "vision.weights": vision.weights,
            "text.name": text.name, "text.weights": text.weights,
        }  # fmt: skip
        if vision.size is not None:
            options["vision.image-size"] = vision.size
        smallest = min(self._built[tower].feature_dim for tower in (vision, text))
        options["init"] = "pca" if smallest >= HEAD_DIM else "random"  # no more components than that
        return Stage(name=out.name, command=("csft",), options=options | CSFT, out=out, ranks="1x1",
                     after=(self._data,))  # fmt: skip

    def _ctr(self, pair: int | None, seed: int, tables: dict[tuple[int, int], Stage]) -> Stage:
        name = f"base-{seed}" if pair is None else f"pair-{pair}-{seed}"
        table = None if pair is None else tables[pair, seed]
        return ctr_stage(name, root=self.root, data=self._data, table=table, seed=seed, options=CTR,
                         ranks="1x1")  # fmt: skip


def draw(points: Sequence[dict[str, Any]], base: float) -> bytes:
    """AUC over parameters and over GFLOPs of an item, a color a pair of models."""
    figure, panels = subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axes, key, label in zip(
        panels, ("parameters", "gflops"), ("parameters of both towers", "GFLOPs of an item"), strict=True
    ):
        for point in points:
            axes.errorbar(point[key], point["auc_mean"], yerr=point["auc_std"] or 0, fmt="o", capsize=3,
                          label=f"{point['vision']} + {point['text']}")  # fmt: skip
        axes.axhline(base, color="#8a94a6", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel(label, fontsize=9)
        tidy(axes)
    panels[0].set_ylabel("test AUC (dashed: Base)", fontsize=9)
    panels[1].legend(frameon=False, fontsize=7)
    return to_png(figure)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.figure5`."""
    config = tyro.cli(Figure5Config, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    torch.set_num_threads(config.jobs)
    pairs = pairs_of(config)
    built = {vision: build_vision(vision) for vision, _ in pairs}
    built |= {text: build_text(text, config.max_length) for _, text in pairs}
    forward: list[dict[str, Any]] = []

    def only_forward(tower: Tower, found: Built, why: str) -> None:
        forward.append({"model": str(tower), **dataclasses.asdict(found), "why": why})
        millions = found.cost.parameters / 1e6
        print(f"{tower}: {millions:.0f} M parameters, {found.cost.gflops:.1f} GFLOPs; {why}", flush=True)

    for tower, found in built.items():
        if found.problem is not None:
            only_forward(tower, found, "no weights here")
    if config.forward_paper:
        why = "of the paper, random weights, run forward"
        for name in VISION.values():
            tower = Tower(name, weights="random")
            only_forward(tower, build_vision(tower), why)
        for name in TEXT:
            tower = Tower(name, weights="random")
            only_forward(tower, build_text(tower, config.max_length), why)
    runnable = [pair for pair in pairs if all(built[tower].problem is None for tower in pair)]
    if not runnable:
        raise OptionError("no pair of models has its weights here: name files, --vision <name>=<file>")
    job = Job(config, runnable, built)
    points = []
    for (vision, text), auc in zip(runnable, job.auc, strict=True):
        costs = (built[vision].cost, built[text].cost)
        points.append({
            "vision": str(vision), "text": str(text),
            "parameters": sum(cost.parameters for cost in costs),
            "gflops": sum(cost.gflops for cost in costs),
            "auc_mean": float(auc.mean()), "auc_std": float(auc.std(ddof=1)) if len(auc) > 1 else None,
            "delta": float((auc - job.base).mean()),
        })  # fmt: skip
    write(config, job, points, forward)


def write(
    config: Figure5Config, job: Job, points: list[dict[str, Any]], forward: list[dict[str, Any]]
) -> None:
    """Write the report and print it."""
    base = float(job.base.mean())
    sections = [
        Section(
            "AUC over cost", columns=["vision", "text", "parameters (M)", "GFLOPs", "AUC", "Δ to Base"],
            rows=[[p["vision"], p["text"], f"{p['parameters'] / 1e6:.1f}", f"{p['gflops']:.2f}",
                   f"{p['auc_mean']:.4f}", f"{p['delta']:+.4f}"] for p in points],
            images=["figure5.png"],
        ),
        Section(
            "Built and run forward, not in the plot", columns=["model", "parameters (M)", "GFLOPs", "why"],
            rows=[[f["model"], f"{f['cost']['parameters'] / 1e6:.1f}", f"{f['cost']['gflops']:.2f}", f["why"]]
                  for f in forward],
        ),
    ]  # fmt: skip
    report = {
        "base_auc": base, "points": points, "forward": forward, "stages": job.run.seconds,
        "config": {**dataclasses.asdict(config), "csft": CSFT, "ctr": CTR},
    }  # fmt: skip
    summary = (
        f"Test AUC, mean of {len(config.seeds)} seeds, over the cost of one item: an image and a title of "
        f"{config.max_length} tokens. Base without content: {base:.4f}. Towers are frozen, C-SFT trains what "
        "is above them; a tower with random weights is a fixed random projection."
    )
    images = {"figure5.png": draw(points, base)}
    write_pages(report, "Foundation models: AUC over cost", summary, sections, images, job.root)
    print((job.root / "report.md").read_text())


if __name__ == "__main__":
    program.run(main)
