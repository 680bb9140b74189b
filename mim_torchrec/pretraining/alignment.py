"""Different modal alignment (§3.2): contrast of each item's image with its title, as CLIP (arXiv 2103.00020).

The projections stand on the towers for this phase only. C-SFT starts its own at random or at the principal
components of the features, which are aligned already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mim_torchrec.encoders.checkpoint import Towers
from mim_torchrec.encoders.pixels import PixelInputs, Tokens
from mim_torchrec.losses.alignment import ImageTextContrastive
from mim_torchrec.pretraining.config import AlignmentConfig
from mim_torchrec.pretraining.objective import PretrainingObjective


@dataclass
class ItemBatch:
    """n items: images (n, 3, size, size) uint8, tokens of their titles, and their rows (n,)."""

    images: Tensor
    tokens: Tokens
    rows: Tensor


class ImageTextModel(PretrainingObjective):
    """Both towers, their projections to one size, and the loss.

    Args:
        towers: vision and text.
        inputs: images and tokens by item row.
        config: size of the projections, and the loss.
        fix_batch_norm: as in `PretrainingObjective`.
    """

    def __init__(
        self, towers: Towers, inputs: PixelInputs, config: AlignmentConfig, fix_batch_norm: bool = False
    ) -> None:
        super().__init__(fix_batch_norm)
        self.vision, self.text = towers
        self.image_projection = nn.Linear(self.vision.feature_dim, config.dim, bias=False)
        self.text_projection = nn.Linear(self.text.feature_dim, config.dim, bias=False)
        self.loss = ImageTextContrastive(config.temperature, config.mask_same_item)
        self._inputs = inputs

    def batch(self, rows: np.ndarray, key: Sequence[int]) -> ItemBatch:
        """Images and titles of items; nothing is drawn."""
        upload = self._inputs.new_upload()
        images, texts = self._inputs.send_images(rows, upload), self._inputs.send_texts(rows, upload)
        own = upload.add(torch.from_numpy(rows))
        upload.send()
        return ItemBatch(images(), texts(), own())

    def sums(self, batch: ItemBatch) -> Tensor:
        """Of this rank's n items against those of all ranks, which must have as many: n x the loss, how many
        images find their own title first, n."""
        image = self.image_projection(self.vision(batch.images))
        text = self.text_projection(self.text(batch.tokens))
        loss, report = self.loss(image, text, batch.rows)
        count = len(batch.rows)
        return torch.stack([loss * count, report["accuracy"] * count, loss.new_full((), count)])

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """`loss`, and `recall_at_1` of the title by the image within a batch of all ranks."""
        return {"loss": sums[0] / sums[2], "recall_at_1": sums[1] / sums[2]}
