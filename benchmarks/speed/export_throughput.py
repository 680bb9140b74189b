"""How near `mim export` comes to the bare speed of its encoder: `make bench-export-throughput`.

Export, from Parquet files to a finished table, takes turns with nothing but forward passes over the same
items, whose pixels and tokens lie ready; so does an export that decodes no image ahead. Weights are random:
what is timed does not depend on them. Loading the encoder, once an export however many items there are, is
timed apart.
"""

import dataclasses
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
import tyro
from torch import Tensor

import mim_torchrec.representation.export as representation
from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.turns import threads_of_torch
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import ITEMS, Dataset
from mim_torchrec.data.shop_items import STYLE_DIM, draw_images, draw_titles, normalized
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.encoders.checkpoint import save_encoder
from mim_torchrec.encoders.item_encoder import ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, learns_tokenizer, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.errors import check_sizes
from mim_torchrec.representation.config import ExportConfig
from mim_torchrec.representation.export import TrainedEncoder
from mim_torchrec.training.distributed import DistributedContext, distributed

TARGET = 0.9
PARTS = ("read", "decode", "resize", "tokenize", "forward", "write")


@dataclass(frozen=True, kw_only=True)
class ExportThroughputConfig:
    """Time exports and bare forward passes in turns, and write a report."""

    out: Path = Path("runs/export_throughput")
    """Directory of the report, the items and the encoders."""
    vision: tuple[str, ...] = ("efficientnet_lite0:128", "efficientnet_lite0:224")
    """Vision towers and the side of their images, as NAME:PIXELS."""
    text: str = "minilm"
    """Text tower."""
    items: int = 384
    """Items that are exported."""
    image_px: int = 400
    """Side of their JPEG images."""
    batch_size: int = 32
    """Items of a forward pass."""
    decode_threads: int = ExportConfig.decode_threads
    """Threads that decode ahead."""
    threads: tuple[int, ...] = (1, torch.get_num_threads())
    """Threads of the forward pass; with as many as there are cores, decoding takes time from it."""
    rounds: int = 3
    """Turns of each, of whose ratios the median is taken."""


def write_items(config: ExportThroughputConfig) -> Path:
    """A data set of nothing but items, with images and titles of the synthetic shop."""
    out = config.out / "data"
    rng = np.random.default_rng(0)
    styles = normalized(rng.normal(size=(config.items, STYLE_DIM)))
    categories = rng.integers(20, size=config.items)
    images: list[bytes] = []
    for start in range(0, config.items, 16):  # large images are drawn as float32, all of a call at once
        part = slice(start, start + 16)
        images += draw_images(styles[part], categories[part], config.image_px, rng)
    columns = {
        "item_id": np.arange(config.items),
        "title": draw_titles(styles, categories, rng),
        "image": images,
        "category": [str(category) for category in categories],
    }
    schema = pa.schema([ITEMS.field(name) for name in columns])
    source = {"command": "python -m mim_torchrec.benchmarks.speed.export_throughput", "items": config.items,
              "image_px": config.image_px}  # fmt: skip
    with DatasetWriter(out, name="export_throughput", source=source) as writer:
        writer.write("items", pa.table(columns, schema=schema), row_group_size=100)
    return out


def write_encoder(config: ExportThroughputConfig, vision: str, titles: list[str]) -> Path:
    """An encoder of random weights, as C-SFT leaves one."""
    name, _, pixels = vision.partition(":")
    settings = ItemEncoderConfig(
        vision=VisionEncoderConfig(name=name, weights="random", image_size=int(pixels)),
        text=TextEncoderConfig(name=config.text, weights="random"),
    )
    tokenizer = train_tokenizer(titles) if learns_tokenizer(settings.text) else None
    path = config.out / "encoders" / vision.replace(":", "-")
    save_encoder(ItemEncoder.build(settings, tokenizer), path)
    return path


