"""Compaction: write a new base table with the windows applied, for readers that are behind or new.

Memory holds the changes of the windows and one chunk of the base table. `Transport.forget` removes windows
from the log.
"""

from pathlib import Path

import torch
from torch import Tensor

from mim_torchrec.embeddings.table.manifest import Manifest
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.shards import CHUNK
from mim_torchrec.embeddings.table.writer import TableWriter
from mim_torchrec.embeddings.windows.transport import Transport, open_log
from mim_torchrec.embeddings.windows.window import is_due


def compact(table: str | Path, log: str | Path, out: str | Path) -> Manifest:
    """Write the table that a reader has after applying a log's windows.

    Args:
        table: the base.
        log: of the same `table_version`: a directory, or a URL of Redis.
        out: directory of the new table; must not exist.

    Returns:
        The new table's manifest: `seq` is that of the last window. The capacity stays that of the base, or is
        the number of rows where that is more.

    Raises:
        VersionMismatch: the log is of another version than the table.
        WindowGap: windows between the base and the log are gone.
        MalformedWindow: a window is damaged.
        TableError: `out` exists. Nothing is left at `out` after any error.
    """
    base = Table.open(table)
    old = base.manifest
    changed, seq = changes(open_log(log, old.table_version), old)
    names = torch.tensor(sorted(changed), dtype=torch.int64)
    ids = base.row_index().ids
    kept = ~torch.isin(ids, names)
    written = {item: row for item, row in changed.items() if row is not None}
    new = torch.tensor(sorted(written), dtype=torch.int64)
    rows = int(kept.sum()) + new.numel()
    writer = TableWriter(
        out, table_version=old.table_version, dim=old.dim, dtype=old.dtype, encoder=old.encoder,
        spare_rows=max(old.capacity - rows, 0), seq=seq, by_number=old.by_number,
    )  # fmt: skip
    try:
        for start in range(0, ids.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            if kept[part].any():
                stored = base.read(ids[part][kept[part]])
                writer.write_shard(ids[part][kept[part]], stored)
        for part in new.split(CHUNK):
            if part.numel():
                writer.write_shard(part, torch.stack([written[item] for item in part.tolist()]))
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def changes(log: Transport, base: Manifest, last: int | None = None) -> tuple[dict[int, Tensor | None], int]:
    """What a log changes of a base: the vector of every item as the base stores it, None where it is taken
    down; and the number of the last window, at most `last`.

    Raises:
        WindowGap: windows between the two are gone.
    """
    changed: dict[int, Tensor | None] = {}
    seq = base.seq
    for window in log.after(seq):
        if last is not None and window.seq > last:
            break
        if is_due(window.table_version, window.seq, base.table_version, seq):
            changed |= dict(zip(window.ids.tolist(), window.stored_as(base.dtype), strict=True))
            changed |= dict.fromkeys(window.removed.tolist())
            seq = window.seq
    return changed, seq
