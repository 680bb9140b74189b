"""Export (§3.5): encode every item once and write the multi-modal table that the CTR stage looks up.

    python -m mim_torchrec.representation.export --data DIR --encoder DIR --out TABLE
    python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.representation.export ...

Items are divided over the ranks in ascending order of their ids. Threads read, decode and resize the images
of the next batches while the encoder works on this one, and a GPU encodes a batch while the vectors of the
one before are written. The table's version is the encoder's, so a
reader can state which encoder it expects. Not here: encoding of items that arrive later.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import tyro
from PIL.Image import Image
from torch import Tensor

from mim_torchrec import program
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.uploads import Upload, download
from mim_torchrec.domains import check_domains
from mim_torchrec.embeddings.collective import rank_0_first
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.table.format import Manifest, TableWriter
from mim_torchrec.embeddings.tensor_files import read_tensors
from mim_torchrec.encoders.checkpoint import encoder_version, load_encoder
from mim_torchrec.encoders.features import item_features_file
from mim_torchrec.encoders.pixels import HasTowers, rows_of_rank
from mim_torchrec.encoders.selection import read_selection
from mim_torchrec.encoders.text import TextEncoder
from mim_torchrec.encoders.titles import encode_titles
from mim_torchrec.encoders.tower import compute_in
from mim_torchrec.encoders.vision import VisionEncoder
from mim_torchrec.errors import OptionError, OutputExists
from mim_torchrec.representation.ahead import ahead
from mim_torchrec.representation.config import ExportConfig
from mim_torchrec.representation.plain import PLAIN, PlainTowers, fit_projection
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.lease import Lease, leased_for_all_ranks
from mim_torchrec.training.precision import matrix_products_in

log = logging.getLogger("mim_torchrec.representation.export")  # also where it runs as __main__

TITLES_TOGETHER = 32  # batches whose titles are encoded together, each distinct one once
AHEAD = 2  # batches whose images wait or are being decoded while one is encoded


class Encode(Protocol):
    """Maps images and titles of items to vectors (num_items, dim)."""

    device: torch.device
    vision: VisionEncoder
    """Whose ``transform`` makes pixels of a image."""
    text: TextEncoder

    def of_features(self, image: Tensor, text: Tensor) -> Tensor:
        """Vectors from the features (num_items, dim) of the towers."""


class TrainedEncoder:
    """h^MM of an encoder that C-SFT wrote.

    Args:
        path: the encoder's directory or URL.
        device: where it runs.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        path = str(fetched(path))  # once, so that the version is that of the weights
        self.encoder = load_encoder(path, device)
        self.vision, self.text = self.encoder.vision, self.encoder.text
        self.selection = read_selection(Path(path))
        self.device, self.dim, self.version = device, self.encoder.table_dim, encoder_version(path)
        self.description: dict[str, Any] = {"kind": "csft", **asdict(self.encoder.config)}

    def __call__(self, images: list[Image], titles: list[str]) -> Tensor:
        """Vectors of images and titles."""
        return self.of_pixels(torch.stack([self.vision.transform(image) for image in images]), titles)

    def of_pixels(self, pixels: Tensor, titles: list[str]) -> Tensor:
        tokens = self.encoder.text.tokenize(titles)
        tokens = {name: value.to(self.device) for name, value in tokens.items()}
        return self.encoder.encode_table(pixels.to(self.device), tokens)

    def of_features(self, image: Tensor, text: Tensor) -> Tensor:
        return self.encoder.head.encode_table(image, text)


@dataclass
class Encoded:
    """Vectors of items, in the order of their ids."""

    ids: Tensor
    """(num_items,) int64."""
    vectors: Tensor
    """(num_items, dim) float32."""


def export(config: ExportConfig, context: DistributedContext) -> Manifest:
    """Run the stage on an initialized process group.

    Returns:
        The manifest of the finished table, on every rank.

    Raises:
        DataError: an item cannot be encoded and ``on_bad_row`` is "fail"; it names the item.
        OutputExists: ``out`` exists.
        LeaseError: another process writes it, or has taken this one's place because it gave no sign of life
            for too long.
    """
    check_domains(config)
    if config.feature_cache is not None and config.precision != "fp32":
        raise OptionError(
            f"--precision {config.precision}: features that are kept were computed in fp32; leave one of "
            "--precision and --feature-cache out"
        )
    with matrix_products_in(config.precision, context.device), written(config.out, context.rank) as out:
        if out.exists():
            raise OutputExists(f"{config.out} exists; choose another directory or remove it")
        with leased_for_all_ranks(Path(f"{out}.lease.json"), context) as lease:
            return _export(config, out, lease, context)