def timed(call: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Seconds (2,) of a call, those that passed and those of all cores of this process; what it returned."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = call()
    return np.array([time.perf_counter(), time.process_time()]) - started, result


class Contest:
    """One encoder over the same items: exported, or from what lies ready.

    Args:
        config: sizes.
        encoder: its directory.
        items: that are exported.
        context: a world of one.
    """

    def __init__(
        self, config: ExportThroughputConfig, encoder: Path, items: ItemStore, context: DistributedContext
    ) -> None:
        self._config, self._path, self._context, self._items = config, encoder, context, items
        self._encoder = TrainedEncoder(str(encoder), context.device)
        text, rows = self._encoder.encoder.text, np.arange(len(items))
        self._ready: list[tuple[Tensor, dict[str, Tensor]]] = []
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            pixels = torch.stack([self._encoder.vision.transform(image) for image in items.images(part)])
            self._ready.append((pixels, text.tokenize(items.titles(part))))

    def bare(self) -> np.ndarray:
        """Seconds (2,) of the forward passes alone."""
        with torch.inference_mode():
            return timed(lambda: [self._encoder.encoder.encode_table(*batch) for batch in self._ready])[0]

    def export(self, decode_threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds (2,) of a whole export without those of loading the encoder, and those."""
        out = self._config.out / "table"
        for path in (out, Path(f"{out}.items")):
            shutil.rmtree(path, ignore_errors=True)
        settings = ExportConfig(
            data=self._config.out / "data", encoder=str(self._path), out=out, decode_threads=decode_threads,
            batch_size=self._config.batch_size,
        )  # fmt: skip
        loading = np.zeros(2)

        def load(*words: Any) -> TrainedEncoder:
            nonlocal loading
            loading, encoder = timed(lambda: TrainedEncoder(*words))
            return encoder

        # timed where it happens: a load beside it may take longer than this one, and all else is short
        with mock.patch.object(representation, "TrainedEncoder", load):
            seconds, manifest = timed(lambda: representation.export(settings, self._context))
        assert manifest.rows == len(self._items)
        return seconds - loading, loading

    def parts(self) -> dict[str, float]:
        """Milliseconds an item of each part of the work, one after the other on one thread."""
        rows, encoder = np.arange(len(self._items)), self._encoder.encoder
        found = {}
        found["read"], data = timed(lambda: self._items.image_bytes(rows))
        found["decode"], images = timed(lambda: [decode_image(one) for one in data])
        found["resize"], _ = timed(lambda: [encoder.vision.transform(image) for image in images])
        titles = self._items.titles(rows)
        found["tokenize"], _ = timed(lambda: encoder.text.tokenize(titles))
        found["forward"] = self.bare()
        vectors = torch.zeros(len(rows), encoder.table_dim)
        out = self._config.out / "written"
        shutil.rmtree(out, ignore_errors=True)

        def write() -> None:
            writer = TableWriter(
                out, table_version="none", dim=encoder.table_dim, dtype="float16", encoder={}
            )
            writer.write_shard(torch.from_numpy(self._items.item_ids), vectors)
            writer.finish()

        found["write"], _ = timed(write)
        return {name: 1000 * float(found[name][0]) / len(rows) for name in PARTS}


def compare(contest: Contest, config: ExportThroughputConfig, threads: int) -> dict[str, float]:
    """Items per second of each, and the median over the rounds of export over bare."""
    torch.set_num_threads(threads)
    contest.bare()
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in ("bare", "export", "in_turns", "load")}
    for turn in range(config.rounds):
        for name in ("bare", "export", "in_turns") if turn % 2 else ("in_turns", "export", "bare"):
            if name == "bare":
                seconds[name].append(contest.bare())
                continue
            spent, loading = contest.export(config.decode_threads if name == "export" else 0)
            seconds[name].append(spent)
            seconds["load"].append(loading)

    passed, of_cores = ({name: np.array(turns)[:, k] for name, turns in seconds.items()} for k in (0, 1))

    return {
        "ratio": float(np.median(passed["bare"] / passed["export"])),
        "in_turns_ratio": float(np.median(passed["bare"] / passed["in_turns"])),
        "cpu_ratio": float(np.median(of_cores["bare"] / of_cores["export"])),
        **{f"{name}_items_per_s": config.items / float(np.median(passed[name]))
           for name in ("bare", "export", "in_turns")},
        "load_seconds": float(np.median(passed["load"])),
    }  # fmt: skip


def measure(config: ExportThroughputConfig, context: DistributedContext) -> dict[str, Any]:
    """All figures of the report."""
    for name in ("data", "encoders", "items"):
        shutil.rmtree(config.out / name, ignore_errors=True)
    items = ItemStore.open(Dataset(write_items(config)), config.out / "items")
    titles = items.titles(np.arange(len(items)))
    encoders: dict[str, dict[str, dict[str, float]]] = {}
    parts = {}
    for vision in config.vision:
        contest = Contest(config, write_encoder(config, vision, titles), items, context)
        torch.set_num_threads(1)
        parts[vision] = contest.parts()
        encoders[vision] = {}
        for threads in dict.fromkeys(config.threads):
            figures = encoders[vision][str(threads)] = compare(contest, config, threads)
            print(f"{vision}, {threads} thread(s): export {figures['export_items_per_s']:.1f} items/s, bare "
                  f"{figures['bare_items_per_s']:.1f}, ratio {figures['ratio']:.3f}; in turns "
                  f"{figures['in_turns_ratio']:.3f}", flush=True)  # fmt: skip
    sizes = [len(data) for data in items.image_bytes(np.arange(len(items)))]
    return {
        "encoders": encoders,
        "ms_per_item": parts,
        "image_kb": statistics.mean(sizes) / 1000,
        "load_average": os.getloadavg()[1],
        "targets": [
            target(f"{vision}, {threads} thread(s): export at {TARGET} of the bare forward pass or more",
                   figures["ratio"], figures["ratio"] >= TARGET)
            for vision, by_threads in encoders.items() for threads, figures in by_threads.items()
        ],
    }  # fmt: skip


def sections(report: dict[str, Any]) -> Sequence[Section]:
    """The tables of the report."""
    return [
        Section(
            "Export beside the bare forward pass",
            text=["Items per second. In turns: the encoder waits while images are decoded, as without "
                  "threads that decode ahead. Loading the encoder is in none of them. The last ratio is of "
                  "seconds of all cores: no export is nearer to the bare forward pass than this where that "
                  "keeps every core busy."],
            columns=["vision tower", "threads of the forward pass", "bare", "export", "export / bare",
                     "in turns / bare", "loading, s", "CPU-seconds, bare / export"],
            rows=[[vision, threads, f"{f['bare_items_per_s']:.1f}", f"{f['export_items_per_s']:.1f}",
                   f"{f['ratio']:.3f}", f"{f['in_turns_ratio']:.3f}", f"{f['load_seconds']:.2f}",
                    f"{f['cpu_ratio']:.3f}"]
                  for vision, by_threads in report["encoders"].items() for threads, f in by_threads.items()],
        ),
        Section(
            "Where the time goes",
            text=["Milliseconds an item of one part after the other, on one thread."],
            columns=["vision tower", *PARTS],
            rows=[[vision, *(f"{figures[name]:.3f}" for name in PARTS)]
                  for vision, figures in report["ms_per_item"].items()],
        ),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.export_throughput`."""
    config = tyro.cli(
        ExportThroughputConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    check_sizes(config, 1, "items", "image_px", "batch_size", "rounds")
    check_sizes(config, 0, "decode_threads")
    config.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("mim_torchrec").setLevel(logging.WARNING)
    with threads_of_torch(torch.get_num_threads()), distributed(0) as context:
        report = measure(config, context)
    report["config"] = dataclasses.asdict(config)
    summary = (
        f"{config.items} items, JPEG images of {config.image_px} x {config.image_px} pixels and "
        f"{report['image_kb']:.0f} kB, text tower {config.text}, batches of {config.batch_size}, "
        f"{config.decode_threads} threads that decode ahead. The machine's load average was "
        f"{report['load_average']:.1f} at the end: where it is above the cores, others worked beside it."
    )
    write_pages(report, "Export", summary, sections(report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
