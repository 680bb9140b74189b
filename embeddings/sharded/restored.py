"""What a checkpoint holds of a frozen table, or why it is not of this table: its version and its rows."""

import logging
from dataclasses import dataclass

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mim_torchrec.embeddings.table.manifest import NonFiniteVector, TableError, VersionMismatch
from mim_torchrec.embeddings.table.quantize import finite_rows
from mim_torchrec.embeddings.table.shards import CHUNK

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableState:
    """Which vectors rows hold: ``table_version`` (None before loading) and the last window applied."""

    table_version: str | None = None
    seq: int = 0


def check_state(name: str, found: TableState, expected: TableState) -> None:
    """Raise VersionMismatch if rows of a table are vectors of another encoder than a checkpoint's."""
    if found.table_version != expected.table_version:
        raise VersionMismatch(
            f"frozen table {name}: its rows are of table_version {found.table_version}, the checkpoint was "
            f"trained on {expected.table_version}; load that table"
        )
    if found.seq < expected.seq:
        log.warning("frozen table %s: the checkpoint had seen windows up to %d, the rows have those up to %d",
                    name, expected.seq, found.seq)  # fmt: skip


def own_rows(saved: Tensor | ShardedTensor, own: Tensor, *, name: str, first_row: int, total: int) -> Tensor:
    """Return the rows (num_rows, stored_width) of a checkpoint that belong into a process.

    Copying them would convert their type, cut a larger table off and repeat a single row, all in silence.

    Args:
        saved: all rows, or a rank's.
        own: the process's rows.
        name: of the table.
        first_row: of ``own``.
        total: rows of the table.

    Raises:
        TableError: they are of another number, width, type or division over ranks; or ``own`` is on the meta
            device.
    """
    if own.is_meta:
        raise TableError(
            f"frozen table {name} is on the meta device and cannot take the rows of a checkpoint: shard it "
            f"with frozen_sharders(), or make the collection with device='cpu'"
        )
    found, expected = (saved.dtype, tuple(saved.size())), (own.dtype, (total, own.shape[1]))
    if found != expected:
        raise TableError(
            f"frozen table {name}: the checkpoint has its rows as {found[0]} {found[1]}, the model as "
            f"{expected[0]} {expected[1]}; make the model of the table that the checkpoint was written with"
        )
    if not isinstance(saved, ShardedTensor):
        return saved[first_row : first_row + own.shape[0]]
    shards = [(shard.metadata.shard_offsets[0], shard.tensor) for shard in saved.local_shards()]
    at, rows = shards[0] if len(shards) == 1 else (first_row, own[:0])
    if len(shards) > 1 or at != first_row or rows.shape != own.shape:
        raise TableError(
            f"frozen table {name}: the checkpoint's rows are divided over other ranks; load it by "
            f"torch.distributed.checkpoint"
        )
    return rows


def check_restored(own: Tensor, dtype: str, *, name: str, first_row: int) -> None:
    """Raise :class:`NonFiniteVector` if restored rows hold NaN or infinity, for example after a conversion.

    Args:
        own: the process's rows (num_rows, stored_width).
        dtype: how they are stored, a key of ``quantize.DTYPES``.
        name: of the table.
        first_row: of ``own``.
    """
    for start in range(0, own.shape[0], CHUNK):
        wrong = (~finite_rows(own[start : start + CHUNK], dtype)).nonzero()
        if wrong.numel():
            row = first_row + start + int(wrong[0])
            raise NonFiniteVector(
                f"frozen table {name}: row {row} of the checkpoint holds NaN or infinity as {dtype}"
            )
