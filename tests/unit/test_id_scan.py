"""The scan of ids: every id once with its count, however files, row groups, parts and merges cut it."""

import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data import id_scan
from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import IdCounts, count_ids, fingerprint
from mim_torchrec.data.schema import category_ids
from tests.datasets import request_rows, write_requests


def naive(rows: list[dict]) -> dict[str, Counter]:
    """Occurrences by a loop over the rows."""
    found: dict[str, Counter] = {name: Counter() for name in id_scan.COLUMNS}
    for row in rows:
        for name, columns in id_scan.COLUMNS.items():
            for column in columns:
                values = row[column] if isinstance(row[column], list) else [row[column]]
                if name == "category":
                    values = category_ids(pa.array(values, pa.string())).tolist()
                found[name].update(values)
    return found


def as_counters(found: dict[str, IdCounts]) -> dict[str, Counter]:
    return {name: Counter(dict(zip(one.ids.tolist(), one.counts.tolist(), strict=True)))
            for name, one in found.items()}  # fmt: skip


@pytest.fixture(params=[1, 5, 100])
def files(tmp_path, request) -> list:
    rows = request_rows(47)
    return [write_requests(tmp_path / "0.parquet", rows[:30], row_group_size=request.param),
            write_requests(tmp_path / "1.parquet", rows[30:], row_group_size=request.param)]  # fmt: skip


def test_every_id_is_counted(files):
    assert as_counters(count_ids(files)) == naive(request_rows(47))


@pytest.mark.parametrize("pending", [1, 7, 10_000])
def test_merging_more_or_less_often_changes_nothing(files, monkeypatch, pending):
    monkeypatch.setattr(id_scan, "PENDING", pending)
    assert as_counters(count_ids(files)) == naive(request_rows(47))


@pytest.mark.parametrize("parts", [2, 3, 60])
def test_the_parts_of_ranks_add_up_to_the_whole(files, parts):
    found = [as_counters(count_ids(files, rank=rank, world_size=parts)) for rank in range(parts)]
    for name, expected in naive(request_rows(47)).items():
        assert sum((one.get(name, Counter()) for one in found), Counter()) == expected


def test_ids_come_out_ascending_and_once():
    rng, counts, expected = np.random.default_rng(0), IdCounts(), Counter()
    for _ in range(20):
        ids = rng.integers(-1000, 1000, 300)
        counts.add(ids, np.full(300, 2))
        expected.update(
            {int(i): 2 * int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True)}
        )
    assert counts.ids.tolist() == sorted(expected)
    assert counts.counts.tolist() == [expected[i] for i in sorted(expected)]


def test_text_in_dictionaries_has_the_same_ids(tmp_path, files):
    table = pq.read_table(files[0])
    for column in ("behavior_categories", "candidate_categories"):
        kind = pa.list_(pa.dictionary(pa.int32(), pa.string()))
        table = table.set_column(table.column_names.index(column), column, table[column].cast(kind))
    pq.write_table(table, tmp_path / "d.parquet")
    assert as_counters(count_ids([tmp_path / "d.parquet"])) == as_counters(count_ids(files[:1]))


def test_a_fingerprint_changes_with_the_files_and_the_features(files):
    known = fingerprint(files, Features())
    assert fingerprint(files, Features()) == known
    others = {fingerprint(files[:1], Features()), fingerprint(files, Features(sparse=("city",)))}
    os.utime(files[1], ns=(1, 1))
    others.add(fingerprint(files, Features()))
    assert known not in others and len(others) == 3
