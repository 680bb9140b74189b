"""Images and titles as towers take them, by index: what every stage that trains towers reads.

Not here: where images and titles come from, which the stages know.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.data.uploads import Upload
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.encoders.text import TextEncoder
from mim_torchrec.encoders.vision import VisionEncoder
from mim_torchrec.training.distributed import DistributedContext

log = logging.getLogger(__name__)

Tokens = dict[str, Tensor]
AHEAD = 2
"""Batches whose images wait or are being decoded while one is trained on."""


class ItemContent(Protocol):
    """Where images and titles come from."""

    num_images: int

    def titles(self, rows: np.ndarray) -> list[str]:
        """Titles of items."""

    def decode(self, image: int, vision: VisionEncoder) -> Tensor:
        """One image as the tower takes it."""


class HasTowers(Protocol):
    """Whose preprocessing is used, such as an `ItemEncoder`."""

    @property
    def vision(self) -> VisionEncoder: ...
    @property
    def text(self) -> TextEncoder: ...


class PixelInputs:
    """Pixels and tokens, for towers that are trained.

    Args:
        catalog: images and titles.
        encoder: whose preprocessing is used.
        memory_gib: images are decoded once if they fit into this; None decodes whenever they are asked for.
        context: the process group; each rank decodes its share, all keep all.

    Attributes:
        ahead: batches that a thread should make ahead of training, see `prefetched`; 0 where all images are
            decoded already.
    """

    def __init__(
        self, catalog: ItemContent, encoder: HasTowers, memory_gib: float | None, context: DistributedContext
    ) -> None:
        self._catalog, self._encoder, self._context = catalog, encoder, context
        self._pool = ThreadPoolExecutor(4)
        size = catalog.num_images * 3 * encoder.vision.image_size**2
        self._pixels: Tensor | None = None
        self.ahead = AHEAD
        if memory_gib is None:
            return
        if size <= memory_gib * 2**30:
            mine = rows_of_rank(catalog.num_images, context)
            decoded = []
            with Progress(len(mine), "decode", "image", show=context.is_main) as progress:
                for start in range(0, len(mine), 256):
                    decoded.append(self._decode(mine[start : start + 256]).numpy())
                    progress.update(len(decoded[-1]))
            parts = context.all_gather_objects(decoded)
            self._pixels = torch.from_numpy(np.concatenate([array for part in parts for array in part]))
            self.ahead = 0
        else:
            log.info("%.1f GiB of pixels are over the limit of %.1f GiB: every epoch decodes its images",
                     size / 2**30, memory_gib)  # fmt: skip

    def new_upload(self) -> Upload:
        """To the device of batches."""
        return Upload(self._context.device)

    def images(self, index: np.ndarray) -> Tensor:
        """(n, 3, image_size, image_size) uint8, on the device."""
        return self._in_memory(index).to(self._context.device)

    def send_images(self, index: np.ndarray, upload: Upload) -> Callable[[], Tensor]:
        """Send them with others; returns what gives them on the device."""
        return upload.add(self._in_memory(index))

    def texts(self, rows: np.ndarray) -> Tokens:
        """`input_ids` and `attention_mask`, (n, num_tokens), on the device."""
        return {name: value.to(self._context.device) for name, value in self.tokens(rows).items()}

    def send_texts(self, rows: np.ndarray, upload: Upload) -> Callable[[], Tokens]:
        """Send them with others; returns what gives them on the device."""
        return send_tokens(self.tokens(rows), upload)

    def tokens(self, rows: np.ndarray) -> Tokens:
        """As `texts`, in memory."""
        return self._encoder.text.tokenize(self._catalog.titles(rows))

    def _in_memory(self, index: np.ndarray) -> Tensor:
        return self._decode(index) if self._pixels is None else self._pixels[torch.from_numpy(index)]

    def _decode(self, index: np.ndarray) -> Tensor:
        decoded = self._pool.map(lambda one: self._catalog.decode(int(one), self._encoder.vision), index)
        return torch.stack(list(decoded))


def send_tokens(tokens: Tokens, upload: Upload) -> Callable[[], Tokens]:
    """Send tokens with other tensors; returns what gives them on the device."""
    there = {name: upload.add(value) for name, value in tokens.items()}
    return lambda: {name: value() for name, value in there.items()}


def rows_of_rank(count: int, context: DistributedContext) -> np.ndarray:
    """This rank's share of 0 … count - 1, contiguous."""
    return np.arange(
        count * context.rank // context.world_size, count * (context.rank + 1) // context.world_size
    )
