"""What differs between two tables, a chunk of rows at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mim_torchrec.embeddings.table.quantize import cosine_errors
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.shards import CHUNK

NAMED = 10  # items of a difference that are named


@dataclass(frozen=True, kw_only=True)
class TableDiff:
    """What differs between two tables.

    Args:
        same_version: whether both are of one `table_version`, so that vectors can be compared.
        seq: of the two.
        rows: of the two.
        only_first: items that only the first has.
        only_second: items that only the second has.
        examples: some items of each of the two.
        changed: items of both whose vectors differ; None where versions do.
        max_cosine_error: the largest 1 - cos of the two vectors of an item; None likewise.
    """

    same_version: bool
    seq: tuple[int, int]
    rows: tuple[int, int]
    only_first: int
    only_second: int
    examples: tuple[tuple[int, ...], tuple[int, ...]]
    changed: int | None
    max_cosine_error: float | None


def diff(first: str | Path, second: str | Path) -> TableDiff:
    """Compare two tables by id.

    Raises:
        TableError: one of them is no finished table, or holds a vector that is not finite.
    """
    tables = [Table.open(path) for path in (first, second)]
    one, two = (table.manifest for table in tables)
    ids, others = (table.row_index().ids for table in tables)
    only = ids[~torch.isin(ids, others)], others[~torch.isin(others, ids)]
    same_version = one.table_version == two.table_version
    changed, error = 0, 0.0
    if same_version:
        for part in ids[torch.isin(ids, others)].split(CHUNK):
            vectors, other_vectors = (table.read_float(part) for table in tables)
            differ = (vectors != other_vectors).any(1)
            changed += int(differ.sum())
            if differ.any():
                error = max(error, float(cosine_errors(vectors[differ], other_vectors[differ]).max()))
    return TableDiff(
        same_version=same_version,
        seq=(one.seq, two.seq),
        rows=(one.rows, two.rows),
        only_first=only[0].numel(),
        only_second=only[1].numel(),
        examples=(tuple(only[0][:NAMED].tolist()), tuple(only[1][:NAMED].tolist())),
        changed=changed if same_version else None,
        max_cosine_error=error if same_version else None,
    )