def _export(config: ExportConfig, out: Path, lease: Lease, context: DistributedContext) -> Manifest:
    items = rank_0_first(
        lambda: ItemStore.open(Dataset(config.data), config.item_cache or Path(f"{out}.items"))
    )
    rows = rows_of_rank(len(items), context)
    skipped: list[int] = []
    started = time.perf_counter()
    encoder = None
    if config.encoder.startswith(PLAIN):
        towers: PlainTowers | None = PlainTowers.open(config.encoder, config.image_size, context.device)
    else:
        encoder = TrainedEncoder(config.encoder, context.device)
        towers = _in_place_of(encoder, config)
    for one in (encoder, towers):
        if one is not None:
            compute_in(config.precision, one.vision, one.text)
    if towers is not None:
        known = _known_features(config.feature_cache, towers, items, context)
        features = _joined(_encode(items, rows, towers, known, config, context, skipped), towers.feature_dim)
        projection = fit_projection(features.vectors, config.dim, config.pca_items, context)
        version, dim = projection.version(towers.version), config.dim
        description = {**towers.description, "pca": {"items": projection.items}}
        batches: Iterable[Encoded] = [Encoded(features.ids, projection(features.vectors))]
    else:
        assert encoder is not None
        version, dim, description = encoder.version, encoder.dim, encoder.description
        known = _known_features(config.feature_cache, encoder.encoder, items, context)
        batches = _encode(items, rows, encoder, known, config, context, skipped)
    made = _write(batches, version, dim, description, config, out, lease, context, skipped)
    seconds = time.perf_counter() - started
    log.info(
        "%s: %d items x %d %s in %.1f s (%.1f items/s on %d ranks), %d items left out, table_version %s",
        config.out, made.rows, dim, config.dtype, seconds, made.rows / seconds, context.world_size,
        made.encoder["items_left_out"], version,
    )  # fmt: skip
    return made


def _in_place_of(encoder: TrainedEncoder, config: ExportConfig) -> PlainTowers | None:
    """The plain towers where they are to be encoded with in place of an encoder that gained nothing.

    Raises:
        OptionError: its towers were trained, so they are not the plain ones.
    """
    selection = encoder.selection
    if selection is None or selection.gained:
        return None
    if config.if_no_gain == "keep":
        log.warning("C-SFT gained no more than noise (%s); see --if-no-gain", selection)
        return None
    if selection.towers_trained:
        raise OptionError(
            f"--if-no-gain plain: the towers of {config.encoder} were trained; name the plain ones, "
            f"--encoder {PLAIN}<vision>+<text> or {PLAIN}<directory of towers>"
        )
    log.warning("C-SFT gained no more than noise (%s): its plain towers are taken", selection)
    return PlainTowers(encoder.vision, encoder.text, encoder.device)


def _known_features(
    cache: Path | None, towers: HasTowers, items: ItemStore, context: DistributedContext
) -> dict[str, Tensor] | None:
    if cache is None:
        return None
    path = context.broadcast_object(
        item_features_file(cache, towers, items.digest()) if context.is_main else None
    )
    if not all(context.all_gather_objects(path.is_file())):
        log.warning("%s holds no features of these items by these towers: they are encoded", cache)
        return None
    log.info("features of the towers read from %s", path)
    return read_tensors(path)


