"""Fail every file-system call of every writer: what is left is the old version or the new one.

    python -m mim_torchrec.benchmarks.chaos.disk_faults --out runs/faults

Each call fails in three ways: the disk is full after half of a write, the disk is broken, the process is
killed. `report.json` says how many writers and calls there were, and how many faults lost something or mixed
old and new; the program ends with status 1 unless both are 0.
"""

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.chaos.run_writers import ONE, input_writers, pipeline_writers, run_writers, tree
from mim_torchrec.benchmarks.harness.fault_injection import ABSENT, KINDS, Outcome, Writer, try_all
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import ITEMS, Dataset
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.embeddings import files
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.embeddings.table.grow import grow
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.embeddings.tensor_files import write_tensors
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.encoders.checkpoint import load_encoder, load_towers, save_encoder, save_towers
from mim_torchrec.encoders.features import read_or_compute
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.rim.dead_letter import DeadLetterFile
from mim_torchrec.rim.sources import Arrival
from mim_torchrec.serving.bundle import Bundle, save_bundle
from mim_torchrec.serving.releases import Release, Releases

log = logging.getLogger("mim_torchrec.benchmarks.chaos.disk_faults")


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Make every file-system call of every writer fail."""

    out: Path
    """Directory of report.json; made if missing."""


def file_writers() -> Iterator[Writer]:
    """The helpers that all others use, on their own."""

    def directory(value: int) -> Callable[[Path], None]:
        def write(root: Path) -> None:
            with files.atomic_directory(root / "d") as folder:
                (folder / "sub").mkdir()
                for name in ("a", "sub/b"):
                    (folder / name).write_text(f"{name} {value}" * 3000)

        return write

    yield Writer("file", lambda r: files.write_json(r / "f", {"a": 1}),
                 lambda r: files.write_json(r / "f", {"a": 2}),
                 lambda r: json.loads((r / "f").read_text()))  # fmt: skip
    yield Writer("tensors", lambda r: write_tensors(r / "f", {"a": torch.zeros(3)}),
                 lambda r: write_tensors(r / "f", {"a": torch.ones(50_000)}),
                 lambda r: tree(r / "f"))  # fmt: skip
    yield Writer("directory", directory(1), directory(2), lambda r: tree(r / "d"))


def table_writers() -> Iterator[Writer]:
    """Tables and window logs."""

    def write(path: Path, seed: int, shards: int = 2) -> None:
        torch.manual_seed(seed)
        writer = TableWriter(path, table_version="v", dim=4, encoder={})
        for number in range(shards):
            writer.write_shard(torch.arange(5) + 10 * number, torch.randn(5, 4))
        writer.finish()

    def source(root: Path) -> None:
        write(root / "source", 0)

    def read(root: Path) -> object:
        return Table.open(root / "new").manifest if (root / "new").exists() else ABSENT

    def append(root: Path, *names: str) -> None:
        window_log = WindowLog(root / "log", "v", start=0)
        for name in names:
            ids = torch.tensor([int(hashlib.sha256(name.encode()).hexdigest()[:4], 16)])
            window_log.append(name, ids, torch.ones(1, 4))

    def windows(root: Path) -> object:
        window_log = WindowLog(root / "log", "v")
        seen = [window.window_id for window in window_log.after(window_log.first_seq() - 1)]
        return window_log.names(), seen

    def with_log(root: Path) -> None:
        source(root)
        append(root, "a", "b")

    def vectors(root: Path) -> None:
        vectors = [[float(k), 1.0] for k in range(6)]
        table = pa.table({"item_id": pa.array(range(6), pa.int64()), "vector": vectors})
        pq.write_table(table, root / "vectors.parquet")

    yield Writer("table", lambda r: None, lambda r: write(r / "new", 1), read)
    yield Writer("table convert", source, lambda r: convert(r / "source", r / "new", "int8"), read)
    yield Writer("table grow", source, lambda r: grow(r / "source", r / "new", 3), read)
    yield Writer("table grow --link", source, lambda r: grow(r / "source", r / "new", 3, link=True), read)
    yield Writer("table import", vectors, lambda r: import_vectors([r / "vectors.parquet"], r / "new"), read)
    yield Writer("window log", lambda r: None, lambda r: append(r),
                 lambda r: windows(r) if (r / "log" / "log.json").exists() else ABSENT)  # fmt: skip
    yield Writer("window log append", lambda r: append(r, "a"), lambda r: append(r, "b"), windows)
    yield Writer("window log forget", lambda r: append(r, "a", "b"),
                 lambda r: WindowLog(r / "log", "v").forget(1), windows)  # fmt: skip
    yield Writer("compact", with_log, lambda r: compact(r / "source", r / "log", r / "new"), read)


def data_writers() -> Iterator[Writer]:
    """Data sets and what is made of them."""

    def items(count: int) -> pa.Table:
        rows = [{"item_id": k, "title": f"{k}", "image": b"i"} for k in range(count)]
        return pa.Table.from_pylist(rows, schema=ITEMS)

    def dataset(root: Path, count: int = 3) -> None:
        with DatasetWriter(root / "data", name="d", source={}) as writer:
            writer.write("items", items(count))

    def changed(root: Path) -> None:
        dataset(root)
        ItemStore.open(Dataset(root / "data"), root / "cache")
        files.discard_directory(root / "data")
        dataset(root, 5)

    def vocabulary(count: int) -> Callable[[Path], None]:
        return lambda root: Vocabulary.build(np.arange(count)).save(root / "v.npz")

    def features(value: int) -> Callable[[Path], object]:
        found = {"image": torch.full((100,), float(value))}
        return lambda root: read_or_compute(lambda: root / f"{value}" / "f", lambda: found, ONE)

    yield Writer("data set", lambda r: None, dataset, lambda r: tree(r / "data"))
    yield Writer("item index", changed, lambda r: ItemStore.open(Dataset(r / "data"), r / "cache"),
                 lambda r: len(pa.ipc.open_file(r / "cache" / "items.arrow").read_all()))  # fmt: skip
    yield Writer("vocabulary", vocabulary(3), vocabulary(9),
                 lambda r: Vocabulary.load(r / "v.npz").ids.tolist())  # fmt: skip
    yield Writer("feature cache", features(1), features(2),
                 lambda r: (tree(r / "1" / "f"), tree(r / "2" / "f")))  # fmt: skip


def encoder_writers() -> Iterator[Writer]:
    """Encoders and towers."""
    config = ItemEncoderConfig(
        vision=VisionEncoderConfig(name="test_convnext", weights="random", image_size=32),
        text=TextEncoderConfig(name="bert-tiny", weights="random", max_length=8),
        head=HeadConfig(dim=4, fusion_dim=2, hidden_dim=4),
    )
    torch.manual_seed(0)
    one, two = (ItemEncoder.build(config, train_tokenizer(["a b", "c d"])) for _ in range(2))

    def encoder(which: ItemEncoder) -> Callable[[Path], str]:
        return lambda root: save_encoder(which, root / "encoder")

    def towers(which: ItemEncoder) -> Callable[[Path], str]:
        return lambda root: save_towers(which.vision, which.text, root / "towers")

    loaded: list[object] = []

    def read(path: Path, load: Callable[[Path], object]) -> object:
        found = tree(path)
        if found not in loaded:
            load(path)  # compares the content with its version
            loaded.append(found)
        return found

    def read_encoder(root: Path) -> object:
        return read(root / "encoder", load_encoder)

    def read_towers(root: Path) -> object:
        return read(root / "towers", load_towers)

    yield Writer("encoder", encoder(one), encoder(two), read_encoder)
    yield Writer("towers", towers(one), towers(two), read_towers)


def serving_writers() -> Iterator[Writer]:
    """Bundles, releases and the dead-letter file."""
    config = CTRConfig(data=Path("data"), out=Path("out"), mim="off")

    def bundle(value: int, name: str = "bundle") -> Callable[[Path], object]:
        dense = {"w": torch.full((3,), float(value))}
        tables = {"item_id": (torch.arange(4), lambda: torch.full((5, 2), float(value)))}
        return lambda root: save_bundle(root / name, config, dense, tables, 0)

    def read_bundle(root: Path) -> object:
        found = Bundle.open(root / "bundle")
        Table.open(root / "bundle" / "tables" / "item_id", found.version_of("item_id"))
        return tree(root / "bundle")

    def staged(root: Path) -> None:
        bundle(1)(root)
        releases = Releases(root / "releases")
        for name in ("a", "b"):
            releases.stage(name, Release(bundle=str(root / "bundle")))
        releases.promote("a")

    def dead_letter(name: str) -> Callable[[Path], object]:
        arrival = Arrival(unit="", position="", item_id=1, place=name)
        return lambda root: DeadLetterFile(root / "dead").add([(arrival, "bad")])

    yield Writer("bundle", bundle(1), bundle(2), read_bundle)
    yield Writer("release", staged, lambda r: Releases(r / "releases").promote("b"),
                 lambda r: Releases(r / "releases").current())  # fmt: skip
    yield Writer("dead-letter file", dead_letter("a"), dead_letter("b"),
                 lambda r: len(DeadLetterFile(r / "dead")))  # fmt: skip


def writers() -> Iterator[Writer]:
    """All writers of the package."""
    groups = (file_writers, table_writers, data_writers, encoder_writers, serving_writers, run_writers,
              input_writers, pipeline_writers)  # fmt: skip
    for group in groups:
        yield from group()


def try_writers(found: list[Writer], kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Outcome]:
    """What came of the faults of each writer."""
    outcomes = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        with Progress(len(found), "faults", "writer") as progress:
            for writer in found:
                with tempfile.TemporaryDirectory() as folder:
                    outcomes[writer.name] = try_all(writer, Path(folder, "w"), kinds)
                progress.update()
    return outcomes


def report_of(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What report.json holds."""
    sums = {name: sum(getattr(outcome, name) for outcome in outcomes.values())
            for name in ("calls", "injected", "lost", "mixed")}  # fmt: skip
    return {"writers": len(outcomes), **sums, "kinds": list(KINDS),
            "by_writer": {name: asdict(outcome) for name, outcome in outcomes.items()}}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m mim_torchrec.benchmarks.chaos.disk_faults``."""
    config = tyro.cli(FaultsConfig, args=argv, description=__doc__)
    log.setLevel(logging.INFO)
    report = report_of(try_writers(list(writers())))
    config.out.mkdir(parents=True, exist_ok=True)
    files.write_json(config.out / "report.json", report)
    for outcome in report["by_writer"].values():
        for problem in outcome["problems"]:
            log.error("%s", problem)
    log.info("%d writers, %d calls, %d faults: lost %d, mixed %d", report["writers"], report["calls"],
             report["injected"], report["lost"], report["mixed"])  # fmt: skip
    if report["lost"] or report["mixed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    program.run(main)
