"""Held-out image searches: where the bought item stands among all items, and what is found, as an image.

h_q^img of a query is compared with the h^MM of all items (§3.3 Q3), the vectors that the table will hold.
"""

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mim_torchrec.csft.inputs import Inputs, SearchContent
from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.embeddings.files import atomic_file, write_json
from mim_torchrec.encoders.item_encoder import ItemEncoder, ItemHead
from mim_torchrec.encoders.pixels import rows_of_rank
from mim_torchrec.training import retrieval
from mim_torchrec.training.distributed import DistributedContext

log = logging.getLogger(__name__)

TOP = 10
THUMBNAIL, MARGIN = 72, 6
BOUGHT_COLOR, QUERY_COLOR, PAPER = (22, 163, 74), (148, 163, 184), (255, 255, 255)


@torch.no_grad()
def encode(
    encoder: ItemEncoder | ItemHead,
    inputs: Inputs,
    held_out: np.ndarray,
    catalog: SearchContent,
    batch_size: int,
    context: DistributedContext,
) -> tuple[Tensor, Tensor]:
    """Vectors of queries and items, each computed by one rank and given to all.

    Args:
        encoder: the whole encoder, or its head where the inputs are features; in evaluation mode.
        inputs: what it takes.
        held_out: (num_held_out,) indexes of pairs.
        catalog: images of items and queries.
        batch_size: images or titles at a time.
        context: the process group.

    Returns:
        h_q^img (num_held_out, dim) and h^MM (num_items, dim), float32 on the CPU.
    """

    def chunks(index: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """As many on every rank, as divided towers need; an idle rank encodes something and keeps 0 of it."""
        mine = index[rows_of_rank(len(index), context)]
        starts = range(0, -(-len(index) // context.world_size), batch_size)
        parts = [mine[start : start + batch_size] for start in starts]
        return [(part, len(part)) if len(part) else (index[:1], 0) for part in parts]

    queries = [
        encoder.encode_query(inputs.images(catalog.query_image_row[part])).float().cpu()[:count]
        for part, count in chunks(held_out)
    ]
    items = [
        encoder.encode_items(inputs.images(part), cast(Any, inputs.texts(part))).mm.float().cpu()[:count]
        for part, count in chunks(np.arange(catalog.num_items))
    ]
    query, mm = (
        torch.cat([part for share in context.all_gather_objects(parts) for part in share])
        for parts in (queries, items)
    )
    return query, mm


def find(
    query: Tensor, items_mm: Tensor, held_out: np.ndarray, catalog: SearchContent, device: torch.device
) -> retrieval.Found:
    """Search all items that have a readable image, on a device; a query that is an item is left out."""
    bought, own = (torch.from_numpy(rows[held_out]) for rows in (catalog.item_row, catalog.query_row))
    given = (query, items_mm, bought, own, torch.from_numpy(catalog.readable))
    return retrieval.search(*(tensor.to(device) for tensor in given), TOP)


def evaluate(
    found: retrieval.Found, held_out: np.ndarray, catalog: SearchContent, items: ItemStore
) -> dict[str, Any]:
    """Rank of the bought item of held-out pairs, in all, by the age of the bought item and by its category.

    Args:
        found: of the pairs.
        held_out: (num_held_out,) indexes of the pairs.
        catalog: images of items and queries.
        items: the items.

    Returns:
        `retrieval.summarize` with `items`, `by_age` and `by_category` (None where items have no such column).
    """
    bought = catalog.item_row[held_out]
    report: dict[str, Any] = {**retrieval.summarize(found.rank, len(items)), "items": len(items)}
    try:
        names = [f"S{k + 1}" for k in range(NUM_AGE_SETS)]
        report["by_age"] = retrieval.by_group(found.rank, age_sets(items)[bought], names, len(items))
    except DataError as error:
        log.warning("no retrieval by age: %s", error)
        report["by_age"] = None
    try:
        categories, of_pair = np.unique(items.categories(bought), return_inverse=True)
        report["by_category"] = retrieval.by_group(found.rank, of_pair, categories.tolist(), len(items))
    except DataError as error:
        log.warning("no retrieval by category: %s", error)
        report["by_category"] = None
    return report


def draw(held_out: np.ndarray, found: retrieval.Found, catalog: SearchContent, count: int) -> Image.Image:
    """Queries spread evenly over the held-out pairs, one a line: the query, and the ten items found for it.

    The bought item has a green frame; where it is not among the ten it stands at the end, after a gap.
    """
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(count, len(held_out))).astype(int))
    step = THUMBNAIL + 2 * MARGIN
    page = Image.new("RGB", ((TOP + 2) * step + 4 * MARGIN, len(chosen) * step), PAPER)
    pen = ImageDraw.Draw(page)

    def paste(image: int, x: int, y: int, color: tuple[int, int, int] | None) -> None:
        if color is not None:
            pen.rectangle((x, y, x + step - 1, y + step - 1), fill=color)
        size = (THUMBNAIL, THUMBNAIL)
        page.paste(catalog.open(image).resize(size, Image.Resampling.BICUBIC), (x + MARGIN, y + MARGIN))

    for line, k in enumerate(chosen):
        pair, y = held_out[k], line * step
        bought, top = int(catalog.item_row[pair]), found.top[k].tolist()
        paste(int(catalog.query_image_row[pair]), 0, y, QUERY_COLOR)
        for column, row in enumerate(top):
            paste(row, (column + 1) * step + 2 * MARGIN, y, BOUGHT_COLOR if row == bought else None)
        if bought not in top:
            paste(bought, (TOP + 1) * step + 4 * MARGIN, y, BOUGHT_COLOR)
    return page


def write(report: dict[str, Any], image: Image.Image, out: Path) -> None:
    """Write retrieval.json and retrieval.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "retrieval.json", report)
    with atomic_file(out / "retrieval.png") as file:
        image.save(file, format="png", optimize=True)
