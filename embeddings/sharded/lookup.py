"""What a lookup checks and returns, sharded or not: rows in range, jagged vectors, pooled and keyed bags."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

MODES = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


def check_rows(rows: Tensor, config: BaseEmbeddingConfig, ascending: bool = False) -> None:
    """Raise IndexError unless rows (n,) are in the table; on a GPU, fail the kernel that finds it.

    TorchRec itself maps a row that is out of range to another one, and to which depends on the world size.
    """
    if not rows.numel():
        return
    low, high = (rows[0], rows[-1]) if ascending else rows.aminmax()
    if rows.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < config.num_embeddings))
    elif low < 0 or high >= config.num_embeddings:
        wrong = int(low if low < 0 else high)
        raise IndexError(
            f"frozen table {config.name}: row {wrong} is not within 0:{config.num_embeddings}; features are "
            f"rows, and unknown ids are row 0 (see ItemIndex)"
        )


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
    pooled: list[Tensor], tables: Sequence[EmbeddingBagConfig], output_dtype: torch.dtype
) -> KeyedTensor:
    """Join pooled vectors (batch_size, dim) of all features of all tables, as ``output_dtype``."""
    names = [name for names in get_embedding_names_by_table(list(tables)) for name in names]
    dims = [config.embedding_dim for config in tables for _ in config.feature_names]
    values = torch.cat(pooled, dim=1).to(output_dtype)
    return KeyedTensor(keys=names, length_per_key=dims, values=values)
