"""Requests as other writers make them are read as the plain ones are, value for value."""

import uuid
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.forms import PER_SECOND
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.requests import RequestReader, label_classes
from mim_torchrec.data.schema import REQUESTS, read_row_group
from tests.datasets import Rows, request_rows, write_requests
from tests.request_rows import as_rows, expected, read

IDS = ("request_id", "user_id", "query_id", "behavior_item_ids", "candidate_item_ids")
LISTS = [field.name for field in REQUESTS if pa.types.is_list(field.type)]


def even_rows() -> Rows:
    """Requests with two behaviors and two candidates each, as lists of a fixed size hold."""
    return [row for row in request_rows(60) if len(row["behavior_item_ids"]) == len(row["labels"]) == 2]


def rewritten(path: Path, rows: Rows, **changes: Callable[[pa.Array], pa.Array] | pa.DataType) -> Path:
    """The requests with some columns made anew, or cast."""
    table = pq.read_table(write_requests(path, rows))
    for name, change in changes.items():
        column = table[name].combine_chunks()
        made = column.cast(change) if isinstance(change, pa.DataType) else change(column)
        table = table.set_column(table.column_names.index(name), name, made)
    pq.write_table(table, path, row_group_size=4)
    return path


def remade_lists(make: Callable[[pa.DataType], pa.DataType]) -> dict[str, Callable[[pa.Array], pa.Array]]:
    """What makes lists of another form of every list column."""
    kinds = {name: make(REQUESTS.field(name).type.value_type) for name in LISTS}
    return {
        name: partial(lambda column, of: pa.array(column.to_pylist(), of), of=of)
        for name, of in kinds.items()
    }


@pytest.mark.parametrize("form", ["fixed", "view", "large_view"])
def test_lists_of_any_form_hold_the_same(tmp_path, form):
    make = {"fixed": lambda of: pa.list_(of, 2), "view": pa.list_view, "large_view": pa.large_list_view}[form]
    rows = even_rows()
    assert as_rows(read([rewritten(tmp_path / "r.parquet", rows, **remade_lists(make))])) == expected(rows)


@pytest.mark.parametrize("form", ["fixed", "view"])
def test_a_null_list_of_any_form_is_an_empty_history(tmp_path, form):
    make = (lambda of: pa.list_(of, 2)) if form == "fixed" else pa.list_view
    rows = even_rows()
    rows[1] |= {name: None for name in LISTS if name.startswith("behavior")}

    file = rewritten(tmp_path / "r.parquet", rows, **remade_lists(make))
    rows[1] |= {name: [] for name in LISTS if name.startswith("behavior")}
    assert as_rows(read([file])) == expected(rows)


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_null_history_is_an_empty_one(tmp_path, on_bad_row):
    rows = request_rows()
    for at in (0, 5, 7):
        rows[at] |= {name: None for name in LISTS if name.startswith("behavior")}
    file = write_requests(tmp_path / "r.parquet", rows)
    for at in (0, 5, 7):
        rows[at] |= {name: [] for name in LISTS if name.startswith("behavior")}
    reader = RequestReader([file], batch_size=7, on_bad_row=on_bad_row)
    assert as_rows(list(reader)) == expected(rows) and reader.skipped == 0


@pytest.mark.parametrize("empty", [lambda rows: pa.nulls(rows), lambda rows: pa.array([[]] * rows)],
                         ids=["null", "list<null>"])  # fmt: skip
def test_a_file_of_new_users_has_columns_without_a_type(tmp_path, empty):
    rows = request_rows()
    behaviors = {name: lambda column: empty(len(column)) for name in LISTS if name.startswith("behavior")}
    file = rewritten(tmp_path / "r.parquet", rows, **behaviors)
    other = write_requests(tmp_path / "s.parquet", rows)
    unknown = [row | {name: [] for name in LISTS if name.startswith("behavior")} for row in rows]
    assert as_rows(read([file, other])) == expected([*unknown, *rows])
    assert scan_ids([file])["item_id"].tolist() == sorted({i for r in rows for i in r["candidate_item_ids"]})


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())],
                         ids=str)  # fmt: skip
