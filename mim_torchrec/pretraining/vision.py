"""Downstream data adaptation of the vision tower (§3.2): masked image modelling as SimMIM (arXiv 2111.09886).

Random patches of the normalized image are masked and their pixels reconstructed, by an L1 loss and a head of
one layer on the last feature map. SimMIM replaces a masked patch by a learned token; here masked
pixels are set to the mean color, which is 0 after normalization, whatever the tower. A convolutional network
has no tokens, and in a vision transformer whose patches are aligned with the mask every masked patch embeds
to the bias of the patch embedding: a learned mask token already.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mim_torchrec.encoders.pixels import PixelInputs
from mim_torchrec.encoders.vision import VisionEncoder
from mim_torchrec.errors import OptionError
from mim_torchrec.pretraining.config import ImageAdaptionConfig
from mim_torchrec.pretraining.objective import PretrainingObjective, generator


@dataclass
class MaskedImages:
    """Images (n, 3, size, size) uint8, and what is masked of them, (n, size / patch, size / patch) bool."""

    images: Tensor
    masked: Tensor


class MaskedImageModel(PretrainingObjective):
    """Reconstructs masked patches.

    Args:
        vision: the tower, any of timm with `forward_intermediates`.
        inputs: images by item row.
        config: size and share of the masked patches.
        fix_batch_norm: as in `PretrainingObjective`.

    Raises:
        OptionError: the tower has no feature map, or sizes do not divide one another.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        inputs: PixelInputs,
        config: ImageAdaptionConfig,
        fix_batch_norm: bool = False,
    ) -> None:
        super().__init__(fix_batch_norm)
        size = vision.image_size
        if size % config.mask_size or size == config.mask_size:
            raise OptionError(
                f"--dda-vision.mask-size {config.mask_size}: images of {size} pixels are not several patches "
                "of that side"
            )
        self.side = size // config.mask_size
        self.masked_patches = number_masked(self.side**2, config.mask_ratio)
        if not hasattr(vision.model, "forward_intermediates"):
            raise OptionError(
                f"vision tower {vision.config.name} has no feature maps in timm: leave dda-vision out"
            )
        self.vision = vision
        self._inputs = inputs
        shape = self._probe()
        if size % shape[-1] or shape[-1] != shape[-2]:
            raise OptionError(
                f"images of {size} pixels have feature maps of {shape[-2]} x {shape[-1]}; choose another "
                "--vision.image-size, a multiple of the tower's stride"
            )
        stride = size // shape[-1]
        pixels = nn.Conv2d(shape[1], 3 * stride**2, 1)
        # it starts at the mean color, so that a random head does not shake a pretrained tower
        nn.init.zeros_(pixels.weight)
        nn.init.zeros_(cast(Tensor, pixels.bias))
        self.head = nn.Sequential(pixels, nn.PixelShuffle(stride))

    def batch(self, rows: np.ndarray, key: Sequence[int]) -> MaskedImages:
        """Images of items, and a mask drawn for each."""
        upload = self._inputs.new_upload()
        images = self._inputs.send_images(rows, upload)
        masked = upload.add(patch_masks(len(rows), self.side, self.masked_patches, generator(key)))
        upload.send()
        return MaskedImages(images(), masked())

    def sums(self, batch: MaskedImages) -> Tensor:
        """Sum of |reconstruction - pixel| over masked pixels and channels, that of |pixel|, their number."""
        pixels = self.vision.scaled(batch.images)
        scale = pixels.shape[-1] // self.side
        masked = batch.masked.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
        rebuilt = self.head(self._features(pixels.masked_fill(masked, 0.0)))
        error = ((rebuilt.float() - pixels).abs() * masked).sum()
        return torch.stack([error, (pixels.abs() * masked).sum(), error.new_zeros(()) + masked.sum() * 3])

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """`loss`, and `explained`: the share of the loss of guessing the mean color that is gone."""
        return {"loss": sums[0] / sums[2], "explained": 1 - sums[0] / sums[1]}

    def _features(self, pixels: Tensor) -> Tensor:
        """(n, channels, height, width): where a network has layers after its last stage and before pooling
        (EfficientNet), what these give, so that they are adapted too."""
        with self.vision.computing(pixels.device):
            last, maps = self.vision.model.forward_intermediates(
                pixels, indices=1, norm=True, output_fmt="NCHW"
            )
        found: Tensor = last if last.ndim == 4 and last.shape[-2:] == maps[-1].shape[-2:] else maps[-1]
        return found.float() if self.vision.precision == "bf16" else found

    @torch.no_grad()
    def _probe(self) -> torch.Size:
        training = self.vision.training
        self.vision.eval()
        size = self.vision.image_size
        shape = self._features(self.vision.mean.new_zeros(1, 3, size, size)).shape
        self.vision.train(training)
        return shape


def number_masked(patches: int, ratio: float) -> int:
    """Patches to mask: the share rounded up, at least one, and one is left.

    >>> number_masked(16, 0.6), number_masked(4, 0.01), number_masked(4, 0.99)
    (10, 1, 3)
    """
    if not 0 < ratio < 1:
        raise OptionError(f"--dda-vision.mask-ratio is {ratio}; it must be in (0, 1)")
    return min(patches - 1, math.ceil(patches * ratio))


def patch_masks(count: int, side: int, masked: int, draws: torch.Generator) -> Tensor:
    """(count, side, side) bool, with `masked` random patches of every image True."""
    order = torch.rand(count, side * side, generator=draws).argsort(1)
    return (order < masked).view(count, side, side)
