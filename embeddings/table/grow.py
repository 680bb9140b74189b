"""Make room for new items: the same table with more spare rows, every row in its place.

The shards are copied, or linked, as they are. Not here: rows that a live table has taken for new items; those
are in its own updates, which are applied again to the table that this writes.
"""

import os
from pathlib import Path

from mim_torchrec.embeddings.table.manifest import Manifest, ShardInfo, TableError
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.writer import TableWriter


def grow(src: str | Path, dst: str | Path, spare_rows: int, *, link: bool = False) -> Manifest:
    """Write a table with more spare rows; rows, bytes, ``table_version`` and ``seq`` stay as they are.

    Args:
        src: a finished table.
        dst: directory of the new table; must not exist.
        spare_rows: all rows that the new table keeps free, more than ``src`` does.
        link: give the shards a second name (hard link) instead of copying them: at once and without disk, but
            the two tables then share their bytes, and none is read to compare its checksum.

    Returns:
        The new table's manifest.

    Raises:
        OutputExists: ``dst`` exists.
        TableError: ``spare_rows`` is not more than that of ``src``, or the file system cannot
            link from ``src`` to ``dst``. Nothing is left at ``dst``.
        ChecksumMismatch: a copied shard is not as it was written.
    """
    source = Table.open(src, verify=False)
    old = source.manifest
    if spare_rows <= old.spare_rows:
        raise TableError(
            f"{src}: has {old.spare_rows} spare rows, and {spare_rows} is not more; --spare-rows "
            f"is the total of the new table; give at least {old.spare_rows + 1}"
        )
    writer = TableWriter(
        dst, table_version=old.table_version, dim=old.dim, dtype=old.dtype, encoder=old.encoder,
        spare_rows=spare_rows, seq=old.seq, by_number=old.by_number,
    )  # fmt: skip
    try:
        for info in old.shards:
            if link:
                _link(source.path, writer, info)
            else:
                writer.copy_shard(source.path, info)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def _link(source: Path, writer: TableWriter, info: ShardInfo) -> None:
    try:
        os.link(source / info.file, writer.partial / info.file)
    except OSError as error:
        raise TableError(
            f"{source / info.file}: cannot be linked to {writer.path} ({error.strerror}); both must be on "
            f"one file system that has hard links; leave out --link to copy"
        ) from None
    writer.shards.append(info)
