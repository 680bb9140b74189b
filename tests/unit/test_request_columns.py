"""The columns that a reader of requests accepts: types, units, categories and optional ones."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import REQUESTS
from tests.datasets import request_rows, without, write_requests, write_rows
from tests.request_rows import as_rows, expected, read


@pytest.mark.parametrize(
    "absent",
    [
        ("query_id",),
        ("behavior_categories", "candidate_categories"),
        ("ts",),
        ("behavior_ts",),
        ("query_id", "behavior_categories", "candidate_categories", "ts", "behavior_ts"),
    ],
    ids="+".join,
)
def test_optional_columns_may_be_absent(tmp_path, absent):
    rows = without(request_rows(), *absent)
    assert as_rows(read([write_requests(tmp_path / "r.parquet", rows)])) == expected(rows)


def test_columns_beside_the_schema_are_left_alone(tmp_path):
    rows = [row | {"price": 1.5} for row in request_rows()]
    file = write_rows(tmp_path / "r.parquet", rows, REQUESTS.append(pa.field("price", pa.float64())))
    assert as_rows(read([file])) == expected(request_rows())


def test_categories_of_one_role_only_are_refused(tmp_path):
    file = write_requests(tmp_path / "r.parquet", without(request_rows(), "behavior_categories"))
    with pytest.raises(DataError, match=r"r\.parquet: categories .* go together"):
        read([file])


def rewritten(path: Path, **types: pa.DataType) -> Path:
    """The default requests with some columns in other types."""
    table = pq.read_table(write_requests(path))
    for column, kind in types.items():
        values = table[column].cast(kind)
        table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, path, row_group_size=4)
    return path


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
def test_times_of_another_unit_come_out_in_microseconds(tmp_path, unit):
    times = {"ts": pa.timestamp(unit), "behavior_ts": pa.list_(pa.timestamp(unit))}
    assert as_rows(read([rewritten(tmp_path / "r.parquet", **times)])) == expected(request_rows())


def test_times_with_a_time_zone_come_out_in_microseconds(tmp_path):
    times = {"ts": pa.timestamp("us", "UTC"), "behavior_ts": pa.list_(pa.timestamp("us", "UTC"))}
    assert as_rows(read([rewritten(tmp_path / "r.parquet", **times)])) == expected(request_rows())


@pytest.mark.parametrize("kind", [pa.int32(), pa.int16(), pa.uint32()], ids=str)
def test_narrower_ids_are_accepted(tmp_path, kind):
    types = {"request_id": kind, "user_id": kind, "query_id": kind, "behavior_item_ids": pa.list_(kind),
             "candidate_item_ids": pa.list_(kind)}  # fmt: skip
    assert as_rows(read([rewritten(tmp_path / "r.parquet", **types)])) == expected(request_rows())


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int64(), pa.float32()], ids=str)
def test_labels_of_another_type_are_accepted(tmp_path, kind):
    file = rewritten(tmp_path / "r.parquet", labels=pa.list_(kind))
    assert as_rows(read([file])) == expected(request_rows())


def test_large_lists_are_accepted(tmp_path):
    types = {"behavior_item_ids": pa.large_list(pa.int64()), "labels": pa.large_list(pa.int8())}
    assert as_rows(read([rewritten(tmp_path / "r.parquet", **types)])) == expected(request_rows())


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=["large", "dictionary"]
)
def test_categories_of_another_text_type_have_the_same_ids(tmp_path, kind):
    types = {"behavior_categories": pa.list_(kind), "candidate_categories": pa.list_(kind)}
    assert as_rows(read([rewritten(tmp_path / "r.parquet", **types)])) == expected(request_rows())


def test_categories_that_are_integers_stay_as_they_are(tmp_path):
    rows = request_rows()
    for row in rows:
        for role in ("behavior", "candidate"):
            row[f"{role}_categories"] = [i % 3 for i in row[f"{role}_item_ids"]]
    schema = REQUESTS
    for column in ("behavior_categories", "candidate_categories"):
        schema = schema.set(schema.get_field_index(column), pa.field(column, pa.list_(pa.int64())))
    assert as_rows(read([write_rows(tmp_path / "r.parquet", rows, schema)])) == rows
