"""Permute the vectors of a table among its ids: the negative control of every claim about content.

A permuted table has the same vectors, so the same norms and the same distribution, and says nothing about the
items. A model that gains from it as much as from the real table does not gain from content.
"""

from pathlib import Path

import torch

from mim_torchrec.embeddings.table.format import Manifest, Table, TableWriter


def permute(src: str | Path, dst: str | Path, seed: int) -> Manifest:
    """Write a copy of a table whose vectors are permuted among the ids.

    Args:
        src: a finished table.
        dst: directory of the new table; must not exist. Its table_version is
            ``permuted-<seed>-<version of src>``.
        seed: seed of the permutation.

    Returns:
        The new table's manifest; spare rows and seq are those of ``src``.
    """
    source = Table.open(src)
    old = source.manifest
    version = f"permuted-{seed}-{old.table_version}"
    encoder = {**old.encoder, "permuted": {"seed": seed, "table_version": old.table_version}}
    writer = TableWriter(
        dst, table_version=version, dim=old.dim, dtype=old.dtype, encoder=encoder,
        spare_rows=old.spare_rows, seq=old.seq, by_number=old.by_number,
    )  # fmt: skip
    order = torch.randperm(old.rows, generator=torch.Generator().manual_seed(seed))
    ids = source.row_index().ids
    start = 0
    for shard in old.shards:
        stop = start + shard.rows
        writer.write_shard(ids[start:stop], source.read(ids[order[start:stop]]))
        start = stop
    return writer.finish()
