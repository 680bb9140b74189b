"""Symmetric image-text contrast, as in CLIP, for pre-training on pairs of an image and a text (DMA, §3.2).

Images and texts of all ranks are negatives of each other, by the same tiles as in C-SFT and without a queue.
Not here: the encoders.
"""

import torch
from torch import Tensor

from mim_torchrec.losses.contrast import Level, ScaledLoss, contrast, unit


class ImageTextContrastive(ScaledLoss):
    r"""Mean of the contrast of images with texts and of texts with images.

    .. math:: L = \tfrac{1}{2} (L(v, t) + L(t, v))

    L is InfoNCE (Eq. 5) over the N pairs of each of the P ranks: NP - 1 negatives a direction, less those of
    the same item.

    Args:
        temperature: fixed temperature; None learns it from 0.07, at least 0.01.
        mask_same_item: leave out pairs of the same item, which match as well as the pair itself.

    Raises:
        OptionError: the temperature is not positive.
    """

    def __init__(self, temperature: float | None = None, mask_same_item: bool = True) -> None:
        super().__init__(temperature)
        self.mask_same_item = mask_same_item

    def forward(self, image: Tensor, text: Tensor, item_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's N pairs; the mean over ranks is the global loss. Every rank has as many.

        Args:
            image: (N, dim).
            text: (N, dim).
            item_ids: (N,) int64.

        Returns:
            The loss, and `scale`, `accuracy` (mean of both directions), `negatives`, `loss_image_to_text` and
            `loss_text_to_image`.

        Raises:
            ValueError: on every rank, where the ranks' batches differ in size.
        """
        scale = self.scale()
        image, text = unit(image), unit(text)
        to_text, to_image = contrast(
            [Level(image, text), Level(text, image)], item_ids, scale, mask_same_item=self.mask_same_item
        )
        return (to_text.loss + to_image.loss) / 2, {
            "scale": scale.detach(),
            "accuracy": torch.stack([to_text.accuracy, to_image.accuracy]).mean(),
            "negatives": to_text.negatives,
            "loss_image_to_text": to_text.loss.detach(),
            "loss_text_to_image": to_image.loss.detach(),
        }
