"""Frozen lookups inside a graph: ``torch.fx``, ``torch.compile`` and ``torch.export``.

A graph cannot hold what a lookup reads from its data: whether there are rows at all, which of them do not
exist, and which file a row is in. So the lookup is one operator, ``mim_torchrec::frozen_vectors``, which gets
the stored rows as tensors beside the rows asked for. Pooling is written in operators that graphs can hold.

The rows are no part of what is compiled. In one process a graph refers to the tensors of the collection, and
sees their updates. An exported program would take a copy of them into its file. Export :class:`RowsAsInputs`
instead: the rows are then an argument of the program.

Not here: graphs of sharded collections, whose exchanges between ranks stay outside graphs, and rows behind a
cache, which changes when it is read.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.fx
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from mim_torchrec.embeddings.sharded.lookup import jagged, keyed
from mim_torchrec.embeddings.sharded.rows import DenseRows, MappedRows, RowStore
from mim_torchrec.embeddings.table.quantize import DTYPES


class TracedTable(Protocol):
    """What a graph needs of a frozen table. ``lifted``: its rows, where they are an argument of the graph."""

    config: BaseEmbeddingConfig
    store: RowStore
    lifted: list[Tensor] | None


def is_traced(features: KeyedJaggedTensor) -> bool:
    """Return whether a graph is being made of the call.

    Raises:
        TypeError: it is one of ``torch.jit.trace``, which would keep the lengths of its example.
    """
    if torch.compiler.is_compiling() or isinstance(features, torch.fx.Proxy):
        return True
    if torch.jit.is_tracing():
        raise TypeError("torch.jit.trace fixes the numbers of ids in a frozen lookup; use torch.export")
    return False


@torch.library.custom_op("mim_torchrec::frozen_vectors", mutates_args=())
def frozen_vectors(spans: list[Tensor], rows: Tensor, dtype: str, dim: int, table: str) -> Tensor:
    """Return the vectors (num_ids, dim) of rows (num_ids,) int64.

    Args:
        spans: all rows as they are stored, in order, each (n, stored_width).
        rows: the rows asked for.
        dtype: how they are stored, a key of ``quantize.DTYPES``.
        dim: length of a vector.
        table: its name, for errors.

    Raises:
        IndexError: a row does not exist; of rows on a CPU. On a GPU the kernel fails.
    """
    num_rows = sum(span.shape[0] for span in spans)
    if rows.numel():
        low, high = rows.aminmax()
        if rows.device.type != "cpu":
            torch._assert_async((low >= 0) & (high < num_rows))
        elif low < 0 or high >= num_rows:
            wrong = int(low if low < 0 else high)
            raise IndexError(
                f"frozen table {table}: row {wrong} is not within 0:{num_rows}; unknown ids are row 0"
            )
    starts = [sum(span.shape[0] for span in spans[:k]) for k in range(len(spans))]
    found = MappedRows(dtype, num_rows, dim, list(zip(starts, spans, strict=True))).vectors(rows)
    return found.clone() if any(found.data_ptr() == span.data_ptr() for span in spans) else found


@frozen_vectors.register_fake
def _(spans: list[Tensor], rows: Tensor, dtype: str, dim: int, table: str) -> Tensor:
    return rows.new_empty(rows.shape[0], dim, dtype=vector_dtype(dtype))


def vector_dtype(dtype: str) -> torch.dtype:
    """Return the type of the vectors of stored rows: float32 where they are quantized."""
    return DTYPES[dtype] if DTYPES[dtype].is_floating_point else torch.float32


def unpooled(
    tables: Sequence[TracedTable],
    names: Sequence[Sequence[str]],
    features: KeyedJaggedTensor,
    need_indices: bool,
    output_dtype: torch.dtype,
) -> dict[str, JaggedTensor]:
    """Look up as ``FrozenEmbeddingCollection`` does.

    Args:
        tables: of the collection.
        names: what each table's features are called in the result.
        features: rows.
        need_indices: whether the result has the rows as weights.
        output_dtype: of the vectors.
    """
    by_feature = _one_batch_size(features).to_dict()
    found = {}
    for table, own in zip(tables, names, strict=True):
        for key, name in zip(table.config.feature_names, own, strict=True):
            vectors = _vectors(table, by_feature[key].values().long()).to(output_dtype)
            found[name] = jagged(vectors, by_feature[key], need_indices)
    return found


def pooled(tables: Sequence[TracedTable], features: KeyedJaggedTensor, is_weighted: bool) -> KeyedTensor:
    """Look up and pool as ``FrozenEmbeddingBagCollection`` does."""
    by_feature = _one_batch_size(features).to_dict()
    configs, found = [], []
    for table in tables:
        config = table.config
        assert isinstance(config, EmbeddingBagConfig)
        configs.append(config)
        for key in config.feature_names:
            bags = by_feature[key]
            rows = bags.values().long()
            vectors = _vectors(table, rows).float()
            if is_weighted:
                vectors = vectors * bags.weights().float()[:, None]
            found.append(_bags(vectors, bags.lengths(), config.pooling is PoolingType.MEAN))
    return keyed(found, configs)


@torch.fx.wrap
def _one_batch_size(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Refuse batches of variable size per feature, also where a graph is run; not traced by ``torch.fx``."""
    if features.inverse_indices_or_none() is not None:
        raise ValueError(
            "a graph of a frozen lookup takes one batch size for all features, no inverse indices"
        )
    return features


@torch.fx.wrap
def _bags(vectors: Tensor, lengths: Tensor, is_mean: bool) -> Tensor:
    """Pool vectors (num_ids, dim) into bags (batch_size, dim) of these lengths; an empty bag is zero."""
    lengths = lengths.long()
    bag = torch.arange(lengths.shape[0], device=lengths.device)
    bag = bag.repeat_interleave(lengths, output_size=vectors.shape[0])
    sums = vectors.new_zeros(lengths.shape[0], vectors.shape[1]).index_add(0, bag, vectors)
    return sums / lengths.clamp(min=1)[:, None] if is_mean else sums


def _vectors(table: TracedTable, rows: Tensor) -> Tensor:
    """The operator's node; ``rows`` may be a proxy."""
    store, name = table.store, table.config.name
    spans = table.lifted if table.lifted is not None else _spans(store, name)
    return torch.ops.mim_torchrec.frozen_vectors(spans, rows, store.dtype, store.dim, name)


def _spans(store: RowStore, name: str) -> list[Tensor]:
    if torch.compiler.is_exporting():
        raise ValueError(
            f"frozen table {name}: an exported program would hold a copy of its rows; export "
            f"RowsAsInputs(model), whose first argument they are"
        )
    return stored_spans(store, name)


def stored_spans(store: RowStore, name: str) -> list[Tensor]:
    """Return all rows of a store as they are stored, in order, as one or more tensors, not copies.

    Raises:
        TypeError: they are behind a cache.
    """
    if isinstance(store, DenseRows):
        return [store.tensor]
    if isinstance(store, MappedRows):
        return store.spans
    raise TypeError(
        f"frozen table {name}: rows in {type(store).__name__} are behind a cache, which no graph can hold; "
        f"keep the lookup out of the graph, or the rows in memory of the device"
    )
