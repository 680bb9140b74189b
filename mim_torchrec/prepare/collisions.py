"""Ids that are text have numbers of their own, over all tables and parts of a data set.

`stable_ids` compares the texts of one column. Here the numbers of all texts are compared, 8 bytes an id, and
texts are looked for only where two have one number.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis.expr.types import Table

from mim_torchrec.data.ids import IdCollision, stable_ids
from mim_torchrec.prepare.engines import Engine

ROWS = 200_000


def refuse_collisions(engine: Engine, role: str, tables: list[Table]) -> None:
    """See that no two ids of a kind have the same number.

    Args:
        engine: that has the tables.
        role: of the ids, "user", for the message.
        tables: of one column `id` each, text; an id may be there several times.

    Raises:
        IdCollision: two have; the message has both.
    """
    whole = (tables[0].union(*tables[1:]) if len(tables) > 1 else tables[0]).distinct()
    numbers = [ids.to_numpy() for _, ids in _numbered(engine, whole)]
    ordered = np.sort(np.concatenate([np.zeros(0, np.int64), *numbers]))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return
    number = pa.scalar(twice[0])
    found = [texts.filter(pc.equal(ids, number)) for texts, ids in _numbered(engine, whole)]
    one, other = sorted(text for texts in found for text in texts.to_pylist())[:2]
    raise IdCollision(
        f"the {role} ids {one!r} and {other!r} have the same 64-bit number {twice[0]}; rename one"
    )


def _numbered(engine: Engine, table: Table) -> Iterator[tuple[pa.Array, pa.Int64Array]]:
    """Ids that are there, with their numbers."""
    for batch in engine.batches(table.filter(table["id"].notnull()), ROWS):
        texts = batch["id"].combine_chunks()
        yield texts, stable_ids(texts)
