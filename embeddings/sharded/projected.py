"""Pooled vectors of other dims as vectors of one dim, for models that need one (DLRM, DeepFM)."""

from dataclasses import replace
from typing import cast

import torch
import torch.fx
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class ProjectedEmbeddingBags(nn.Module):
    """Looks up a collection and projects what it pools to ``embedding_dim``, by a trained matrix a table.

    A projection without a bias is linear: P Σ v = Σ P v, also for means and weighted sums. So it is done once
    a bag, after the exchange, and the vectors of a frozen table stay as they are. An empty bag stays zero.

    Args:
        collection: pooled, frozen or not; it is sharded on its own. The projections are data-parallel.
        embedding_dim: of what comes out. Tables of this dim are not projected.
        device: of the projections; ``None`` is "meta" where the collection is, for a model that will be
            sharded.

    Its forward maps a ``KeyedJaggedTensor`` to a ``KeyedTensor`` (batch_size, num_features * embedding_dim)
    of the keys of the collection. It can be one of the collections of :class:`JoinedEmbeddingBags`.

    >>> config = EmbeddingBagConfig(name="mm", num_embeddings=9, embedding_dim=6, feature_names=["item"])
    >>> module = ProjectedEmbeddingBags(EmbeddingBagCollection([config]), embedding_dim=4)
    >>> bags = KeyedJaggedTensor(["item"], torch.tensor([3, 0, 3]), lengths=torch.tensor([2, 1]))
    >>> module(bags)["item"].shape, [name for name, _ in module.named_parameters()]
    (torch.Size([2, 4]), ['collection.embedding_bags.mm.weight', 'projections.mm.weight'])
    """

    def __init__(
        self,
        collection: EmbeddingBagCollection,
        embedding_dim: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        configs = collection.embedding_bag_configs()
        names = get_embedding_names_by_table(configs)
        self.collection = collection
        self.embedding_dim = embedding_dim
        self.projections = nn.ModuleDict(
            {
                config.name: nn.Linear(
                    config.embedding_dim, embedding_dim, bias=False,
                    device=collection.device if device is None else device,
                )
                for config in configs
                if config.embedding_dim != embedding_dim
            }
        )  # fmt: skip
        self._configs = [replace(config, embedding_dim=embedding_dim) for config in configs]
        self._table_of = {
            key: config.name for config, keys in zip(configs, names, strict=True) for key in keys
        }

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configs of the tables with the dim that comes out."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether the collection uses weights."""
        return self.collection.is_weighted()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return pooled and projected vectors of all features."""
        weights = {name: cast(Tensor, linear.weight) for name, linear in self.projections.items()}
        return _project(self.collection(features), weights, self._table_of, self.embedding_dim)


# Pipelines trace a model to find its lookups; see `joined.py`.
@torch.fx.wrap
def _project(
    pooled: KeyedTensor, weights: dict[str, Tensor], table_of: dict[str, str], embedding_dim: int
) -> KeyedTensor:
    """Multiply pooled vectors (batch_size, dim) of each key by its table's matrix (embedding_dim, dim)."""
    values = []
    for key in pooled.keys():  # noqa: SIM118  no mapping
        weight = weights.get(table_of[key])
        found = pooled[key]
        values.append(found if weight is None else nn.functional.linear(found.to(weight.dtype), weight))
    return KeyedTensor(
        keys=pooled.keys(), length_per_key=[embedding_dim] * len(values), values=torch.cat(values, dim=1)
    )