def _encode(
    items: ItemStore,
    rows: np.ndarray,
    encode: Encode,
    known: dict[str, Tensor] | None,
    config: ExportConfig,
    context: DistributedContext,
    skipped: list[int],
) -> Iterator[Encoded]:
    if known is not None:
        for start in range(0, len(rows), config.batch_size):
            part = torch.from_numpy(rows[start : start + config.batch_size])
            image, text = (known[name][part].to(encode.device) for name in ("image", "text"))
            with torch.inference_mode():
                vectors = encode.of_features(image, text)
            yield Encoded(torch.from_numpy(items.item_ids[part.numpy()]), vectors.float().cpu())
        return
    images = ahead(
        lambda row: _pixels(items, row, encode.vision), rows, threads=config.decode_threads,
        depth=AHEAD * config.batch_size,
    )  # fmt: skip
    window = TITLES_TOGETHER * config.batch_size
    before: Callable[[], Encoded] | None = None  # a batch that a GPU may still compute
    with Progress(len(rows), "encode", "item", show=context.is_main) as progress:
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            if start % window == 0:
                titles = items.titles(rows[start : start + window])
                with torch.inference_mode():
                    texts = encode_titles(encode.text, titles, config.batch_size, encode.device)
            kept, pixels = _readable(items, batch, islice(images, len(batch)), config, skipped)
            progress.update(len(batch))
            if len(kept):
                upload = Upload(encode.device)
                own = upload.add(torch.from_numpy(np.flatnonzero(np.isin(batch, kept)) + start % window))
                stacked = upload.add(torch.stack(pixels))
                upload.send()
                with torch.inference_mode():
                    vectors = encode.of_features(encode.vision(stacked()), texts[own()])
                    arriving = download(vectors.float())
                if before is not None:
                    yield before()
                before = _encoded(items.item_ids[kept], arriving)
    if before is not None:
        yield before()


def _encoded(ids: np.ndarray, arriving: Callable[[], Tensor]) -> Callable[[], Encoded]:
    return lambda: Encoded(torch.from_numpy(ids), arriving())


def _pixels(items: ItemStore, row: int, vision: VisionEncoder) -> Tensor | DataError:
    try:
        return vision.transform(items.images(np.array([row]))[0])
    except DataError as error:
        return error


def _readable(
    items: ItemStore,
    rows: np.ndarray,
    found: Iterable[Tensor | DataError],
    config: ExportConfig,
    skipped: list[int],
) -> tuple[np.ndarray, list[Tensor]]:
    kept, pixels = [], []
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, Tensor):
            kept.append(row)
            pixels.append(one)
            continue
        item = int(items.item_ids[row])
        if config.on_bad_row == "fail":
            raise DataError(f"item {item}: {one}; --on-bad-row skip leaves such items out") from one
        log.warning("item %d is left out: %s", item, one)
        skipped.append(item)
    return np.asarray(kept, np.int64), pixels


def _joined(batches: Iterable[Encoded], dim: int) -> Encoded:
    every = list(batches)
    return Encoded(
        torch.cat([torch.empty(0, dtype=torch.int64), *(batch.ids for batch in every)]),
        torch.cat([torch.empty(0, dim), *(batch.vectors for batch in every)]),
    )


def _write(
    batches: Iterable[Encoded],
    version: str,
    dim: int,
    description: dict[str, Any],
    config: ExportConfig,
    out: Path,
    lease: Lease,
    context: DistributedContext,
    skipped: list[int],
) -> Manifest:
    if not context.is_main:
        context.barrier()  # rank 0 makes the directory, and clears what a crash has left, before others write
    lease.check()
    table = TableWriter(
        out, table_version=version, dim=dim, dtype=config.dtype, encoder=description, rank=context.rank
    )
    if context.is_main:
        context.barrier()
    waiting: list[Encoded] = []
    for batch in batches:
        waiting.append(batch)
        while sum(part.ids.numel() for part in waiting) >= config.shard_rows:
            whole = _joined(waiting, dim)
            lease.check()
            table.write_shard(whole.ids[: config.shard_rows], whole.vectors[: config.shard_rows])
            waiting = [Encoded(whole.ids[config.shard_rows :], whole.vectors[config.shard_rows :])]
    rest = _joined(waiting, dim)
    if rest.ids.numel():
        lease.check()
        table.write_shard(rest.ids, rest.vectors)
    every = context.all_gather_objects((table.shards, len(skipped)))
    table.encoder = {
        **description,
        "items_left_out": sum(left_out for _, left_out in every),
        "export": {name: str(value) for name, value in asdict(config).items()},
    }
    if context.is_main:
        lease.check()
        table.finish([shard for shards, _ in every for shard in shards])
    context.barrier()
    return Manifest.load(out / "manifest.json")


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim export``."""
    config = tyro.cli(ExportConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)  # before processes wait for each other
    with distributed(seed=0, timeouts=config.timeout) as context:  # nothing here is drawn
        logging.getLogger("mim_torchrec").setLevel(logging.INFO if context.is_main else logging.WARNING)
        export(config, context)


if __name__ == "__main__":
    program.run(main)
