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
from mim_torchrec.data.schema import REQUESTS, category_ids
from tests.datasets import request_rows, write_requests, write_rows


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


def naive_impressions(rows: list[dict]) -> dict[str, Counter]:
    """Impressions by a loop over the candidates of all rows."""
    found: dict[str, Counter] = {name: Counter() for name in id_scan.COLUMNS}
    for row in rows:
        for name, columns in id_scan.COLUMNS.items():
            for column in columns:
                if column.startswith("candidate_"):
                    values = row[column]
                else:
                    values = [] if column.startswith("behavior_") else [row[column]] * len(row["labels"])
                if name == "category":
                    values = category_ids(pa.array(values, pa.string())).tolist()
                found[name].update(values)
    return found


def shown(found: dict[str, IdCounts]) -> dict[str, Counter]:
    """Impressions of the ids that have any."""
    return {name: +Counter(dict(zip(one.ids.tolist(), one.impressions.tolist(), strict=True)))
            for name, one in found.items()}  # fmt: skip


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


def test_impressions_are_candidates_with_the_id_or_of_requests_with_it(files):
    found = naive_impressions(request_rows(47))
    assert shown(count_ids(files)) == found
    assert (
        0 < found["item_id"].total() == found["user_id"].total() < naive(request_rows(47))["item_id"].total()
    )


def test_side_information_of_behaviors_counts_behaviors(tmp_path):
    rows = [row | {"behavior_action": [7] * len(row["behavior_item_ids"])} for row in request_rows(12)]
    schema = pa.schema([*REQUESTS, ("behavior_action", pa.list_(pa.int64()))])
    file = write_rows(tmp_path / "0.parquet", rows, schema)
    found = count_ids([file], Features(sparse=("behavior_action",)))["behavior_action"]
    behaviors = sum(len(row["behavior_item_ids"]) for row in rows)
    assert (found.ids.tolist(), found.impressions.tolist()) == ([7], [behaviors])


def test_an_id_in_a_list_of_a_request_has_the_impressions_of_the_request(tmp_path):
    rows = [row | {"tags": ["a"] * (k % 3) + ["b"] * (k % 2), "age": k / 4}
            for k, row in enumerate(request_rows(12))]  # fmt: skip
    rows[5]["tags"] = rows[5]["age"] = None
    schema = REQUESTS.append(pa.field("tags", pa.list_(pa.dictionary(pa.int32(), pa.string()))))
    file = write_rows(tmp_path / "r.parquet", rows, schema.append(pa.field("age", pa.float64())), 5)
    expected = {"tags": Counter(), "age": Counter()}
    for row in rows:
        candidates = len(row["labels"])
        for tag in category_ids(pa.array(row["tags"] or [], pa.string())).tolist():
            expected["tags"][tag] += candidates
        if row["age"] is not None:
            expected["age"][int(row["age"] >= 1)] += candidates
    found = shown(count_ids([file], Features(sparse=("tags",), buckets={"age": "1"})))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("pending", [1, 7, 10_000])
def test_merging_more_or_less_often_changes_nothing(files, monkeypatch, pending):
    monkeypatch.setattr(id_scan, "PENDING", pending)
    assert as_counters(count_ids(files)) == naive(request_rows(47))


@pytest.mark.parametrize("parts", [2, 3, 60])
def test_the_parts_of_ranks_add_up_to_the_whole(files, parts):
    found = [as_counters(count_ids(files, rank=rank, world_size=parts)) for rank in range(parts)]
    for name, expected in naive(request_rows(47)).items():
        assert sum((one.get(name, Counter()) for one in found), Counter()) == expected
    parts_shown = [shown(count_ids(files, rank=rank, world_size=parts)) for rank in range(parts)]
    for name, expected in naive_impressions(request_rows(47)).items():
        assert sum((one.get(name, Counter()) for one in parts_shown), Counter()) == expected


def test_ids_come_out_ascending_and_once():
    rng, counts, expected = np.random.default_rng(0), IdCounts(), Counter()
    for _ in range(20):
        ids = rng.integers(-1000, 1000, 300)
        counts.add(ids, np.full(300, 2), np.full(300, 3))
        expected.update(
            {int(i): 2 * int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True)}
        )
    assert counts.ids.tolist() == sorted(expected)
    assert counts.counts.tolist() == [expected[i] for i in sorted(expected)]
    assert counts.impressions.tolist() == [expected[i] // 2 * 3 for i in sorted(expected)]


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
