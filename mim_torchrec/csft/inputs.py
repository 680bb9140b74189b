"""What the encoder reads in training, by index: pixels and tokens, or features of frozen towers.

Images have one numbering: those of the items by item row, then the distinct query images that are no
item's.
"""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.uploads import Upload
from mim_torchrec.encoders.features import (
    compute_features,
    item_features_file,
    query_features_file,
    read_or_compute,
)
from mim_torchrec.encoders.pixels import HasTowers, PixelInputs, Tokens
from mim_torchrec.encoders.titles import distinct
from mim_torchrec.encoders.vision import VisionEncoder
from mim_torchrec.training.distributed import DistributedContext

log = logging.getLogger(__name__)


class Inputs(Protocol):
    """What `ItemEncoder` or its head takes, on the rank's device."""

    ahead: int
    """Batches that a thread should make ahead of training."""

    def images(self, index: np.ndarray) -> Tensor:
        """Pixels or features of images."""

    def texts(self, rows: np.ndarray) -> Tensor | Tokens:
        """Tokens or features of titles, by item row."""

    def send_images(self, index: np.ndarray, upload: Upload) -> Callable[[], Tensor]:
        """As `images`, sent with other tensors; returns what gives them after `upload.send`."""

    def send_texts(self, rows: np.ndarray, upload: Upload) -> Callable[[], Tensor | Tokens]:
        """As `texts`, likewise."""


class SearchContent:
    """Images and titles of items and queries.

    Args:
        items: the items.
        pairs: the pairs, for their query images.
        readable: (num_items,) bool, items whose image can be decoded, by default all; others are blank.

    Attributes:
        query_image_row: (num_pairs,) int64, the image of each pair's query.
        query_row: (num_pairs,) int64, the item row of each pair's query, -1 where it is no item.
        item_row: (num_pairs,) int64, the row of each pair's item.
    """

    def __init__(self, items: ItemStore, pairs: PairDataset, readable: np.ndarray | None = None) -> None:
        self._items, self._pairs = items, pairs
        self.readable = np.ones(len(items), bool) if readable is None else readable
        self.num_items = len(items)
        self.item_row = items.rows_of(pairs.item_ids)
        self.query_row = np.full(len(pairs), -1)
        self.query_row[pairs.query_is_item] = items.rows_of(pairs.query_ids[pairs.query_is_item])
        logged = np.flatnonzero(~pairs.query_is_item)
        _, first, which = np.unique(pairs.query_ids[logged], return_index=True, return_inverse=True)
        self._pair_of = logged[first]
        self.query_image_row = self.query_row.copy()
        self.query_image_row[logged] = self.num_items + which
        self.num_images = self.num_items + len(first)

    def titles(self, rows: np.ndarray) -> list[str]:
        """Titles of items."""
        return self._items.titles(rows)

    def open(self, image: int) -> Image.Image:
        """One image. Raises DataError naming the place of one that is damaged or missing."""
        if image < self.num_items:
            return self._items.images(np.array([image]))[0]
        pair = int(self._pair_of[image - self.num_items])
        return decode_image(self._pairs.query_image(pair), self._pairs.query_location(pair))

    def decode(self, image: int, vision: VisionEncoder) -> Tensor:
        """One image as the tower takes it. Raises DataError as `open` does."""
        if image < self.num_items and not self.readable[image]:
            return torch.zeros(3, vision.image_size, vision.image_size, dtype=torch.uint8)
        return vision.transform(self.open(image))

    def items_digest(self) -> str:
        """Hash of the items' ids, titles and images."""
        return self._items.digest(self.readable)

    def queries_digest(self) -> str:
        """Hash of the query images that are no item's."""
        digest = hashlib.sha256()
        for pair in self._pair_of:
            digest.update(self._pairs.query_ids[pair].tobytes() + self._pairs.query_image(int(pair)))
        return digest.hexdigest()


