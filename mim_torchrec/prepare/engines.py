"""The engines that run the relational program: DuckDB in this process, or Spark.

An engine reads files, runs an expression and keeps its result, DuckDB as a table that spills to the scratch
folder, Spark as Parquet there, or hands it out in batches. All else is written once, in Ibis.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import fsspec
import ibis
import ibis.expr.datatypes as dt
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.operations import DatabaseTable
from ibis.expr.types import Table, Value

from mim_torchrec.data.errors import DataError
from mim_torchrec.extras import needs
from mim_torchrec.prepare.files import Files, is_url

INTEGERS: Mapping[str, str] = {"int8": "TINYINT", "int32": "INTEGER", "int64": "BIGINT"}
SETTINGS = "SET TimeZone = 'UTC'; SET preserve_insertion_order = false"
log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the program needs of an engine."""

    name: str

    def read(self, files: Files) -> Table:
        """The rows of files; columns of CSV are text."""

    def keep(self, table: Table, name: str) -> Table:
        """Run an expression and keep its rows under a new name."""

    def forget(self, name: str) -> None:
        """Delete what is kept under a name."""

    def batches(self, table: Table, rows: int) -> Iterator[pa.Table]:
        """Run an expression and hand out its rows, in order, about so many at a time."""

    def fetch(self, table: Table) -> pa.Table:
        """Run an expression and return all of its rows, in order."""

    def count(self, table: Table) -> int:
        """How many rows an expression has."""

    def micros(self, column: Value) -> Value:
        """Microseconds since 1970 of timestamps; those without a zone count as if they were UTC."""

    def close(self) -> None:
        """End it."""


@ibis.udf.scalar.builtin
def epoch_us(time) -> int:  # type: ignore[empty-body]
    """DuckDB's."""


@ibis.udf.scalar.builtin
def unix_micros(time) -> int:  # type: ignore[empty-body]
    """Spark's."""


class DuckDB:
    """DuckDB in this process, which spills to the scratch folder.

    Args:
        scratch: folder, for this run alone.
        memory: limit, such as "4GB".
        threads: of a query.
    """

    name = "duckdb"

    def __init__(self, scratch: Path, memory: str, threads: int) -> None:
        self._scratch = scratch
        self._connection = ibis.duckdb.connect(
            threads=threads, memory_limit=memory, temp_directory=str(scratch / "spill")
        )
        self._connection.raw_sql(SETTINGS)

    def read(self, files: Files) -> Table:
        for protocol in {path.partition("://")[0] for path in files.paths if is_url(path)}:
            self._connection.register_filesystem(fsspec.filesystem(protocol))
        paths = f"[{', '.join(map(_quoted, files.paths))}]"
        if files.kind == "parquet":
            return self._view(f"read_parquet({paths}, hive_partitioning = false)")
        options = "all_varchar = true, header = true, delim = ',', quote = '\"', hive_partitioning = false"
        return self._view(f"read_csv({paths}, {options})")

    def keep(self, table: Table, name: str) -> Table:
        columns = [_typed(column, kind) for column, kind in table.schema().items()]
        query = f"SELECT {', '.join(columns)} FROM ({self._connection.compile(table)})"
        self._connection.raw_sql(f'CREATE OR REPLACE TABLE "{name}" AS {query}')
        return self._connection.table(name)

    def forget(self, name: str) -> None:
        self._connection.raw_sql(f'DROP TABLE "{name}"')

    def batches(self, table: Table, rows: int) -> Iterator[pa.Table]:
        cursor = self._connection.con.cursor()  # because several results are read at once
        cursor.execute(SETTINGS)
        # what Ibis calls for this, DuckDB 2 no longer has
        result = cursor.sql(self._connection.compile(table))
        for batch in result.to_arrow_reader(rows):
            yield pa.Table.from_batches([batch])

    def fetch(self, table: Table) -> pa.Table:
        rows = self._connection.con.sql(self._connection.compile(table)).to_arrow_table()
        return rows.cast(table.schema().to_pyarrow())

    def count(self, table: Table) -> int:
        kept = isinstance(table.op(), DatabaseTable)  # Ibis takes longer to say it than DuckDB to count
        source = f'"{table.get_name()}"' if kept else f"({self._connection.compile(table)})"
        ((rows,),) = self._connection.con.sql(f"SELECT count(*) FROM {source}").fetchall()
        return int(rows)

    def micros(self, column: Value) -> Value:
        return epoch_us(column)

    def close(self) -> None:
        self._connection.disconnect()

    def _view(self, source: str) -> Table:
        name = ibis.util.gen_name("mim_prepare")
        self._connection.raw_sql(f'CREATE VIEW "{name}" AS SELECT * FROM {source}')
        return self._connection.table(name)