def test_categories_of_any_text_type_hold_the_same(tmp_path, kind):
    def remade(column: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(column.offsets, column.values.cast(kind))

    columns = {"behavior_categories": remade, "candidate_categories": remade}
    file = rewritten(tmp_path / "r.parquet", request_rows(), **columns)
    assert as_rows(read([file])) == expected(request_rows())
    plain = write_requests(tmp_path / "s.parquet")
    assert scan_ids([file])["category"].tolist() == scan_ids([plain])["category"].tolist()


def test_labels_may_be_decimals(tmp_path):
    kind = pa.list_(pa.decimal128(5, 0))
    file = rewritten(tmp_path / "r.parquet", request_rows(), labels=kind)
    assert as_rows(read([file])) == expected(request_rows())
    assert label_classes([file]) == {0, 1}


def test_label_classes_are_those_of_labels_that_are_one(tmp_path):
    values = [[float("nan"), None][k % 2 :][:1] for k in range(12)]
    file = rewritten(
        tmp_path / "r.parquet", request_rows(), labels=lambda column: pa.array(values, pa.list_(pa.float32()))
    )
    assert label_classes([file]) == set()


@pytest.mark.parametrize("kind", [pa.decimal128(12, 2), pa.float16(), pa.uint64()], ids=str)
def test_numbers_of_any_type_are_features(tmp_path, kind):
    rows = request_rows()
    table = pq.read_table(write_requests(tmp_path / "r.parquet", rows))
    values = pa.array([Decimal(k) if pa.types.is_decimal(kind) else np.float16(k) for k in range(12)])
    pq.write_table(table.append_column("x", values.cast(kind)), tmp_path / "r.parquet")
    found = [b.request_dense for b in read([tmp_path / "r.parquet"], features=Features(dense=("x",)))]
    assert np.concatenate(found)[:, 0].tolist() == pytest.approx([np.log1p(k) for k in range(12)])


def text_of(value):
    return None if value is None else f"id-{value}"


def with_text_ids(rows: Rows) -> Rows:
    return [
        row | {name: [*map(text_of, row[name])] if name in LISTS else text_of(row[name]) for name in IDS}
        for row in rows
    ]


def hashed(rows: Rows) -> Rows:
    """The rows as they are read: text of ids by its number."""

    def number(value):
        return stable_ids(pa.array(value if isinstance(value, list) else [value], pa.string())).to_pylist()

    return [
        row | {name: number(row[name]) if name in LISTS else number(row[name])[0] for name in IDS}
        for row in rows
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(),
                                  pa.dictionary(pa.int32(), pa.string())], ids=str)  # fmt: skip
def test_ids_may_be_text(tmp_path, kind):
    rows = with_text_ids(request_rows())
    table = pq.read_table(write_requests(tmp_path / "r.parquet"))
    for name in IDS:
        values = pa.array(
            [row[name] for row in rows], pa.list_(pa.string()) if name in LISTS else pa.string()
        )
        if name in LISTS:
            made = pa.ListArray.from_arrays(values.offsets, values.values.cast(kind))
        else:
            made = values.cast(kind)
        table = table.set_column(table.column_names.index(name), name, made)
    pq.write_table(table, tmp_path / "r.parquet", row_group_size=4)
    assert as_rows(read([tmp_path / "r.parquet"])) == expected(hashed(rows))
    ids = scan_ids([tmp_path / "r.parquet"])
    assert ids["user_id"].tolist() == sorted({row["user_id"] for row in hashed(rows)})


def test_ids_may_be_uuids(tmp_path):
    rows = request_rows()
    users = [uuid.UUID(int=row["user_id"]) for row in rows]

    def remade(column: pa.Array) -> pa.Array:
        return pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([user.bytes for user in users], pa.binary(16))
        )

    file = rewritten(tmp_path / "r.parquet", rows, user_id=remade)
    texts = stable_ids(pa.array([str(user) for user in users])).to_pylist()
    wanted = [row | {"user_id": text} for row, text in zip(rows, texts, strict=True)]
    assert as_rows(read([file])) == expected(wanted)


def test_ids_may_be_uint64_above_2_to_63(tmp_path):
    rows = request_rows()
    large = [2**64 - 1 - k for k in range(12)]
    file = rewritten(tmp_path / "r.parquet", rows, user_id=lambda column: pa.array(large, pa.uint64()))
    assert as_rows(read([file])) == expected([row | {"user_id": -1 - k} for k, row in enumerate(rows)])


