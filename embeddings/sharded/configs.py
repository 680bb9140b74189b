"""Embedding configs of frozen tables: the storage types of a table as TorchRec's data types."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch import Tensor
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from mim_torchrec.embeddings.table.format import Table, TableError

Config = TypeVar("Config", EmbeddingConfig, EmbeddingBagConfig)
DATA_TYPES = {
    "float32": DataType.FP32,
    "float16": DataType.FP16,
    "bfloat16": DataType.BF16,
    "int8": DataType.INT8,
    "int4": DataType.INT4,
}


def frozen_config(table: Table, feature_names: Sequence[str], name: str = "mm") -> EmbeddingConfig:
    """Return the embedding config of a table on disk, for a :class:`FrozenEmbeddingCollection`.

    Args:
        table: the table; row 0, for unknown items, and its spare rows are added to its rows. A table whose
            rows are kept by number has no such row 0.
        feature_names: keys of the features that are looked up in it.
        name: the embedding table's name in the model.

    Raises:
        ValueError: `feature_names` is one name, and no list.
    """
    return EmbeddingConfig(
        name=name,
        num_embeddings=table.manifest.num_embeddings,
        embedding_dim=table.manifest.dim,
        feature_names=_listed(feature_names),
        data_type=DATA_TYPES[table.manifest.dtype],
    )


def frozen_bag_config(
    table: Table,
    feature_names: Sequence[str],
    name: str = "mm",
    pooling: PoolingType = PoolingType.SUM,
) -> EmbeddingBagConfig:
    """Return the embedding config of a table on disk, for a :class:`FrozenEmbeddingBagCollection`."""
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=table.manifest.num_embeddings,
        embedding_dim=table.manifest.dim,
        feature_names=_listed(feature_names),
        data_type=DATA_TYPES[table.manifest.dtype],
        pooling=pooling,
    )


def _listed(feature_names: Sequence[str]) -> list[str]:
    if isinstance(feature_names, str):  # would be a feature for each of its letters
        raise ValueError(f"feature_names is {feature_names!r}; give a list of names, [{feature_names!r}]")
    return list(feature_names)


def storage_dtype(config: BaseEmbeddingConfig) -> str:
    """Return how rows of a table with this config are stored, a key of ``quantize.DTYPES``.

    Raises:
        ValueError: its data type is none of FP32, FP16, BF16, INT8 and INT4.
    """
    found = {data_type: name for name, data_type in DATA_TYPES.items()}.get(config.data_type)
    if found is None:
        names = ", ".join(data_type.name for data_type in DATA_TYPES.values())
        raise ValueError(f"frozen table {config.name}: data type {config.data_type} is none of {names}")
    return found


class _NeverMade(BaseEmbeddingConfig):
    """A config of a frozen table, which TorchRec's functions that make trained tables of configs refuse."""

    def get_weight_init_min(self) -> float:
        _refuse(self.name)

    def get_weight_init_max(self) -> float:
        _refuse(self.name)


class FrozenTableConfig(_NeverMade, EmbeddingConfig):
    """What :meth:`FrozenEmbeddingCollection.embedding_configs` returns."""


class FrozenBagConfig(_NeverMade, EmbeddingBagConfig):
    """What :meth:`FrozenEmbeddingBagCollection.embedding_bag_configs` returns."""


def never_made(config: Config) -> Config:
    """Return a config of which no trained table can be made.

    ``fuse_embedding_optimizer`` replaces every subclass of TorchRec's collections by a trained collection of
    the same configs with random rows, and others may. Rows are initialized in all of them.

    Args:
        config: of a frozen table; stays as it is.
    """
    kind = FrozenBagConfig if isinstance(config, EmbeddingBagConfig) else FrozenTableConfig
    return kind(**{**_values(config), "init_fn": partial(_refuse_to_fill, config.name)})  # type: ignore[return-value]


def as_trained(config: Config) -> Config:
    """Return a config of which trained tables can be made, where it is one of :func:`never_made`."""
    if not isinstance(config, _NeverMade):
        return config
    kind = EmbeddingBagConfig if isinstance(config, EmbeddingBagConfig) else EmbeddingConfig
    return kind(**{**_values(config), "init_fn": None})  # type: ignore[return-value]


def _values(config: BaseEmbeddingConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(config)}


def _refuse_to_fill(name: str, weight: Tensor) -> NoReturn:
    _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise TableError(
        f"frozen table {name}: its config is of no trained table, whose rows would be random. "
        f"fuse_embedding_optimizer and the like take the parts of a model that have no frozen collection"
    )
