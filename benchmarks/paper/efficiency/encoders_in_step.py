"""CTR models whose multi-modal vectors are encoded in the step, in the place of the frozen table (Table 6).

"MIM without the representation center" infers the vectors of a batch's items by the foundation models as they
are; "MIM end to end" trains these jointly with CiUBM, by the gradient of the click loss through the content
and the fusion interest. Both are `mim_torchrec.ctr`'s model, sharded and optimized as `mim ctr` does. They
are what the paper argues against, and so in `benchmarks/`: the stages keep encoders out of CTR training.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.model import CTRModel
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.data.items import ItemStore
from mim_torchrec.encoders.item_encoder import ItemEncoder

FEATURES = ("candidate_mm", "behavior_mm")
SPECIAL_TOKENS = 5


@dataclass(frozen=True)
class RandomContent:
    """Images and titles by row; row 0 stands for an unknown item.

    Attributes:
        images: (num_rows, 3, image_size, image_size) uint8, in host memory.
        tokens: each (num_rows, num_tokens) int64, likewise.
    """

    images: Tensor
    tokens: dict[str, Tensor]

    @classmethod
    def random(cls, items: int, encoder: ItemEncoder, num_tokens: int, seed: int = 0) -> "RandomContent":
        """Noise for images and titles of so many items, each title of so many tokens."""
        generator = torch.Generator().manual_seed(seed)
        size = encoder.vision.image_size
        images = torch.randint(0, 256, (1 + items, 3, size, size), dtype=torch.uint8, generator=generator)
        words = len(encoder.text.tokenizer)
        first = min(SPECIAL_TOKENS, words - 1)
        ids = torch.randint(first, words, (1 + items, num_tokens), generator=generator)
        return cls(images, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    @classmethod
    def read(cls, items: ItemStore, encoder: ItemEncoder) -> "RandomContent":
        """Images and titles of a data set's items, in the order of their ids, as a table has them."""
        everything = np.arange(len(items))
        images = [encoder.vision.transform(image) for image in items.images(everything)]
        tokens = encoder.text.tokenize(items.titles(everything))
        # row 0 has what the first item has, where its vector is not used
        return cls(
            torch.stack([images[0], *images]),
            {name: torch.cat([values[:1], values]) for name, values in tokens.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes of images and titles."""
        return self.images.nbytes + sum(values.nbytes for values in self.tokens.values())

    def of(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and tokens of rows (n,), on the device of the rows."""
        own = rows.to(self.images.device)
        tokens = {name: values[own].to(rows.device) for name, values in self.tokens.items()}
        return self.images[own].to(rows.device), tokens


class Encoded(nn.Module):
    """Vectors of items by an encoder, from their images and titles.

    Args:
        encoder: of the items.
        catalog: their images and titles.
        trained: let gradients through to the encoder; otherwise it is in evaluation mode and has none.
    """

    def __init__(self, encoder: ItemEncoder, catalog: RandomContent, trained: bool) -> None:
        super().__init__()
        self.encoder = encoder if trained else encoder.requires_grad_(False).eval()
        self.dim = encoder.table_dim
        self.catalog, self._trained = catalog, trained

    def train(self, mode: bool = True) -> "Encoded":
        super().train(mode)
        self.encoder.train(mode and self._trained)
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (n,) of items to vectors (n, dim)."""
        with torch.set_grad_enabled(self._trained and torch.is_grad_enabled()):
            return self.encoder.encode_table(*self.catalog.of(rows))


class EncodedItems(nn.Module):
    """Takes the place of the frozen collection in a `CTRModel`: every distinct item is encoded once a step.

    Args:
        config: of the table whose place it takes.
        source: from rows (n,) to vectors (n, dim): `Encoded`, or `fake_encoder.FakeEncoder`.
    """

    def __init__(self, config: EmbeddingConfig, source: nn.Module) -> None:
        super().__init__()
        self._config = config
        self.source = source

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The config of the table whose place it takes."""
        return [self._config]

    def forward(self, sparse: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Vectors of the features `candidate_mm` and `behavior_mm`; those of row 0 are zero."""
        features = [sparse[name] for name in FEATURES]
        rows, place = torch.unique(torch.cat([f.values() for f in features]), return_inverse=True)
        vectors = torch.where((rows != 0)[:, None], self.source(rows), 0.0).index_select(0, place)
        parts = vectors.split([f.values().numel() for f in features])
        return {
            name: JaggedTensor(values=part, lengths=f.lengths())
            for name, f, part in zip(FEATURES, features, parts, strict=True)
        }


def build_encoded_model(
    settings: CTRConfig, num_embeddings: dict[str, int], source: nn.Module, dim: int
) -> CTRModel:
    """The CTR model over vectors that are encoded in the step, on the meta device but for the dense part.

    Args:
        settings: of a model with MIM.
        num_embeddings: rows of the tables of ids.
        source: see `EncodedItems`.
        dim: size of its vectors.
    """
    mm = EmbeddingConfig(
        name="mm", num_embeddings=num_embeddings["item_id"], embedding_dim=dim,
        feature_names=list(FEATURES), data_type=DataType.FP32,
    )  # fmt: skip
    model = build_model(settings, num_embeddings, mm, torch.device("meta"))
    # it is called as a collection is, and gives what a collection gives
    model.mm_embeddings = cast(EmbeddingCollection, EncodedItems(mm, source))
    return model
