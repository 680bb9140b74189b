"""Tables in the user's columns as tables in ours: ids, and times in microseconds since 1970 (UTC).

Whatever cannot be read becomes null and is counted. Text that should be an integer id is an error, as are
wall-clock times without a zone beside times that have one.
"""

import decimal
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ibis
import pyarrow as pa
from ibis.expr.types import BooleanValue, IntegerValue, Table, Value

from mim_torchrec.data.errors import DataError
from mim_torchrec.prepare.engines import Engine, numbers
from mim_torchrec.prepare.files import Files, find_files
from mim_torchrec.prepare.local_time import LocalTime
from mim_torchrec.prepare.mapping import Ids, Source, columns_of

TIMES = ("ts", "arrived", "listed_at", "valid_from")
IDS = {"user": "user", "item": "item", "request": "request", "query": "query"}
TEXT = ("id", "title", "category")
PER_UNIT = {"s": 1_000_000, "ms": 1000, "us": 1}
ISO = r"^\s*\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}([.]\d{1,6})?)?)?\s*(Z|UTC|[+-]\d{2}:\d{2})?\s*$"
OFFSET = r"(Z|UTC|[+-]\d{2}:\d{2})\s*$"
NUMBER = r"^\s*-?\d{1,18}\s*$"
WIDE = "decimal(38, 0)"


@dataclass
class Raw:
    """A table in our columns, before any rule.

    Args:
        table: one column a role of the mapping, without images that are bytes.
        files: where it comes from.
        has_image_bytes: whether the images are bytes in the files.
        counts: `rows`, and how many have no or no readable value of each column.
        zones: how many times of each column had no zone of their own.
        complete: rows that have everything that is needed.
        last: the latest `ts`, 0 where there is none.
    """

    table: Table
    files: Files
    has_image_bytes: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    zones: dict[str, int] = field(default_factory=dict)
    complete: int = 0
    last: int = 0


