"""Two text ids with one number are found wherever they are, and the error names both."""

import hashlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ibis.expr.types import Table

from mim_torchrec.data.ids import IdCollision
from mim_torchrec.embeddings import stable_ids
from mim_torchrec.prepare.collisions import refuse_collisions
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.engines import DuckDB
from mim_torchrec.prepare.files import find_files
from mim_torchrec.prepare.run import prepare
from tests.raw_logs import Log, make_log, write_log


def without_requests(log: Log) -> tuple[str, str]:
    """A user of requests, and one that has only clicked."""
    click = next(row for row in log.events["click"] if row["user"] is not None)
    log.events["click"].append(click | {"user": 5000, "request": None})
    return "user-100", "user-5000"


def searched(log: Log) -> tuple[str, str]:
    """A request that showed items, and a search that showed none."""
    log.events["image_search"].append(log.events["image_search"][0] | {"request": 7000})
    return "request-10", "request-7000"


def queries(log: Log) -> tuple[str, str]:
    return "query-1", "query-6"


def items(log: Log) -> tuple[str, str]:
    return "item-3", "item-29"


@pytest.mark.parametrize("two", [without_requests, searched, queries, items])
def test_both_originals_are_named(tmp_path, monkeypatch, two):
    log = make_log(requests=60)
    one, other = two(log)

    def digest(text: str) -> bytes:
        return hashlib.blake2b((one if text == other else text).encode(), digest_size=8).digest()

    monkeypatch.setattr(stable_ids, "_digest", digest)
    mapping = write_log(log, tmp_path / "raw", text=True)
    with pytest.raises(
        IdCollision, match=f"'{one}' and '{other}' have the same 64-bit number|'{other}' and '{one}'"
    ):
        prepare(PrepareConfig(mapping=mapping, out=tmp_path / "out", threads=1, memory="500MB"))
    assert not list(tmp_path.glob("out*"))


class OneByOne(DuckDB):
    """Hands out rows alone."""

    def batches(self, table: Table, rows: int) -> Iterator[pa.Table]:
        for batch in super().batches(table, rows):
            yield from (batch.slice(k, 1) for k in range(len(batch)))


def test_they_are_found_in_different_batches_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(stable_ids, "_digest", lambda text: text[:1].encode().rjust(8, b"\0"))
    engine = OneByOne(tmp_path, "200MB", 1)
    tables = []
    for name, ids in {"a": ["apple", "cherry", "apple", None], "b": ["bean", "apple"], "c": ["beet"]}.items():
        pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), tmp_path / f"{name}.parquet")
        tables.append(engine.read(find_files(name, f"{name}.parquet", tmp_path, ["id"])))
    try:
        refuse_collisions(engine, "user", tables[:2])
        with pytest.raises(IdCollision, match="the user ids 'bean' and 'beet' have the same 64-bit number"):
            refuse_collisions(engine, "user", tables)
    finally:
        engine.close()
