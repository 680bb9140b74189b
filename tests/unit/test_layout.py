"""Files of a data set: partitions, nested folders, days; and what is no data."""

from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.layout import Dataset, Days
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.errors import OptionError
from mim_torchrec.rim.sources import DirectorySource
from tests.datasets import write_items, write_requests


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(root, files):
    return [file.relative_to(root).as_posix() for file in files]


HIDDEN = (".part-0.parquet", "_part-1.parquet", "_temporary/0/part-2.parquet", ".staging/part-3.parquet",
          "_delta_log/4.checkpoint.parquet", "_SUCCESS", "part-5.parquet.crc", "part-6.csv")  # fmt: skip


def test_hidden_files_are_no_data(tmp_path):
    touch(tmp_path / "items", *HIDDEN, "part-9.parquet")
    assert names(tmp_path, Dataset(tmp_path).items()) == ["items/part-9.parquet"]


def test_a_folder_of_hidden_files_has_no_data(tmp_path):
    touch(tmp_path / "pairs", *HIDDEN)
    with pytest.raises(DataError, match=r"pairs: no \*\.parquet file there"):
        Dataset(tmp_path).pairs()


def test_a_data_set_below_a_hidden_folder_is_one(tmp_path):
    touch(tmp_path / "_scratch" / ".x" / "items", "a.parquet")
    assert len(Dataset(tmp_path / "_scratch" / ".x").items()) == 1


def test_nested_and_partitioned_folders_are_read(tmp_path):
    touch(tmp_path / "requests" / "train", "b/c/2.parquet", "a.parquet", "_region=eu/1.parquet")
    found = names(tmp_path / "requests" / "train", Dataset(tmp_path).requests("train"))
    assert found == ["_region=eu/1.parquet", "a.parquet", "b/c/2.parquet"]


def test_splits_may_be_partitions(tmp_path):
    days = [f"split=train/dt=2026-11-{day:02}/part-0.parquet" for day in (1, 2, 10)]
    touch(tmp_path / "requests", *days, "split=test/dt=2026-11-11/part-0.parquet")
    assert names(tmp_path / "requests", Dataset(tmp_path).requests("train")) == days
    assert len(Dataset(tmp_path).requests("test")) == 1
    chosen = Dataset(tmp_path, {"train": "2026-11-02..2026-11-10"}).requests("train")
    assert names(tmp_path / "requests", chosen) == days[1:]
    assert (
        names(tmp_path / "requests", Dataset(tmp_path, {"train": "2026-11-01"}).requests("train")) == days[:1]
    )


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    touch(tmp_path / "requests", "train/a.parquet", "split=train/a.parquet")
    with pytest.raises(DataError, match=r"requests/train: is there beside .*requests/split=train"):
        Dataset(tmp_path).requests("train")


def test_days_alone_become_splits_by_ranges(tmp_path):
    touch(tmp_path / "requests", *(f"dt=2026-11-{day:02}/a.parquet" for day in range(1, 31)))
    ranges = {"train": "2026-11-01..2026-11-20", "validation": "2026-11-21", "test": "2026-11-22..2026-12-05"}
    dataset = Dataset(tmp_path, ranges)
    assert [len(dataset.requests(split)) for split in ranges] == [20, 1, 9]
    with pytest.raises(
        DataError, match=r"requests: is divided by days.* --test-days 2026-11-01\.\.2026-11-20"
    ):
        Dataset(tmp_path, {"train": "2026-11-01"}).requests("test")


def test_days_of_two_splits_may_not_overlap(tmp_path):
    touch(tmp_path / "requests", *(f"dt=2026-11-{day:02}/a.parquet" for day in range(1, 31)))
    dataset = Dataset(tmp_path, {"train": "2026-11-01..2026-11-20", "test": "2026-11-20..2026-11-21"})
    with pytest.raises(OptionError, match=r"--train-days .* and --test-days .* share days"):
        dataset.requests("train")


