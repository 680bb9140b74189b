"""The vocabularies that two gloo ranks find are those of one, and are not searched for twice."""

from pathlib import Path

import numpy as np
import pytest

from mim_torchrec.ctr import vocabularies
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.vocabularies import scan_vocabularies
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.id_scan import count_ids
from mim_torchrec.data.schema import Dataset
from mim_torchrec.training.distributed import distributed
from tests.datasets import request_rows, write_requests
from tests.ranks import run_ranks


@pytest.fixture
def data(tmp_path) -> Path:
    rows = request_rows(60)
    folder = tmp_path / "data" / "requests" / "train"
    write_requests(folder / "0.parquet", rows[:37], row_group_size=5)
    write_requests(folder / "1.parquet", rows[37:], row_group_size=9)
    return tmp_path / "data"


def scan(data: Path, out: Path, **options) -> dict[str, tuple[list[int], int]]:
    config = CTRConfig(data=data, out=out, mim="off", **options)
    with distributed(0) as context:
        found = scan_vocabularies(Dataset(data), config, context, resumes=False)
        return {name: (one.ids.tolist(), one.num_embeddings) for name, one in found.items()}


def both(data: Path, out: Path, options: dict) -> dict[str, tuple[list[int], int]]:
    return scan(data, out, **options)


@pytest.mark.parametrize("options", [{}, {"min_count": 30}, {"spare_rows": 0.5, "min_count": 20}], ids=str)
def test_two_ranks_find_what_one_finds(data, tmp_path, options):
    (one,) = run_ranks(both, 1, data, tmp_path / "one", options)
    assert run_ranks(both, 2, data, tmp_path / "two", options) == [one, one]
    files, least = Dataset(data).requests("train"), options.get("min_count", 1)
    for name, counts in count_ids(files).items():
        assert one[name][0] == counts.ids[counts.counts >= least].tolist()
    assert least == 1 or sum(len(ids) for ids, _ in one.values()) < sum(
        len(counts.ids) for counts in count_ids(files).values()
    )


def test_another_run_on_the_same_files_reads_what_the_first_has_found(data, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "ids"
    first = scan(data, tmp_path / "first", id_cache=cache)
    (place,) = cache.iterdir()
    np.savez(place / "user_id.npz", ids=np.array([7]), counts=np.array([100]))
    caplog.set_level("INFO")
    second = scan(data, tmp_path / "second", id_cache=cache, min_count=2)
    assert second["user_id"][0] == [7] and second["item_id"][0] == first["item_id"][0]
    assert "the ids of 2 files are known" in caplog.text


def test_files_that_change_are_scanned_again(data, tmp_path):
    first = scan(data, tmp_path / "first", id_cache=tmp_path / "ids")
    rows = [row | {"user_id": 12345} for row in request_rows(3)]
    write_requests(data / "requests" / "train" / "1.parquet", rows)
    second = scan(data, tmp_path / "first", id_cache=tmp_path / "ids")
    assert 12345 in second["user_id"][0] and 12345 not in first["user_id"][0]


def refused(data: Path, out: Path) -> str:
    try:
        scan(data, out)
    except DataError as error:
        return str(error)
    return "nothing"


def test_a_damaged_file_is_an_error_on_both_ranks(data, tmp_path):
    file = data / "requests" / "train" / "1.parquet"
    file.write_bytes(file.read_bytes()[:100])
    assert all("1.parquet: not a readable Parquet file" in said
               for said in run_ranks(refused, 2, data, tmp_path / "out"))  # fmt: skip


def test_a_scan_that_fails_leaves_no_vocabulary_and_no_cache(data, tmp_path, monkeypatch):
    def fail(*words, **named) -> None:
        raise OSError("the disk is broken")

    monkeypatch.setattr(vocabularies.np, "savez", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        scan(data, tmp_path / "out")
    assert not (tmp_path / "out" / "vocabulary").exists()
    assert not list((tmp_path / "out" / "ids").glob("*"))
