"""Several pooled collections as one, for models that take a single collection (DLRM, DeepFM)."""

from typing import cast

import torch
import torch.fx
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


# Pipelines trace a model to find its lookups. Their results have no keys then, so that joining is not traced.
@torch.fx.wrap
def _join(found: list[KeyedTensor]) -> KeyedTensor:
    """Join pooled vectors, each (batch_size, sum of its dims), along their dims."""
    return KeyedTensor(
        keys=[key for each in found for key in each.keys()],  # noqa: SIM118  no mapping
        length_per_key=[length for each in found for length in each.length_per_key()],
        values=torch.cat([each.values() for each in found], dim=1),
    )


class JoinedEmbeddingBags(nn.ModuleList):
    """Looks up trained and frozen collections and joins what they give; each is sharded on its own.

    Args:
        collections: whose feature names differ.

    Raises:
        ValueError: two of them have a feature of one name.
    """

    def __init__(self, *collections: EmbeddingBagCollection) -> None:
        super().__init__(collections)
        names = [name for config in self.embedding_bag_configs() for name in config.feature_names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"features {twice} are in several tables; give each table features of its own")

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configs of all collections, before they are sharded."""
        return [
            config
            for collection in self
            for config in cast(EmbeddingBagCollection, collection).embedding_bag_configs()
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return pooled vectors (batch_size, sum of dims) of all features."""
        return _join([collection(features) for collection in self])