@pytest.mark.parametrize("unit, factor", [("s", 1_000_000), ("ms", 1000), ("us", 1)])
def test_times_may_be_integers_of_a_unit_that_is_stated(tmp_path, unit, factor):
    def remade(column: pa.Array) -> pa.Array:
        if pa.types.is_list(column.type):
            return pa.ListArray.from_arrays(column.offsets, remade(column.values))
        return pa.array(column.cast(pa.int64()).to_numpy() // factor)

    file = rewritten(tmp_path / "r.parquet", request_rows(), ts=remade, behavior_ts=remade)
    found = as_rows(read([file], conventions=Conventions(unit)))
    assert found == expected(request_rows())
    with pytest.raises(
        DataError, match=r'column ts: expected timestamp.us., found int64; .*"time_unit": "s"'
    ):
        read([file])


def test_times_of_nanoseconds_are_cut_to_microseconds(tmp_path):
    def remade(column: pa.Array) -> pa.Array:
        if pa.types.is_list(column.type):
            return pa.ListArray.from_arrays(column.offsets, remade(column.values))
        return pa.array(column.cast(pa.int64()).to_numpy() * 1000 + 999)

    file = rewritten(tmp_path / "r.parquet", request_rows(), ts=remade, behavior_ts=remade)
    assert as_rows(read([file], conventions=Conventions("ns"))) == expected(request_rows())


@pytest.mark.parametrize("stated, true", [(a, b) for a in PER_SECOND for b in PER_SECOND if a != b])
def test_a_wrong_unit_is_refused_by_the_years_it_gives(tmp_path, stated, true):
    def remade(column: pa.Array) -> pa.Array:
        if pa.types.is_list(column.type):
            return pa.ListArray.from_arrays(column.offsets, remade(column.values))
        return pa.array(column.cast(pa.int64()).to_numpy() // 1_000_000 * PER_SECOND[true])

    file = rewritten(tmp_path / "r.parquet", request_rows(), ts=remade, behavior_ts=remade)
    with pytest.raises(DataError, match=rf"row group 0, column ts: holds \d+, which in the unit '{stated}'"):
        read([file], conventions=Conventions(stated))


def test_an_unknown_unit_is_refused():
    with pytest.raises(
        DataError, match="time_unit of dataset.json is 'seconds', expected one of s, ms, us, ns"
    ):
        Conventions("seconds")


def test_times_may_be_dates(tmp_path):
    day = 86_400_000_000
    rows = request_rows()
    for row in rows:
        row["ts"] = row["ts"] // day * day
        row["behavior_ts"] = [row["ts"] - (9 - k) * day for k in range(len(row["behavior_ts"]))]
    types = {"ts": pa.date32(), "behavior_ts": pa.list_(pa.date32())}
    assert as_rows(read([rewritten(tmp_path / "r.parquet", rows, **types)])) == expected(rows)


def test_a_behavior_of_the_day_of_its_request_is_refused_where_times_are_dates(tmp_path):
    types = {"ts": pa.date32(), "behavior_ts": pa.list_(pa.date32())}
    rows = request_rows()
    for row in rows:
        row["ts"] = row["ts"] // 86_400_000_000 * 86_400_000_000
        row["behavior_ts"] = [row["ts"]] * len(row["behavior_ts"])
    with pytest.raises(DataError, match="not before its request"):
        read([rewritten(tmp_path / "r.parquet", rows, **types)])


def test_a_part_without_rows_is_no_data(tmp_path):
    empty = tmp_path / "a.parquet"
    pq.write_table(pa.table({"request_id": pa.nulls(0), "whatever": pa.nulls(0)}), empty)
    full = write_requests(tmp_path / "b.parquet")
    assert as_rows(read([empty, full])) == expected(request_rows())
    assert scan_ids([empty, full])["user_id"].tolist() == scan_ids([full])["user_id"].tolist()
    assert label_classes([empty, full]) == {0, 1}
    with pytest.raises(DataError, match=r"a\.parquet: no file has a row"):
        read([empty])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pq.read_table(write_requests(tmp_path / "r.parquet"))
    pq.write_table(table.append_column("ts", table["ts"]), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet, column ts: 2 columns have this name"):
        read([tmp_path / "r.parquet"])


def test_ids_as_people_know_them_stand_beside_their_numbers(tmp_path):
    from mim_torchrec.data.schema import ORIGINAL, REQUESTS_REQUIRED, open_parquet

    rows = with_text_ids(request_rows())
    schema = pa.schema([pa.field("user_id", pa.string()) if f.name == "user_id" else f for f in REQUESTS])
    numbers = [row | {"user_id": text["user_id"]} for row, text in zip(request_rows(), rows, strict=True)]
    pq.write_table(pa.Table.from_pylist(numbers, schema=schema), tmp_path / "r.parquet")
    parquet = open_parquet(tmp_path / "r.parquet", REQUESTS, REQUESTS_REQUIRED, originals=True)
    table = read_row_group(parquet, 0, ["request_id", "user_id"], tmp_path / "r.parquet")
    assert table.column_names == ["request_id", "user_id", "user_id" + ORIGINAL]
    assert table["user_id" + ORIGINAL].to_pylist() == [row["user_id"] for row in rows]
    assert table["user_id"].to_pylist() == [row["user_id"] for row in hashed(rows)]