class FeatureInputs:
    """Features of frozen towers, computed once.

    On a GPU they are copied to its memory where they take at most a quarter of what is free; batches then
    send numbers of rows only.

    Args:
        image: (num_images, image_dim).
        text: (num_items, text_dim).
        device: where batches go.
    """

    ahead = 0

    def __init__(self, image: Tensor, text: Tensor, device: torch.device) -> None:
        self.image, self.text, self._device = image, text, device
        self._held = self.image, self.text
        if device.type == "cuda" and image.nbytes + text.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
            self._held = image.to(device), text.to(device)

    def images(self, index: np.ndarray) -> Tensor:
        """(n, image_dim)"""
        return self._now(self.send_images, index)

    def texts(self, rows: np.ndarray) -> Tensor:
        """(n, text_dim)"""
        return self._now(self.send_texts, rows)

    def send_images(self, index: np.ndarray, upload: Upload) -> Callable[[], Tensor]:
        """As `images`, sent with other tensors; returns what gives them after `upload.send`."""
        return self._send(self._held[0], index, upload)

    def send_texts(self, rows: np.ndarray, upload: Upload) -> Callable[[], Tensor]:
        """As `texts`, likewise."""
        return self._send(self._held[1], rows, upload)

    def _now(self, send: Callable[[np.ndarray, Upload], Callable[[], Tensor]], index: np.ndarray) -> Tensor:
        upload = Upload(self._device)
        found = send(index, upload)
        upload.send()
        return found()

    def _send(self, features: Tensor, index: np.ndarray, upload: Upload) -> Callable[[], Tensor]:
        rows = torch.from_numpy(index)
        if features.device.type != self._device.type:  # too large for the GPU
            return upload.add(features.index_select(0, rows))
        there = upload.add(rows)
        return lambda: features.index_select(0, there())


def frozen_features(
    catalog: SearchContent, towers: HasTowers, cache: Path, batch_size: int, context: DistributedContext
) -> FeatureInputs:
    """Features of all images and titles, each computed by one rank, or read from the cache.

    Args:
        catalog: images and titles.
        towers: on the rank's device, in evaluation mode.
        cache: folder; features are kept by the version of the towers and the content of the catalog.
        batch_size: images or titles at a time.
        context: the process group.
    """
    inputs = PixelInputs(catalog, towers, None, context)
    rows = np.arange(catalog.num_items)

    def images(index: np.ndarray, what: str) -> Tensor:
        return compute_features(lambda i: towers.vision(inputs.images(i)), index, batch_size, what, context)

    def of_items() -> dict[str, Tensor]:
        return {"image": images(rows, "images"), "text": title_features(catalog, towers, batch_size, context)}

    def of_queries() -> dict[str, Tensor]:
        return {"image": images(np.arange(catalog.num_items, catalog.num_images), "queries")}

    items = read_or_compute(
        lambda: item_features_file(cache, towers, catalog.items_digest()), of_items, context
    )
    image = items["image"]
    if catalog.num_images > catalog.num_items:
        queries = read_or_compute(
            lambda: query_features_file(cache, towers, catalog.queries_digest()), of_queries, context
        )
        image = torch.cat([image, queries["image"]])
    return FeatureInputs(image, items["text"], context.device)


def title_features(
    catalog: SearchContent, towers: HasTowers, batch_size: int, context: DistributedContext
) -> Tensor:
    """Features of all titles (num_items, text_dim), each distinct title computed by one rank."""
    titles, places = distinct(catalog.titles(np.arange(catalog.num_items)))
    # of every rank's part the short ones first, so that parts take as long
    order = np.concatenate([np.arange(k, len(titles), context.world_size) for k in range(context.world_size)])

    def encode(index: np.ndarray) -> Tensor:
        tokens = towers.text.tokenize([titles[k] for k in index])
        return towers.text({name: value.to(context.device) for name, value in tokens.items()})

    computed = compute_features(encode, order, batch_size, "titles", context)
    found = torch.empty_like(computed)
    found[torch.from_numpy(order)] = computed
    return found[torch.from_numpy(places)]


def leave_out_unreadable(items: ItemStore, pairs: PairDataset) -> np.ndarray:
    """Leave out pairs whose query image or item image cannot be decoded, and such items as hard negatives.

    Every image is decoded once for this.

    Returns:
        (num_items,) bool, the items whose image can be decoded.

    Raises:
        DataError: nothing is left.
    """
    catalog = SearchContent(items, pairs)

    def is_readable(image: int) -> bool:
        try:
            catalog.open(image)
        except DataError as error:
            log.warning("left out: %s", error)
            return False
        return True

    with ThreadPoolExecutor() as pool:
        readable = np.fromiter(pool.map(is_readable, range(catalog.num_images)), bool)
    of_items = readable[: catalog.num_items]
    if not readable.all():
        negatives_are_readable = of_items[items.rows_of(pairs.logged_negatives())]
        keep = readable[catalog.query_image_row] & of_items[catalog.item_row] & negatives_are_readable
        log.warning("%d items and %d pairs are left out for images that cannot be decoded",
                    int((~of_items).sum()), int((~keep).sum()))  # fmt: skip
        pairs.skipped += int((~keep).sum())
        pairs.select(keep, items.item_ids[of_items])
    return of_items


def split_by_time(times: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indexes of the pairs to train on and of those to hold out, the last by time.

    >>> split_by_time(np.array([30, 10, 20, 40]), 0.25)
    (array([0, 1, 2]), array([3]))
    """
    order = np.argsort(times, kind="stable")
    cut = len(times) - round(len(times) * share)
    return np.sort(order[:cut]), np.sort(order[cut:])
