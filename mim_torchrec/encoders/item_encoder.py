"""The multi-modal encoder of C-SFT (§3.3 Q2): two towers, projections to one size, and their fusion.

Both Eq. 6 and CiUBM compare vectors of different origin, so every output has the same size. The part above
the towers is a module of its own, which can be trained on features that were computed once.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mim_torchrec.encoders.fusion import TensorFusion
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is above the towers."""

    dim: int = 128
    """Size of every vector that leaves the encoder."""
    fusion_dim: int = 64
    """Size of each side of the outer product (Eq. 3); the MLP reads (fusion_dim + 1)^2 products."""
    hidden_dim: int = 256
    """Hidden layer of the MLP (Eq. 4)."""
    dropout: float = 0.2
    """Dropout on the towers' features and on the hidden layer of the MLP."""
    shortcut: bool = False
    """Add a linear function of both projections to the MLP, which then starts at zero."""


@dataclass(frozen=True, kw_only=True)
class ItemEncoderConfig:
    """Towers and head."""

    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)


class ItemVectors(NamedTuple):
    """Vectors of n items, each (n, dim)."""

    mm: Tensor
    image: Tensor
    text: Tensor


class ItemHead(nn.Module):
    """Projections of the towers' features and their fusion.

    Args:
        image_dim: size of the vision tower's features.
        text_dim: size of the text tower's features.
        config: sizes.
    """

    def __init__(self, image_dim: int, text_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.image = nn.Linear(image_dim, config.dim)
        self.text = nn.Linear(text_dim, config.dim)
        self.fusion = TensorFusion(
            config.dim, config.fusion_dim, config.hidden_dim, config.dropout, config.shortcut
        )

    def encode_query(self, image: Tensor) -> Tensor:
        """h_q^img (n, dim) of image features (n, image_dim)."""
        return self.image(self.dropout(image))

    def encode_items(self, image: Tensor, text: Tensor) -> ItemVectors:
        """Vectors of items from features (n, image_dim) and (n, text_dim)."""
        h_img, h_txt = self.image(self.dropout(image)), self.text(self.dropout(text))
        return ItemVectors(self.fusion(h_img, h_txt), h_img, h_txt)

    @torch.no_grad()
    def init_pca(self, image: Tensor, text: Tensor) -> None:
        """Start the projections at the principal components of features, the shortcut at those of both.

        Each projection is scaled to a unit variance of its first component.

        Args:
            image: (n, image_dim) features of items.
            text: (n, text_dim) of the same items.

        Raises:
            ValueError: fewer items or features than `dim`.
        """
        projected = []
        for layer, features in ((self.image, image), (self.text, text)):
            mean, components, scale = _principal(features, layer.out_features)
            layer.weight.copy_(components.T / scale)
            layer.bias.copy_(-(mean @ components) / scale)
            projected.append(layer(features))
        if self.fusion.shortcut is not None:
            _, components, _ = _principal(torch.cat(projected, dim=1), self.image.out_features)
            self.fusion.shortcut.weight.copy_(components.T)


class ItemEncoder(nn.Module):
    """Image and title of an item to its vectors.

    Args:
        config: towers and head.
        vision: the vision tower.
        text: the text tower.

    Attributes:
        dim: size of the vectors.
    """

    def __init__(self, config: ItemEncoderConfig, vision: VisionEncoder, text: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.text = text
        self.head = ItemHead(vision.feature_dim, text.feature_dim, config.head)
        self.dim = config.head.dim

    @classmethod
    def build(cls, config: ItemEncoderConfig, tokenizer: str | None = None) -> "ItemEncoder":
        """Towers as configured and a new head; `tokenizer` as for `TextEncoder`."""
        return cls(config, VisionEncoder(config.vision), TextEncoder(config.text, tokenizer=tokenizer))

    def encode_query(self, images: Tensor) -> Tensor:
        """h_q^img (n, dim) of query images (n, 3, image_size, image_size) uint8."""
        return self.head.encode_query(self.vision(images))

    def encode_items(self, images: Tensor, tokens: dict[str, Tensor]) -> ItemVectors:
        """Vectors of items.

        Args:
            images: (n, 3, image_size, image_size) uint8, from `vision.transform`.
            tokens: from `text.tokenize`, of n titles.

        Returns:
            h^MM, h^img and h^txt, each (n, dim).
        """
        return self.head.encode_items(self.vision(images), self.text(tokens))


def _principal(features: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (f,), components (f, dim) and standard deviation of the first component."""
    if min(features.shape) < dim:
        raise ValueError(
            f"{features.shape[0]} items of {features.shape[1]} features have no {dim} principal components; "
            "lower --head.dim or take --init random"
        )
    mean = features.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, components = torch.pca_lowrank(features - mean, q=dim, center=False, niter=4)
    return mean, components, singular[0] / len(features) ** 0.5
