"""Local rows of a frozen table, and the lookup that reads them.

The rows are plain tensors: neither parameters nor buffers, so that no optimizer, no gradient, no checkpoint
and no broadcast ever sees them. A lookup is one ``index_select``, which on a CPU is several times faster
than a table-batched embedding of the same rows.

Not here: int8 rows and rows in managed (UVM) memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ROW_DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16}


class FrozenRows(BaseEmbedding):
    """The rows that this rank owns of the frozen tables of one group; they start as zeros.

    Args:
        config: the group's tables with their local shards.
        device: where the rows live.

    Raises:
        ValueError: a table's data type is neither FP32 nor FP16.
    """

    def __init__(self, config: GroupedEmbeddingConfig, device: torch.device | None) -> None:
        super().__init__()
        self._config = config
        self._features = [table.num_features() for table in config.embedding_tables]
        self._rows: list[Tensor] = []
        for table in config.embedding_tables:
            if table.data_type not in ROW_DTYPES:
                raise ValueError(
                    f"frozen table {table.name}: data type {table.data_type} is not FP32 or FP16"
                )
            dtype = ROW_DTYPES[table.data_type]
            self._rows.append(torch.zeros(table.local_rows, table.local_cols, dtype=dtype, device=device))

    @property
    def config(self) -> GroupedEmbeddingConfig:
        return self._config

    def tables(self) -> Iterator[tuple[ShardedEmbeddingTable, Tensor]]:
        """Yield each table's description and its local rows (local_rows, dim)."""
        yield from zip(self._config.embedding_tables, self._rows, strict=True)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Return the vectors (num_ids, dim), as they are stored, of the local row numbers in ``features``."""
        if len(self._rows) == 1:
            return self._rows[0].index_select(0, features.values())
        split = features.split(self._features)
        return torch.cat(
            [rows.index_select(0, part.values()) for rows, part in zip(self._rows, split, strict=True)]
        )

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        return {} if destination is None else destination

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from ()

    def named_parameters_by_table(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from ()

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    def flush(self) -> None:
        """Nothing is cached elsewhere."""

    def purge(self) -> None:
        """Nothing is cached elsewhere."""


class FrozenLookup(GroupedEmbeddingsLookup):
    """Looks up frozen rows, without recording a gradient."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> BaseEmbedding:
        return FrozenRows(config, device)

    @torch.no_grad()
    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        return super().forward(sparse_features)
