"""`mim prepare` on Spark: every row is the one that DuckDB gives."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.run import prepare
from tests.raw_logs import add_versions, make_log, write_log

pytest.importorskip("pyspark")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs a Java runtime"),
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One log with everything in it, prepared by each engine: from CSV with text ids, and from Parquet."""
    root = tmp_path_factory.mktemp("engines")
    log = make_log()
    add_versions(log)
    found = {}
    for form, text in (("csv", True), ("parquet", False)):
        mapping = write_log(log, root / form, form=form, text=text, versions=True)
        for engine in ("duckdb", "spark"):
            out = root / f"{form}-{engine}"
            report = prepare(PrepareConfig(
                mapping=mapping, out=out, engine=engine, memory="1GB", threads=2, max_behaviors=4,
                negative_rate=0.5, hard_negatives="category", second_label="purchase", second_window=100,
            ))  # fmt: skip
            found[form, engine] = (out, report)
    return found


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_both_engines_write_the_same_files(outputs, form):
    (ours, _), (theirs, _) = outputs[form, "duckdb"], outputs[form, "spark"]
    names = sorted(path.relative_to(ours) for path in ours.rglob("*.parquet"))
    assert names == sorted(path.relative_to(theirs) for path in theirs.rglob("*.parquet"))
    assert {name.parts[0] for name in names} >= {"requests", "items", "pairs", "vocabularies"} - {"pairs"}
    for name in names:
        one, other = (pq.read_table(root / name, partitioning=None) for root in (ours, theirs))
        assert pa.Table.equals(one, other), name


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_both_engines_count_the_same(outputs, form):
    (_, ours), (_, theirs) = outputs[form, "duckdb"], outputs[form, "spark"]
    assert ours == theirs
