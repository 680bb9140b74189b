"""Query images of training as other cameras might have taken them (`--augment-queries`).

Frozen towers compute features of a fixed number of views of each query once; trained ones see new pixels in
every epoch. Held-out queries, and items, are never changed.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.csft.inputs import Inputs, PixelInputs, SearchContent
from mim_torchrec.data.photos import augmented
from mim_torchrec.data.uploads import Upload
from mim_torchrec.encoders.features import compute_features, query_features_file, read_or_compute
from mim_torchrec.encoders.pixels import HasTowers
from mim_torchrec.training.distributed import DistributedContext


class Queries(Protocol):
    """Query images of training."""

    def send(self, index: np.ndarray, epoch: int, upload: Upload) -> Callable[[], Tensor]:
        """Send pixels or features of images in an epoch; returns what gives them after `upload.send`."""


class PlainQueries:
    """Queries as they are."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def send(self, index: np.ndarray, epoch: int, upload: Upload) -> Callable[[], Tensor]:
        """As `Inputs.send_images`."""
        return self._inputs.send_images(index, upload)


class ChangedPixels:
    """Queries whose pixels change from epoch to epoch, for towers that are trained.

    Args:
        inputs: pixels.
        strength: of the changes.
        seed: of the changes, with the epoch and the image.
    """

    def __init__(self, inputs: Inputs, strength: float, seed: int) -> None:
        self._inputs, self._strength, self._seed = inputs, strength, seed

    def send(self, index: np.ndarray, epoch: int, upload: Upload) -> Callable[[], Tensor]:
        """Gives (n, 3, image_size, image_size) uint8, which it changes."""
        seeds = [seed_of(self._seed, epoch, int(image)) for image in index]
        pixels = self._inputs.send_images(index, upload)
        return lambda: augmented(pixels(), seeds, self._strength)


class StoredViews:
    """Features of several views of every query; an epoch takes one of each, or the query as it is.

    Args:
        plain: features of the queries as they are.
        views: (num_views, num_queries, image_dim).
        rows: (num_queries,) the images of the queries, ascending.
        seed: of the choice, with the epoch.
    """

    def __init__(self, plain: Inputs, views: Tensor, rows: np.ndarray, seed: int) -> None:
        self._plain, self._views, self._rows, self._seed = plain, views, rows, seed

    def send(self, index: np.ndarray, epoch: int, upload: Upload) -> Callable[[], Tensor]:
        """Gives (n, image_dim)."""
        place = np.searchsorted(self._rows, index)
        chosen = np.random.default_rng((self._seed, epoch)).integers(
            len(self._views) + 1, size=len(self._rows)
        )
        view = torch.from_numpy(chosen[place] - 1)
        changed = upload.add(self._views[view.clamp(min=0), torch.from_numpy(place)])
        is_plain = upload.add((view < 0)[:, None])
        plain = self._plain.send_images(index, upload)
        return lambda: torch.where(is_plain(), plain(), changed())


def stored_views(
    plain: Inputs,
    catalog: SearchContent,
    train: np.ndarray,
    towers: HasTowers,
    *,
    strength: float,
    views: int,
    seed: int,
    cache: Path,
    batch_size: int,
    context: DistributedContext,
) -> StoredViews:
    """Compute views of the queries that are trained on, or read them from the cache.

    Args:
        plain: features of all images.
        catalog: images of items and queries.
        train: indexes of the pairs.
        towers: on the rank's device, frozen.
        strength: of the changes.
        views: of each query.
        seed: of the changes and of the choice in an epoch.
        cache: folder of features.
        batch_size: images at a time.
        context: the process group; every rank calls it.
    """
    rows = np.unique(catalog.query_image_row[train])
    pixels = PixelInputs(catalog, towers, None, context)

    def encode(index: np.ndarray) -> Tensor:
        seeds = [seed_of(seed, int(k) // len(rows), int(rows[k % len(rows)])) for k in index]
        return towers.vision(augmented(pixels.images(rows[index % len(rows)]), seeds, strength))

    def compute() -> dict[str, Tensor]:
        index = np.arange(views * len(rows))
        return {"image": compute_features(encode, index, batch_size, "views of queries", context)}

    def file() -> Path:
        facts = f"{catalog.items_digest()} {catalog.queries_digest()} {strength} {views} {seed}"
        of_rows = hashlib.sha256(rows.tobytes() + facts.encode()).hexdigest()
        return query_features_file(cache, towers, of_rows)

    found = read_or_compute(file, compute, context)["image"]
    logging.getLogger(__name__).info("%d views of %d query images", views, len(rows))
    return StoredViews(plain, found.view(views, len(rows), -1), rows, seed)


def seed_of(*numbers: int) -> int:
    """A seed of torch for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
