"""What a lookup takes and returns, sharded or not: features, jagged vectors, pooled and keyed bags.

In a batch of variable size per feature (``stride_per_key_per_rank``) a feature has as many bags as differ,
and inverse indices say which of them each example has.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

MODES = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


def check_features(features: KeyedJaggedTensor, names: Collection[str], is_weighted: bool) -> None:
    """Refuse features that a collection cannot look up, before anything is exchanged.

    TorchRec's collections refuse some of them, each in a way of its own, and take one of two features of the
    same name.

    Args:
        features: of a batch.
        names: features of the collection.
        is_weighted: whether its pooled vectors are weighted.

    Raises:
        ValueError: two features of one name, a missing feature, or no weights.
        TypeError: ids that are not integers.
    """
    keys = features.keys()
    distinct = set(keys)
    if len(distinct) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"keys must be unique: features {twice} are in the batch more than once")
    if not distinct.issuperset(names):
        missing = sorted(set(names) - distinct)
        raise ValueError(f"features {missing} of the frozen collection are not in the batch, it has {keys}")
    ids = features.values().dtype
    if ids.is_floating_point or ids.is_complex or ids is torch.bool:
        raise TypeError(f"features of a frozen collection are rows, integers, not {ids}")
    if is_weighted and features.weights_or_none() is None:
        raise ValueError("the frozen collection has is_weighted=True and the batch has no weights")


def row_numbers(dist_input: Iterable[KeyedJaggedTensor]) -> list[Tensor]:
    """Return the rows that this rank was asked for, of each exchange.

    Raises:
        ValueError: TorchRec's sharder of feature processors is around the collection. It gives weights to the
            rows where they are stored, and the bags are only known where they are asked for.
    """
    dist_input = list(dist_input)
    if any(rows.weights_or_none() is not None for rows in dist_input):
        raise ValueError(
            "FeatureProcessedEmbeddingBagCollectionSharder cannot shard a frozen collection: give "
            "DistributedModelParallel and the planner no such sharder, and the frozen collection inside is "
            "sharded on its own"
        )
    return [rows.values() for rows in dist_input]


def inverse_indices(features: KeyedJaggedTensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return by feature which of its bags each example has, (batch_size,); bags are as many as they differ.

    Raises:
        ValueError: the batch does not say it, of all features or of one.
    """
    found = features.inverse_indices_or_none()
    if found is None:
        raise ValueError(
            "inverse indices must be provided from KJT if using variable batch size per feature: "
            f"the batch has {dict(zip(features.keys(), features.stride_per_key(), strict=True))} bags"
        )
    by_name = dict(zip(found[0], found[1].unbind(), strict=True))
    if missing := sorted(set(names) - set(by_name)):
        raise ValueError(f"there are no inverse indices of features {missing}, only of {list(by_name)}")
    return by_name


def examples_of_bags(features: KeyedJaggedTensor, names: Collection[str]) -> dict[str, Tensor] | None:
    """Return the inverse indices of a batch for a collection that is not sharded, None if it has none.

    Raises:
        ValueError: features have batches of different sizes, and there are no inverse indices.
    """
    if features.inverse_indices_or_none() is not None:
        return inverse_indices(features, names)
    sizes = {
        key: n for key, n in zip(features.keys(), features.stride_per_key(), strict=True) if key in names
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"features have batches of different sizes, {sizes}, and no inverse indices")
    return None


def expand(
    features: Sequence[JaggedTensor], index: Tensor | None, inverse: Sequence[Tensor]
) -> tuple[list[JaggedTensor], Tensor]:
    """Repeat bags for the examples that have them.

    Args:
        features: the bags of each feature of a table.
        index: (num_ids,) integers that belong to the ids of all features, one after the other; None for their
            places.
        inverse: of each feature (batch_size,) which bag each example has.

    Returns:
        The bags of the examples, and their integers of ``index``, (num_expanded_ids,).
    """
    bags, found = [], []
    sizes = [feature.values().numel() for feature in features]
    if index is None:
        index = torch.arange(sum(sizes), device=features[0].values().device)
    parts = index.split(sizes)
    for feature, part, which in zip(features, parts, inverse, strict=True):
        lengths = feature.lengths()
        expanded = lengths.index_select(0, which)  # raises for a bag that does not exist; fbgemm reads it
        ids, part = (
            torch.ops.fbgemm.permute_1D_sparse_data(which.int(), lengths, values.contiguous())[1]
            for values in (feature.values(), part)
        )
        bags.append(JaggedTensor(values=ids, lengths=expanded))
        found.append(part)
    return bags, torch.cat(found)


def check_pooling(tables: Sequence[EmbeddingBagConfig], is_weighted: bool) -> None:
    """Raise ValueError for a pooling that is neither a sum nor a mean without weights."""
    for config in tables:
        if config.pooling not in MODES or (is_weighted and config.pooling is not PoolingType.SUM):
            weighted = "weighted " if is_weighted else ""
            raise ValueError(f"frozen table {config.name}: there is no {weighted}pooling {config.pooling}")


def jagged(vectors: Tensor, feature: JaggedTensor, need_indices: bool) -> JaggedTensor:
    """Return the vectors (num_ids, dim) of a feature in the form that EmbeddingCollection gives them."""
    weights = feature.values() if need_indices else None
    return JaggedTensor(values=vectors, lengths=feature.lengths(), weights=weights)


def pool(
    vectors: Tensor, index: Tensor, bags: JaggedTensor, config: EmbeddingBagConfig, is_weighted: bool
) -> Tensor:
    """Return pooled vectors (batch_size, dim), float32.

    Args:
        vectors: (num_vectors, dim).
        index: (num_ids,) which of the vectors each id of the bags has.
        bags: lengths of the bags, and weights where they are weighted.
        config: of the table.
        is_weighted: whether the weights are used.
    """
    weights = bags.weights().float() if is_weighted else None
    if not index.numel():
        zeros = vectors.new_zeros(bags.lengths().numel(), config.embedding_dim, dtype=torch.float32)
        return zeros if weights is None else zeros + weights.sum()
    offsets = bags.offsets().to(index.dtype)
    return F.embedding_bag(
        index, vectors.float(), offsets, mode=MODES[config.pooling], per_sample_weights=weights,
        include_last_offset=True,
    )  # fmt: skip


def keyed(
    pooled: list[Tensor],
    tables: Sequence[EmbeddingBagConfig],
    output_dtype: torch.dtype,
    inverse: dict[str, Tensor] | None = None,
) -> KeyedTensor:
    """Join pooled vectors of all features of all tables.

    Args:
        pooled: by feature (batch_size, dim), or (num_bags, dim) where there are inverse indices.
        tables: their configs.
        output_dtype: of the result.
        inverse: by feature (batch_size,) which bag each example has.
    """
    if inverse is not None:
        features = [name for config in tables for name in config.feature_names]
        pooled = [bags.index_select(0, inverse[key]) for key, bags in zip(features, pooled, strict=True)]
    names = [name for names in get_embedding_names_by_table(list(tables)) for name in names]
    dims = [config.embedding_dim for config in tables for _ in config.feature_names]
    values = torch.cat(pooled, dim=1).to(output_dtype)
    return KeyedTensor(keys=names, length_per_key=dims, values=values)
