"""Bytes that embedding lookups move, which no count of operations holds.

Of a table: the rows that are read, and in training the rows of gradients that come back and the distinct
rows that the fused optimizer reads and writes, with its one number a row (row-wise Adagrad). Of an embedding
inside a model, as of tokens: the rows read, and in training their gradients and the dense gradient that torch
writes of the whole table. Ids and caches are not counted.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

aten = torch.ops.aten
FLOAT, HALF = 4, 2


def table_bytes(
    tables: Iterable[BaseEmbeddingConfig], sparse: KeyedJaggedTensor, row_bytes: int, trained: bool
) -> int:
    """Bytes that the lookups of a batch move.

    Args:
        tables: whose features are looked up.
        sparse: the batch, rows by feature.
        row_bytes: of an element of a row.
        trained: count what the backward pass moves as well, in float32.
    """
    total = 0
    for table in tables:
        rows = torch.cat([sparse[name].values() for name in table.feature_names])
        total += rows.numel() * table.embedding_dim * row_bytes
        if trained:
            total += rows.numel() * table.embedding_dim * FLOAT
            total += 2 * rows.unique().numel() * (table.embedding_dim + 1) * FLOAT
    return total


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.embedding.default:
            self.bytes += out.nbytes
        elif func is aten.embedding_dense_backward.default:
            self.bytes += args[0].nbytes + out.nbytes
        return out


def embedding_bytes(call: Callable[[], Any]) -> int:
    """Bytes that `torch.nn.Embedding` moves in a call."""
    with _Traffic() as traffic:
        call()
    return traffic.bytes
