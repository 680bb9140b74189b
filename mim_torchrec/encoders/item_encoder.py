"""The multi-modal encoder of C-SFT (§3.3 Q2): two towers, projections to one size, and their fusion.

Both Eq. 6 and CiUBM compare vectors of different origin, so every output has the same size. The part above
the towers is a module of its own, which can be trained on features that were computed once.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim_torchrec.domains import Count, Fraction, Natural
from mim_torchrec.encoders.fusion import ConcatFusion, LowRankFusion, TensorFusion
from mim_torchrec.encoders.principal import principal_components
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is above the towers."""

    dim: Count = 128
    """Size of every vector that leaves the encoder."""
    fusion: Literal["tfn", "lmf", "concat"] = "tfn"
    """How images and titles are fused: tensor fusion (Eq. 3–4), its low-rank form, or an MLP of both."""
    fusion_dim: Count = 64
    """Size of each side of the outer product (Eq. 3); the MLP reads (fusion_dim + 1)^2 products."""
    lmf_rank: Count = 4
    """Factors of the low-rank form (`lmf`)."""
    hidden_dim: Count = 256
    """Hidden layer of the MLP (Eq. 4)."""
    dropout: Fraction = 0.2
    """Dropout on the towers' features and on the hidden layer of the MLP."""
    principal_dim: Natural = 0
    """Beyond the paper: so many principal components of the towers' features stand in the table beside
    h^MM, fixed, each of the two parts of length 1. Needs `--init pca`."""

    def facts(self) -> dict[str, Any]:
        """What vectors depend on: all fields that play a part."""
        found = asdict(self)
        if self.fusion != "lmf":
            del found["lmf_rank"]
        if self.fusion == "tfn":  # encoders were written before there was a choice
            del found["fusion"]
        return found


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
        self.fusion = make_fusion(config)
        self.principal = None
        if config.principal_dim:
            self.principal = nn.Linear(image_dim + text_dim, config.principal_dim).requires_grad_(False)
        self.table_dim = config.dim + config.principal_dim

    def encode_query(self, image: Tensor) -> Tensor:
        """h_q^img (n, dim) of image features (n, image_dim)."""
        return self.image(self.dropout(image))

    def encode_items(self, image: Tensor, text: Tensor) -> ItemVectors:
        """Vectors of items from features (n, image_dim) and (n, text_dim)."""
        h_img, h_txt = self.image(self.dropout(image)), self.text(self.dropout(text))
        return ItemVectors(self.fusion(h_img, h_txt), h_img, h_txt)

    def encode_table(self, image: Tensor, text: Tensor) -> Tensor:
        """What the table holds, (n, table_dim): h^MM, and beside it principal components if there are any.

        The cosine of two such vectors is then the mean of the cosines of their parts.
        """
        mm = self.encode_items(image, text).mm
        if self.principal is None:
            return mm
        principal = self.principal(_unit_features(image, text))
        return torch.cat([F.normalize(mm, dim=1), F.normalize(principal, dim=1)], dim=1)

    @torch.no_grad()
    def init_pca(self, image: Tensor, text: Tensor) -> None:
        """Start the projections at the principal components of features, and set the fixed ones.

        Each projection is scaled to a unit variance of its first component. The fixed components are of both
        towers' features together, those of each tower scaled to length 1.

        Args:
            image: (n, image_dim) features of items.
            text: (n, text_dim) of the same items.

        Raises:
            OptionError: fewer items or features than components.
        """
        sources = [(self.image, image), (self.text, text)]
        if self.principal is not None:
            sources.append((self.principal, _unit_features(image, text)))
        for layer, features in sources:
            found = principal_components(features, layer.out_features)
            layer.weight.copy_(found.components.T / found.scale)
            layer.bias.copy_(-(found.mean @ found.components) / found.scale)


class ItemEncoder(nn.Module):
    """Image and title of an item to its vectors.

    Args:
        config: towers and head.
        vision: the vision tower.
        text: the text tower.

    Attributes:
        table_dim: size of the vectors that the table holds.
    """

    def __init__(self, config: ItemEncoderConfig, vision: VisionEncoder, text: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.text = text
        self.head = ItemHead(vision.feature_dim, text.feature_dim, config.head)
        self.table_dim = self.head.table_dim

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

    def encode_table(self, images: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """What the table holds of items, (n, table_dim); arguments as of `encode_items`."""
        return self.head.encode_table(self.vision(images), self.text(tokens))


def make_fusion(config: HeadConfig) -> TensorFusion | LowRankFusion | ConcatFusion:
    """The fusion that a configuration names."""
    if config.fusion == "lmf":
        return LowRankFusion(
            config.dim, config.fusion_dim, config.hidden_dim, config.lmf_rank, config.dropout
        )
    if config.fusion == "concat":
        return ConcatFusion(config.dim, config.hidden_dim, config.dropout)
    return TensorFusion(config.dim, config.fusion_dim, config.hidden_dim, config.dropout)


def _unit_features(image: Tensor, text: Tensor) -> Tensor:
    return torch.cat([F.normalize(image, dim=1), F.normalize(text, dim=1)], dim=1)
