"""A collection of which some tables are trained and others frozen: it gives what the whole collection gave.

``freezing.py`` puts one in the place of a collection of several tables. The parts are collections of their
own and are sharded as such; the keys that come out, and their order, stay those of the whole collection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

NameMaps = list[dict[str, str]]


@dataclass(frozen=True)
class Parts:
    """What a collection consists of.

    Args:
        configs: of all tables, as they are trained, in the order of the whole collection.
        keys: that come out, in order.
        trained: collection of the tables that are trained, sharded or not; None where all are frozen.
        frozen: by table, a frozen collection of that table alone.
    """

    configs: list[BaseEmbeddingConfig]
    keys: list[str]
    trained: nn.Module | None
    frozen: dict[str, nn.Module]

    def trained_configs(self) -> list[BaseEmbeddingConfig]:
        return [config for config in self.configs if config.name not in self.frozen]


class SplitCollection(nn.Module):
    """What both kinds have in common; see :class:`SplitEmbeddingBags` and :class:`SplitEmbeddings`."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._configs, self._keys = parts.configs, parts.keys
        self.trained = parts.trained
        self.frozen = nn.ModuleDict(parts.frozen)
        self._maps = name_maps(parts)

    def parts(self) -> Parts:
        """Return what it was made of."""
        return Parts(self._configs, self._keys, self.trained, dict(self.frozen.items()))

    def _look_up(self, features: KeyedJaggedTensor) -> list[object]:
        modules = [] if self.trained is None else [self.trained]
        return [module(features) for module in [*modules, *self.frozen.values()]]


class SplitEmbeddingBags(SplitCollection):
    """Pooled: used as the ``EmbeddingBagCollection`` that it replaces."""

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configs of all tables."""
        return cast(list[EmbeddingBagConfig], self._configs)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return pooled vectors (batch_size, sum of dims) of all features."""
        return join_bags(cast(list[KeyedTensor], self._look_up(features)), self._maps, self._keys)


class SplitEmbeddings(SplitCollection):
    """Unpooled: used as the ``EmbeddingCollection`` that it replaces."""

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Configs of all tables."""
        return cast(list[EmbeddingConfig], self._configs)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Return the vectors (num_ids, dim) of every feature."""
        return join_features(
            cast(list[dict[str, JaggedTensor]], self._look_up(features)), self._maps, self._keys
        )


def name_maps(parts: Parts) -> NameMaps:
    """Return for each part what the whole collection calls the keys of that part.

    A feature of two tables has a key for each, "feature@table", but the plain one in a collection of one of
    the tables.
    """
    whole = dict(zip((c.name for c in parts.configs), embedding_names(parts.configs), strict=True))
    lists = [parts.trained_configs()] if parts.trained is not None else []
    lists += [[config for config in parts.configs if config.name == name] for name in parts.frozen]
    return [
        {
            own: name
            for config, names in zip(configs, embedding_names(configs), strict=True)
            for own, name in zip(names, whole[config.name], strict=True)
        }
        for configs in lists
    ]


def embedding_names(configs: Sequence[BaseEmbeddingConfig]) -> list[list[str]]:
    """Return the keys that a collection of these tables gives, by table."""
    return get_embedding_names_by_table(cast(list[EmbeddingConfig], list(configs)))


@torch.fx.wrap
def join_bags(found: list[KeyedTensor], maps: NameMaps, keys: list[str]) -> KeyedTensor:
    """Join what collections give, under other names and in the order of ``keys``."""
    by_key = {
        names[key]: (each, key)
        for each, names in zip(found, maps, strict=True)
        for key in each.keys()  # noqa: SIM118  no mapping
    }
    if len(found) == 1 and list(by_key) == keys:
        values = found[0].values()
    else:
        values = torch.cat([by_key[key][0][by_key[key][1]] for key in keys], dim=1)
    lengths = {
        names[key]: length
        for each, names in zip(found, maps, strict=True)
        for key, length in zip(each.keys(), each.length_per_key(), strict=True)
    }
    return KeyedTensor(keys=keys, length_per_key=[lengths[key] for key in keys], values=values)


@torch.fx.wrap
def join_features(
    found: list[dict[str, JaggedTensor]], maps: NameMaps, keys: list[str]
) -> dict[str, JaggedTensor]:
    """Join what collections give, under other names and in the order of ``keys``."""
    by_key = {
        names[key]: vectors for each, names in zip(found, maps, strict=True) for key, vectors in each.items()
    }
    return {key: by_key[key] for key in keys}
