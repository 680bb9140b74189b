"""`mim prepare` on what others write: times, zones, ids, wrong mappings, and the mapping that it writes."""

import datetime
import zoneinfo
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.remote.places import NoSuchPlace, StoreError
from mim_torchrec.errors import OptionError, OutputExists
from mim_torchrec.prepare.config import PrepareConfig, parse_time
from mim_torchrec.prepare.engines import DuckDB
from mim_torchrec.prepare.files import find_files
from mim_torchrec.prepare.local_time import LocalTime
from mim_torchrec.prepare.looking import write_mapping
from mim_torchrec.prepare.mapping import Catalog, Ids, MappingError, load_mapping
from mim_torchrec.prepare.reading import Reader
from mim_torchrec.prepare.run import prepare
from tests.raw_logs import make_log, write_log

MICROS = datetime.timedelta(microseconds=1)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def engine(tmp_path):
    engine = DuckDB(tmp_path, "200MB", 1)
    yield engine
    engine.close()


def read(engine: DuckDB, folder: Path, column: pa.Array | list, **source: Any) -> list[int | None]:
    """Times of a column of a catalogue, in microseconds."""
    table = pa.table({"id": range(len(column)), "at": column})
    pq.write_table(table, folder / "catalog.parquet")
    reader = Reader(engine, folder, Ids())
    options = {"path": "catalog.parquet", "item": "id", "listed_at": "at"}
    found = reader.read("catalog", Catalog(**(options | source))).table.to_pyarrow().sort_by("item")
    return found["listed_at"].to_pylist()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit(engine, tmp_path, unit):
    moment = parse_time("2026-11-01T12:34:56") // {"s": 10**6, "ms": 1000, "us": 1, "ns": 1}[unit]
    values = pa.array([moment * (1000 if unit == "ns" else 1), None], pa.timestamp(unit))
    assert read(engine, tmp_path, values) == [parse_time("2026-11-01T12:34:56"), None]


@pytest.mark.parametrize("unit, value", [("s", 7), ("ms", 7_001), ("us", 7_001_002), ("ns", 7_001_002_999)])
def test_integers_of_any_unit(engine, tmp_path, unit, value):
    expected = {"s": 7_000_000, "ms": 7_001_000, "us": 7_001_002, "ns": 7_001_002}[unit]
    assert read(engine, tmp_path, [value], time_unit=unit) == [expected]
    assert read(engine, tmp_path, [str(value), "soon"], time_unit=unit) == [expected, None]


def test_dates_fractions_and_text(engine, tmp_path):
    assert read(engine, tmp_path, [datetime.date(1970, 1, 2)]) == [86_400_000_000]
    assert read(engine, tmp_path, [1.25], time_unit="s") == [1_250_000]
    texts = ["2026-11-01T12:00:00+01:00", "2026-11-01 12:00:00.123456Z", "2026-11-01T12:00:00.5-05:00",
             "2026-02-31T00:00:00Z", "12:00", "2026", "", None]  # fmt: skip
    assert read(engine, tmp_path, texts) == [
        parse_time("2026-11-01T11:00:00"), parse_time("2026-11-01T12:00:00.123456"),
        parse_time("2026-11-01T17:00:00.5"), None, None, None, None, None,
    ]  # fmt: skip


def naive_utc(local: datetime.datetime, zone: str) -> int:
    return (local.replace(tzinfo=zoneinfo.ZoneInfo(zone)) - EPOCH) // MICROS


@pytest.mark.parametrize(
    "zone", ["Europe/Berlin", "America/New_York", "Asia/Shanghai", "Australia/Lord_Howe"]
)
def test_wall_clocks_become_utc_as_in_python(engine, tmp_path, zone):
    start = datetime.datetime(2025, 9, 20, microsecond=123_456)
    moments = [start + datetime.timedelta(minutes=17 * k) for k in range(0, 33_000, 7)]
    for change in (datetime.datetime(2025, 10, 26, 0), datetime.datetime(2026, 3, 29, 0)):
        moments += [change + datetime.timedelta(minutes=k) for k in range(0, 240, 10)]
        moments += [change + datetime.timedelta(minutes=k, microseconds=-1) for k in range(0, 240, 60)]
    found = read(engine, tmp_path, pa.array(moments, pa.timestamp("us")), timezone=zone)
    assert found == [naive_utc(moment, zone) for moment in moments]


def test_an_hour_that_occurs_twice_is_counted(engine, tmp_path):
    zone = LocalTime("Europe/Berlin", parse_time("2026-10-01"), parse_time("2026-11-01"))
    assert zone.repeated == [(parse_time("2026-10-25T02:00:00"), parse_time("2026-10-25T03:00:00"))]
    table = pa.table({"id": [1, 2], "at": pa.array([parse_time("2026-10-25T02:30:00")] * 2).cast(
        pa.timestamp("us"))})  # fmt: skip
    pq.write_table(table, tmp_path / "catalog.parquet")
    source = Catalog(path="catalog.parquet", item="id", listed_at="at", timezone="Europe/Berlin")
    raw = Reader(engine, tmp_path, Ids()).read("catalog", source)
    assert raw.counts["listed_at_in_a_repeated_hour"] == 2