class Spark:
    """Spark: the session that `spark-submit` has set up, or one in this process.

    Args:
        scratch: folder that all executors see, for this run alone.
        memory: of the driver of a session in this process.
        threads: likewise.
    """

    name = "spark"

    def __init__(self, scratch: Path, memory: str, threads: int) -> None:
        with needs("spark"):
            from pyspark.sql import SparkSession
        if shutil.which("java") is None:
            raise DataError("Spark needs a Java runtime: apt-get install openjdk-17-jre-headless")
        self._scratch = scratch
        self._had_session = SparkSession.getActiveSession() is not None
        builder = SparkSession.builder.appName("mim prepare")
        settings: dict[str, Any] = {
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.caseSensitive": "true",
            "spark.sql.ansi.enabled": "true",
        }
        if not self._had_session:
            settings |= {
                "spark.master": f"local[{threads}]",
                "spark.driver.memory": memory.lower().removesuffix("b"),
                "spark.sql.shuffle.partitions": 4 * threads,
                "spark.ui.enabled": "false",
                "spark.local.dir": str(scratch / "spill"),
                "spark.sql.warehouse.dir": str(scratch / "warehouse"),
            }
        for key, value in settings.items():
            builder = builder.config(key, value)
        self._session = builder.getOrCreate()
        self._session.sparkContext.setLogLevel("ERROR")
        self._connection = ibis.pyspark.connect(self._session)

    def read(self, files: Files) -> Table:
        reader = self._session.read
        if files.kind == "parquet":
            frame = reader.parquet(*files.paths)
        else:
            options: dict[str, bool | str] = {
                "header": True,
                "inferSchema": False,
                "multiLine": True,
                "escape": '"',
            }
            frame = reader.options(**options).csv(list(files.paths))
        return self._view(frame)

    def keep(self, table: Table, name: str) -> Table:
        path = str(self._scratch / name)
        self._session.sql(self._connection.compile(table)).write.parquet(path)
        return self._view(self._session.read.parquet(path))

    def forget(self, name: str) -> None:
        shutil.rmtree(self._scratch / name)

    def batches(self, table: Table, rows: int) -> Iterator[pa.Table]:
        path = self._scratch / f"batches-{ibis.util.gen_name('batches')}"
        self._session.sql(self._connection.compile(table)).write.parquet(str(path))
        for file in sorted(path.glob("part-*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(rows):
                yield pa.Table.from_batches([batch])
        shutil.rmtree(path)

    def fetch(self, table: Table) -> pa.Table:
        # the way of Ibis leads through pandas, where integers beside nulls lose digits
        rows = self._session.sql(self._connection.compile(table)).toArrow()
        return rows.cast(table.schema().to_pyarrow())

    def count(self, table: Table) -> int:
        return numbers(self, table.agg(rows=table.count()))["rows"]

    def micros(self, column: Value) -> Value:
        return unix_micros(column.cast(dt.Timestamp(timezone="UTC")))

    def close(self) -> None:
        if not self._had_session:
            self._session.stop()

    def _view(self, frame: Any) -> Table:
        name = ibis.util.gen_name("mim_prepare")
        frame.createOrReplaceTempView(name)
        return self._connection.table(name)


def numbers(engine: Engine, row: Table) -> dict[str, int]:
    """The only row of an expression of integers; null is 0."""
    return {name: int(value or 0) for name, value in engine.fetch(row).to_pylist()[0].items()}


def _typed(column: str, kind: dt.DataType) -> str:
    """A column in the type that Ibis takes it for: DuckDB counts and sums in wider ones."""
    name = f'"{column}"'
    return f"CAST({name} AS {INTEGERS[str(kind)]}) AS {name}" if str(kind) in INTEGERS else name


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


ENGINES: dict[str, type[DuckDB] | type[Spark]] = {"duckdb": DuckDB, "spark": Spark}