def test_days_that_are_not_there_are_refused_with_those_that_are(tmp_path):
    touch(tmp_path / "requests" / "train", "dt=2026-11-03/a.parquet", "dt=2026-11-05/a.parquet")
    with pytest.raises(
        DataError, match="no file of the days 2027-01-01..2027-01-02; there are 2026-11-03 to 2026-11-05"
    ):
        Dataset(tmp_path, {"train": "2027-01-01..2027-01-02"}).requests("train")


def test_a_file_of_no_day_is_refused_where_days_are_chosen(tmp_path):
    touch(tmp_path / "requests" / "train", "dt=2026-11-03/a.parquet", "stray.parquet")
    with pytest.raises(DataError, match=r"stray\.parquet: is in no folder of a day"):
        Dataset(tmp_path, {"train": "2026-11-03"}).requests("train")


def test_a_folder_that_is_no_day_is_named(tmp_path):
    touch(tmp_path / "requests" / "train", "dt=20261103T00/a.parquet")
    with pytest.raises(DataError, match="dt=20261103T00: expected a day such as dt=2026-11-01"):
        Dataset(tmp_path, {"train": "2026-11-03"}).requests("train")


@pytest.mark.parametrize(
    "text", ["yesterday", "2026-11-03..", "..2026-11-03", "2026-11-05..2026-11-03", "2026-13-01"]
)
def test_what_is_no_range_of_days_is_refused(tmp_path, text):
    with pytest.raises(OptionError, match="--train-days is"):
        Dataset(tmp_path, {"train": text})


def test_a_range_includes_both_ends():
    days = Days.parse("2026-02-27..2026-03-01")
    assert [date(2026, 2, day) in days for day in (26, 27, 28)] == [False, True, True]
    assert date(2026, 3, 1) in days and date(2026, 3, 2) not in days
    assert str(days) == "2026-02-27..2026-03-01"


def test_items_in_nested_folders_are_read_with_their_place(tmp_path):
    write_items(tmp_path / "items" / "shop=1" / "a.parquet")
    pq.write_table(pa.table({"item_id": pa.nulls(0)}), tmp_path / "items" / "b.parquet")
    from mim_torchrec.data.items import ItemStore

    items = ItemStore.open(Dataset(tmp_path), tmp_path / "cache")
    assert len(items) == 10 and "shop=1/a.parquet" in str(items.location(0))


def test_items_without_a_row_in_any_file_are_refused(tmp_path):
    (tmp_path / "items").mkdir()
    pq.write_table(pa.table({"item_id": pa.nulls(0)}), tmp_path / "items" / "b.parquet")
    from mim_torchrec.data.items import ItemStore

    with pytest.raises(DataError, match=r"b\.parquet: no file has a row"):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")


def test_new_items_in_hidden_files_are_left_alone_and_nested_ones_read(tmp_path):
    write_items(tmp_path / ".a.parquet")
    write_items(tmp_path / "_tmp" / "b.parquet")
    write_items(tmp_path / "dt=2026-11-01" / "c.parquet")
    source = DirectorySource(tmp_path)
    found = source.read(100, 0.0)
    assert len(found) == 10 and {arrival.unit for arrival in found} == {"dt=2026-11-01/c.parquet"}
    again = DirectorySource(tmp_path)
    again.seek({"dt=2026-11-01/c.parquet": "8"})
    assert [arrival.position for arrival in again.read(100, 0.0)] == ["9", "10"]


def test_hidden_files_of_vectors_are_not_imported(tmp_path):
    table = pa.table({"id": [1, 2], "v": pa.array([[1.0] * 4, [2.0] * 4], pa.list_(pa.float32()))})
    (tmp_path / "in" / "_temporary").mkdir(parents=True)
    for name in ("a.parquet", ".b.parquet", "_temporary/c.parquet"):
        pq.write_table(table, tmp_path / "in" / name)
    assert import_vectors(tmp_path / "in", tmp_path / "t").rows == 2


def test_requests_are_read_from_the_layout_of_mim_prepare(tmp_path):
    for day in (1, 2):
        write_requests(tmp_path / "requests" / "split=train" / f"dt=2026-11-0{day}" / "part-0.parquet")
    from tests.request_rows import read

    assert sum(batch.num_requests for batch in read(Dataset(tmp_path).requests("train"))) == 24
