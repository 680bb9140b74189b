"""Embedding configs of frozen tables: the storage types of a table as TorchRec's data types."""

from collections.abc import Sequence

from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from mim_torchrec.embeddings.table.format import Table

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
    """
    return EmbeddingConfig(
        name=name,
        num_embeddings=table.manifest.num_embeddings,
        embedding_dim=table.manifest.dim,
        feature_names=list(feature_names),
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
        feature_names=list(feature_names),
        data_type=DATA_TYPES[table.manifest.dtype],
        pooling=pooling,
    )


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
