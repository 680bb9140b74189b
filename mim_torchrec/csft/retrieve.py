"""Image search with an encoder: where the bought item stands among all items, and what is found, in pictures.

    python -m mim_torchrec.csft.retrieve --data DIR --encoder DIR --out DIR

Queries are the pairs that C-SFT holds out, the last by time. h_q^img of a query is compared with the h^MM of
items (§3.3 Q3); for plain towers, which have no common space of images and items, with the items' images.
Writes retrieval.json and retrieval.png. C-SFT runs the same at its end.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor

from mim_torchrec.csft.inputs import (
    Catalog,
    FeatureInputs,
    frozen_features,
    leave_out_unreadable,
    split_by_time,
)
from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.schema import Dataset
from mim_torchrec.encoders.checkpoint import load_encoder
from mim_torchrec.training import retrieval
from mim_torchrec.training.checkpoint import write_json
from mim_torchrec.training.distributed import Ranks, distributed

log = logging.getLogger("mim_torchrec.csft.retrieve")  # also where this file is __main__

TOP = 10
THUMBNAIL, MARGIN = 72, 6
BOUGHT_COLOR, QUERY_COLOR, PAPER = (22, 163, 74), (148, 163, 184), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """Find the bought item among all items by the query image."""

    data: Path
    """Dataset directory."""
    encoder: Path
    """Encoder directory written by csft."""
    out: Path
    """Directory of the results; made if missing."""
    signal: Literal["purchase", "click", "all"] = "purchase"
    """Which pairs are searched for."""
    held_out_share: float = 0.05
    """Share of the pairs, the last by time, whose queries are used; 1 takes all."""
    pictures: int = 8
    """Queries in the picture."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """As in csft."""
    encode_batch_size: int = 64
    """Images or titles that a tower takes at a time."""
    feature_cache: Path | None = None
    """Folder where features of towers are kept for other runs; by default one inside `out`."""
    item_cache: Path | None = None
    """Folder of the item index; by default one inside `out`."""


def evaluate(
    query: Tensor, items_mm: Tensor, held_out: np.ndarray, catalog: Catalog, items: ItemStore
) -> tuple[dict[str, Any], retrieval.Found]:
    """Place of the bought item of held-out pairs, in all, by the age of the bought item and by its category.

    Args:
        query: (num_held_out, dim) vectors of the pairs' query images.
        items_mm: (num_items, dim) by item row.
        held_out: (num_held_out,) indexes of the pairs.
        catalog: pictures of items and queries.
        items: the items.

    Returns:
        `retrieval.summarize` with `by_age` and `by_category` (None where items have no such column); and what
        was found.
    """
    bought = catalog.item_row[held_out]
    found = retrieval.search(
        query, items_mm, torch.from_numpy(bought), torch.from_numpy(catalog.query_row[held_out]),
        torch.from_numpy(catalog.readable), TOP,
    )  # fmt: skip
    report: dict[str, Any] = {**retrieval.summarize(found.place, len(items)), "items": len(items)}
    try:
        names = [f"S{k + 1}" for k in range(NUM_AGE_SETS)]
        report["by_age"] = retrieval.by_group(found.place, age_sets(items)[bought], names, len(items))
    except DataError as error:
        log.warning("no retrieval by age: %s", error)
        report["by_age"] = None
    try:
        categories, of_pair = np.unique(items.categories(bought), return_inverse=True)
        report["by_category"] = retrieval.by_group(found.place, of_pair, categories.tolist(), len(items))
    except DataError as error:
        log.warning("no retrieval by category: %s", error)
        report["by_category"] = None
    return report, found


def draw(held_out: np.ndarray, found: retrieval.Found, catalog: Catalog, count: int) -> Image.Image:
    """Queries spread evenly over the held-out pairs, one a line: the query, and the ten items found for it.

    The bought item has a green frame; where it is not among the ten it stands at the end, after a gap.
    """
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(count, len(held_out))).astype(int))
    step = THUMBNAIL + 2 * MARGIN
    page = Image.new("RGB", ((TOP + 2) * step + 4 * MARGIN, len(chosen) * step), PAPER)
    pen = ImageDraw.Draw(page)

    def place(picture: int, x: int, y: int, color: tuple[int, int, int] | None) -> None:
        if color is not None:
            pen.rectangle((x, y, x + step - 1, y + step - 1), fill=color)
        size = (THUMBNAIL, THUMBNAIL)
        page.paste(catalog.open(picture).resize(size, Image.Resampling.BICUBIC), (x + MARGIN, y + MARGIN))

    for line, k in enumerate(chosen):
        pair, y = held_out[k], line * step
        bought, top = int(catalog.item_row[pair]), found.top[k].tolist()
        place(int(catalog.query_picture[pair]), 0, y, QUERY_COLOR)
        for column, row in enumerate(top):
            place(row, (column + 1) * step + 2 * MARGIN, y, BOUGHT_COLOR if row == bought else None)
        if bought not in top:
            place(bought, (TOP + 1) * step + 4 * MARGIN, y, BOUGHT_COLOR)
    return page


def write(report: dict[str, Any], picture: Image.Image, out: Path) -> None:
    """Write retrieval.json and retrieval.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "retrieval.json", report)
    picture.save(out / "retrieval.png", optimize=True)


