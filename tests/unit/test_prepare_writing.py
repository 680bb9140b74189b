"""Files that a thread writes: the same whatever waits, and its errors reach who waits for it."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.prepare import writing
from mim_torchrec.prepare.writing import FolderWriter, Vocabularies


def requests(first: int, count: int) -> pa.Table:
    ids = list(range(first, first + count))
    return pa.table({
        "user_id": ids, "candidate_item_ids": [[k % 3, k % 5 + 10] for k in ids],
        "labels": pa.array([[1, 0] for _ in ids], pa.list_(pa.int8())),
    })  # fmt: skip


@pytest.mark.parametrize("waiting", [0, 1 << 30])
def test_row_groups_are_the_same_whatever_waits(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr(writing, "WAITING_BYTES", waiting)
    with FolderWriter(tmp_path, 4) as files:
        for first in range(0, 90, 3):
            files.write(f"requests/day={first // 30}", requests(first, 3))
        files.finish()
    assert [one["rows"] for one in files.files] == [30, 30, 30]
    for one in files.files:
        parquet = pq.ParquetFile(tmp_path / one["file"])
        assert [parquet.metadata.row_group(k).num_rows for k in range(8)] == [4] * 7 + [2]
    found = [
        pq.read_table(tmp_path / one["file"], partitioning=None)["user_id"].to_pylist() for one in files.files
    ]
    assert sum(found, []) == list(range(90))


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "requests").write_text("no folder")
    with FolderWriter(tmp_path, 4) as files, pytest.raises(OSError, match="requests"):
        files.write("requests/day=1", requests(0, 9))  # the error may reach who writes the next row group
        files.finish()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_ids_are_those_of_a_loop_however_many_are_counted_at_once(monkeypatch, rows):
    monkeypatch.setattr(writing, "COUNTED_ROWS", rows)
    vocabularies = Vocabularies()
    for first in range(0, 30, 3):
        vocabularies.add(requests(first, 3))
        vocabularies.add_popularity(requests(first, 3))
    found = dict(vocabularies.tables())
    assert found["user_id"]["id"].to_pylist() == list(range(30))
    shown = [k for row in requests(0, 30)["candidate_item_ids"].to_pylist() for k in row]
    assert found["item_id"].to_pydict()["count"] == [shown.count(k) for k in sorted(set(shown))]
    assert found["popularity"]["positive"].to_pylist() == [10] * 3 + [0] * 5


def test_ids_that_cannot_be_counted_are_an_error():
    vocabularies = Vocabularies()
    vocabularies.add(
        requests(0, 3).drop(["user_id"]).set_column(0, "candidate_item_ids", pa.array([[1.5]] * 3))
    )
    with pytest.raises(TypeError, match="holds no ids"):
        list(vocabularies.tables())