def test_times_with_and_without_a_zone_are_refused_together(tmp_path):
    mapping = write_log(make_log(), tmp_path / "raw")
    for file in (tmp_path / "raw" / "clicks").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        place = table.column_names.index("ts")
        pq.write_table(table.set_column(place, "ts", table["ts"].cast(pa.timestamp("us"))), file)
    with pytest.raises(DataError, match="events.click.ts .* has times without a zone, .*catalog.*timezone"):
        prepare(PrepareConfig(mapping=mapping, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]  # nothing half-made, no scratch


def test_uint64_ids_are_kept_as_the_readers_keep_them(engine, tmp_path):
    pq.write_table(pa.table({"id": pa.array([2**64 - 1, 5], pa.uint64())}), tmp_path / "catalog.parquet")
    raw = Reader(engine, tmp_path, Ids()).read("catalog", Catalog(path="catalog.parquet", item="id"))
    assert sorted(raw.table.to_pyarrow()["item"].to_pylist()) == [-1, 5]


def test_text_that_is_no_integer_is_refused_by_name(engine, tmp_path):
    pq.write_table(pa.table({"id": ["7", "a8"]}), tmp_path / "catalog.parquet")
    with pytest.raises(
        DataError, match='catalog.parquet, column id: catalog.item: 1 of 2 .* ids.item = "text"'
    ):
        Reader(engine, tmp_path, Ids()).read("catalog", Catalog(path="catalog.parquet", item="id"))


def test_files_that_differ_are_refused_by_both_names(engine, tmp_path):
    (tmp_path / "catalog").mkdir()
    pq.write_table(pa.table({"id": [7]}), tmp_path / "catalog" / "a.parquet")
    pq.write_table(pa.table({"id": ["7"]}), tmp_path / "catalog" / "b.parquet")
    pq.write_table(pa.table({"id": [1.5]}), tmp_path / "catalog" / ".hidden.parquet")
    with pytest.raises(DataError, match="b.parquet, column id: catalog: the column is string here and int64"):
        Reader(engine, tmp_path, Ids()).read("catalog", Catalog(path="catalog", item="id"))


BASE = """
name = "x"
[events.impression]
path = "i"
user = "u"
item = "i"
ts = "t"
request = "r"
[catalog]
path = "c"
item = "i"
"""


@pytest.mark.parametrize("text, problem", [
    (BASE.replace('user = "u"', 'usr = "u"'),
     "events.impression.user: missing.*unknown key; did you mean 'user'"),
    (BASE.replace('path = "c"', "path = 7"), "catalog.path"),
    (BASE.replace('request = "r"\n', ""), 'ids.request must be "text"'),
    (BASE + 'timezone = "Berlin"', "'Berlin' is no time zone"),
    (BASE + "[x", "not TOML"),
])  # fmt: skip
def test_a_wrong_mapping_is_an_error_that_names_file_and_place(tmp_path, text, problem):
    (tmp_path / "prepare.toml").write_text(text)
    with pytest.raises(MappingError, match=f"(?s)prepare.toml: .*{problem}"):
        load_mapping(tmp_path / "prepare.toml")


def test_a_mapping_that_is_not_there_names_init(tmp_path):
    with pytest.raises(MappingError, match="mim prepare --init DATA"):
        load_mapping(tmp_path / "prepare.toml")


@pytest.mark.parametrize("form, text", [("csv", False), ("csv", True), ("parquet", False)])
def test_the_mapping_that_init_writes_can_be_run(tmp_path, form, text):
    own = write_log(make_log(), tmp_path / "raw", form=form, text=text)
    prepare(PrepareConfig(mapping=own, out=tmp_path / "expected"))
    own.unlink()
    write_mapping(tmp_path / "raw", tmp_path / "found.toml")
    mapping = load_mapping(tmp_path / "found.toml")
    assert mapping.events.impression.position == "position" and mapping.catalog.valid_from is None
    assert mapping.ids.user == ("text" if text else "int64")
    assert mapping.events.click is not None and mapping.events.click.time_unit == "us"
    report = prepare(PrepareConfig(mapping=tmp_path / "found.toml", out=tmp_path / "out"))
    assert report["requests"]["kept"] > 100
    with pytest.raises(OutputExists):
        write_mapping(tmp_path / "raw", tmp_path / "found.toml")


@pytest.mark.parametrize("url, error, problem", [
    ("gs://logs/clicks", StoreError, "gs://logs/clicks: python -m pip install gcsfs"),
    ("s4://logs/clicks", NoSuchPlace, "s4://logs/clicks: fsspec knows no scheme 's4'"),
    ("memory://nothing/here.parquet", NoSuchPlace, "memory://nothing/here.parquet: not found"),
])  # fmt: skip
def test_urls_that_cannot_be_read_are_refused_in_one_line(tmp_path, url, error, problem):
    with pytest.raises(error, match=problem):
        find_files("events.click", url, tmp_path, [])


def test_init_says_what_it_does_not_find(tmp_path):
    (tmp_path / "logs").mkdir()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "logs" / "catalog.parquet")
    with pytest.raises(DataError, match="nothing looks like the impression: .* there is catalog.parquet"):
        write_mapping(tmp_path / "logs", tmp_path / "found.toml")


@pytest.mark.parametrize("changes, problem", [
    ({"negative_rate": 0.0}, "--negative-rate"),
    ({"memory": "much"}, "--memory is 'much'"),
    ({"validation_from": "2026-11-01"}, "go together"),
    ({"log_end": "tomorrow"}, "--log-end is 'tomorrow'"),
    ({"behaviors": ()}, "--behaviors"),
    ({"second_label": "click"}, "--second-label is click, as --label is"),
    ({"second_window": 0}, "--second-window"),
])  # fmt: skip
def test_impossible_options_are_refused(tmp_path, changes, problem):
    with pytest.raises(OptionError, match=problem):
        PrepareConfig(mapping=tmp_path / "x.toml", out=tmp_path / "out", **changes).check()