class Reader:
    """Reads the tables of a mapping.

    Args:
        engine: that reads them.
        base: folder of the mapping.
        ids: how ids are kept.
    """

    def __init__(self, engine: Engine, base: Path, ids: Ids) -> None:
        self._engine, self._base, self._ids = engine, base, ids
        self._wall_clock: str | None = None
        self._zoned: str | None = None

    def read(self, place: str, source: Source, needed: Sequence[str] = ()) -> Raw:
        """Read a table, keep it, and count what is missing.

        Args:
            place: of the table in the mapping.
            source: the table.
            needed: columns without which a row is incomplete.

        Raises:
            DataError: files or columns are missing, types cannot be used, ids are no integers though the
                mapping says so, or some times have a zone and others have none.
        """
        columns = columns_of(source)
        wanted = [*columns.values(), *source.where]
        files = find_files(place, source.path, self._base, list(dict.fromkeys(wanted)))
        types = {role: files.type_of(column, role) for role, column in columns.items()}
        table = self._engine.read(files)
        for column, value in source.where.items():
            files.type_of(column, "where")
            table = table.filter(table[column].cast("string") == ibis.literal(str(value).lower()
                                 if isinstance(value, bool) else str(value)))  # fmt: skip
        values: dict[str, Value] = {}
        has_bytes = False
        for role, column in columns.items():
            kind = types[role]
            if role == "image" and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                has_bytes = True
            elif role in TIMES:
                values |= self._time(table[column], kind, files, role, column, source)
            else:
                values |= self._value(table[column], kind, files, role, column)
        name = place.replace(".", "-")
        raw = self._engine.keep(table.select(**values), f"raw-{name}")
        result = Raw(raw, files, has_bytes)
        self._count(result, source, columns, needed)
        result.table = self._without_zones(raw, source, columns, result)
        if result.zones.get("ts") and source.timezone not in (None, "UTC"):
            result.last = numbers(self._engine, result.table.agg(last=result.table.ts.max()))["last"]
        return result

    def _value(
        self, value: Value, kind: pa.DataType, files: Files, role: str, column: str
    ) -> dict[str, Value]:
        """A column that is no time; of integer ids also whether one could not be read."""
        if role == "position":
            return {role: value.try_cast("int64") if _is_text(kind) else value.cast("int64")}
        if role == "image" or role in TEXT or (role in IDS and getattr(self._ids, role) == "text"):
            if pa.types.is_floating(kind) and role != "category":
                raise _refused(files, role, column, f"{kind} is no id and no text; convert the column")
            return {role: value.cast("string").nullif("")}
        if pa.types.is_floating(kind) or not (_is_text(kind) or _is_whole(kind)):
            raise _refused(
                files, role, column, f'{kind} is no integer; convert it, or set ids.{role} = "text"'
            )
        if _is_text(kind):
            text = value.cast("string").nullif("")
            number = ibis.ifelse(text.re_search(NUMBER), text.try_cast("int64"), ibis.null("int64"))
            return {role: number, f"bad_{role}": text.notnull() & number.isnull()}
        if pa.types.is_uint64(kind) or pa.types.is_decimal(kind):  # above 2^63 the two's complement
            wide = value.cast(WIDE)
            large, turn = (ibis.literal(decimal.Decimal(2**bits), WIDE) for bits in (63, 64))
            return {role: ibis.ifelse(wide >= large, (wide - turn).cast(WIDE), wide).cast("int64")}
        return {role: value.cast("int64")}

    def _time(
        self, value: Value, kind: pa.DataType, files: Files, role: str, column: str, source: Source
    ) -> dict[str, Value]:
        """Microseconds, and whether they are those of a wall clock."""
        nothing = ibis.null("int64")
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            micros = self._engine.micros(value.cast("timestamp") if pa.types.is_date(kind) else value)
            return {role: micros, f"local_{role}": ibis.literal(getattr(kind, "tz", None) is None)}
        if pa.types.is_integer(kind):
            return {role: _scaled(value.cast("int64"), _unit(source, files, role, column)),
                    f"local_{role}": ibis.literal(False)}  # fmt: skip
        if pa.types.is_floating(kind):
            per_unit = _per_unit(_unit(source, files, role, column))
            return {role: (value.cast("float64") * per_unit).round().cast("int64"),
                    f"local_{role}": ibis.literal(False)}  # fmt: skip
        if not _is_text(kind):
            raise _refused(files, role, column, f"{kind} is no time; convert the column")
        text = value.cast("string")
        if source.time_unit is not None:
            number = ibis.ifelse(text.re_search(NUMBER), text.try_cast("int64"), nothing)
            return {role: _scaled(number, source.time_unit), f"local_{role}": ibis.literal(False)}
        iso = ibis.ifelse(text.re_search(ISO), text.strip(), ibis.null("string"))
        parsed = self._engine.micros(iso.try_cast(ibis.dtype("timestamp('UTC')")))
        return {role: parsed, f"local_{role}": iso.notnull() & ~iso.re_search(OFFSET)}

    def _count(self, raw: Raw, source: Source, columns: dict[str, str], needed: Sequence[str]) -> None:
        """Count rows and what is missing, and refuse what cannot be read."""
        table = raw.table
        asked: dict[str, Value] = {"rows": table.count()}
        for name in table.columns:
            if name.startswith(("bad_", "local_")):
                asked[name] = table[name].cast("int64").sum()
            else:
                asked[f"without_{name}"] = table[name].isnull().cast("int64").sum()
        there = [table[name].notnull() for name in needed if name in table.columns]
        if there:
            asked["complete"] = functools.reduce(operator.and_, there).cast("int64").sum()
        if "ts" in table.columns:
            asked["last"] = table.ts.max()
        found = numbers(self._engine, table.agg(**asked))
        raw.complete, raw.last = found.pop("complete", 0), found.pop("last", 0)
        for role, column in columns.items():
            if found.get(f"bad_{role}"):
                what = f"{found[f'bad_{role}']} of {found['rows']} values are no integers"
                raise _refused(raw.files, role, column, f'{what}; set ids.{role} = "text"')
        raw.counts = {n: v for n, v in found.items() if not n.startswith(("bad_", "local_"))}
        raw.zones = {n.removeprefix("local_"): v for n, v in found.items() if n.startswith("local_")}
        self._check_zones(raw, source, columns)

    def _check_zones(self, raw: Raw, source: Source, columns: dict[str, str]) -> None:
        for role, local in raw.zones.items():
            where = f"{raw.files.place}.{role} (column {columns[role]} of {raw.files.paths[0]})"
            known = raw.counts["rows"] - raw.counts[f"without_{role}"]
            if local and source.timezone is None:
                self._wall_clock = self._wall_clock or where
            if known > local:
                self._zoned = self._zoned or where
        if self._wall_clock and self._zoned:
            raise DataError(
                f"{self._wall_clock} has times without a zone, {self._zoned} has times with one; write "
                "timezone in the mapping of the table without (timezone = \"UTC\" if they are UTC)"
            )  # fmt: skip

    def _without_zones(self, raw: Table, source: Source, columns: dict[str, str], result: Raw) -> Table:
        """All times in UTC."""
        values: dict[str, Value] = {}
        for name in raw.columns:
            if name.startswith(("bad_", "local_")):
                continue
            values[name] = raw[name]
            if result.zones.get(name) and source.timezone not in (None, "UTC"):
                local: BooleanValue = raw[f"local_{name}"]
                clock: IntegerValue = raw[name]
                ends = raw.filter(local).agg(first=raw[name].min(), last=raw[name].max())
                first, last = numbers(self._engine, ends).values()
                zone = LocalTime(str(source.timezone), first, last)
                values[name] = ibis.ifelse(local, zone.utc(clock), clock)
                twice = self._engine.count(raw.filter(local & zone.is_repeated(clock)))
                if twice:
                    result.counts[f"{name}_in_a_repeated_hour"] = twice
        return raw.select(**values)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_whole(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)


def _unit(source: Source, files: Files, role: str, column: str) -> str:
    if source.time_unit is None:
        problem = "the column holds numbers; write time_unit (s, ms, us or ns) in the mapping of the table"
        raise _refused(files, role, column, problem)
    return source.time_unit


def _per_unit(unit: str) -> float:
    return 0.001 if unit == "ns" else float(PER_UNIT[unit])


def _scaled(value: Value, unit: str) -> Value:
    if unit != "ns":
        return value * PER_UNIT[unit]
    rest = (value % 1000 + 1000) % 1000
    return ((value - rest) / 1000).round().cast("int64")  # Spark divides as float64; rounding corrects it


def _refused(files: Files, role: str, column: str, problem: str) -> DataError:
    return DataError(f"{files.place}.{role}: {problem}", file=files.paths[0], column=column)