def encode_features(
    encoder: Any, features: FeatureInputs, held_out: np.ndarray, catalog: Catalog, batch_size: int
) -> tuple[Tensor, Tensor]:
    """h_q^img of held-out pairs and h^MM of all items, from the features of the towers."""
    with torch.no_grad():
        query = encoder.head.encode_query(features.pictures(catalog.query_picture[held_out]))
        rows = np.arange(catalog.num_items)
        parts = [
            encoder.head.encode_items(features.pictures(part), features.texts(part)).mm
            for part in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
        ]
    return query.cpu(), torch.cat(parts).cpu()


def retrieve(config: RetrieveConfig, ranks: Ranks) -> dict[str, Any]:
    """Run the search on an initialized process group; returns what retrieval.json holds.

    Raises:
        ValueError: no pairs are asked for.
        DataError: data is damaged.
        CheckpointError: the encoder is.
    """
    if not 0 < config.held_out_share <= 1:
        raise ValueError(f"--held-out-share is {config.held_out_share}; it must be in (0, 1]")
    dataset = Dataset(config.data)
    items = ItemStore.open(dataset, config.item_cache or config.out / "items")
    signal = None if config.signal == "all" else config.signal
    pairs = PairDataset(dataset.pairs(), items, signal=signal, on_bad_row=config.on_bad_row)
    readable = leave_out_unreadable(items, pairs) if config.on_bad_row == "skip" else None
    catalog = Catalog(items, pairs, readable)
    _, held_out = split_by_time(pairs.times(), config.held_out_share)
    if not len(held_out):
        raise ValueError(f"--held-out-share {config.held_out_share} of {len(pairs)} pairs is none")
    encoder = load_encoder(config.encoder, ranks.device)
    features = frozen_features(
        catalog, encoder, config.feature_cache or config.out / "features", config.encode_batch_size, ranks
    )
    query, items_mm = encode_features(encoder, features, held_out, catalog, 1024)
    report, found = evaluate(query, items_mm, held_out, catalog, items)
    report["skipped_pairs"] = pairs.skipped
    if ranks.is_main:
        write(report, draw(held_out, found, catalog, config.pictures), config.out)
        log.info("recall@10 %.4f (chance %.4f), mean rank %.1f of %d, %d queries", report["recall_at_10"],
                 report["chance_at_10"], report["mean_rank"], len(items), report["n"])  # fmt: skip
    ranks.barrier()
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim retrieve`."""
    config = tyro.cli(RetrieveConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    with distributed(seed=0) as ranks:  # nothing here is drawn
        logging.getLogger("mim_torchrec").setLevel(logging.INFO if ranks.is_main else logging.WARNING)
        retrieve(config, ranks)


if __name__ == "__main__":
    main()
