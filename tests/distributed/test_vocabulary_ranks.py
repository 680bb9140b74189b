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
from mim_torchrec.errors import OptionError
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


Found = dict[str, tuple[list[int], int, list[int]]]


def scan(data: Path, out: Path, **options) -> Found:
    """By name: ids, rows of the table, impressions by row."""
    config = CTRConfig(data=data, out=out, mim="off", id_shrinkage=1.0, **options)
    with distributed(0) as context:
        found = scan_vocabularies(Dataset(data), config, context, resumes=False)
        return {name: (one.ids.tolist(), one.num_embeddings, one.impressions.tolist())
                for name, one in found.items()}  # fmt: skip


def both(data: Path, out: Path, options: dict) -> Found:
    return scan(data, out, **options)


@pytest.mark.parametrize("options", [{}, {"min_count": 30}, {"spare_rows": 0.5, "min_count": 20}], ids=str)
def test_two_ranks_find_what_one_finds(data, tmp_path, options):
    (one,) = run_ranks(both, 1, data, tmp_path / "one", options)
    assert run_ranks(both, 2, data, tmp_path / "two", options) == [one, one]
    files, least = Dataset(data).requests("train"), options.get("min_count", 1)
    for name, counts in count_ids(files).items():
        kept = counts.counts >= least
        assert one[name][0] == counts.ids[kept].tolist()
        assert one[name][2] == [counts.impressions[~kept].sum(), *counts.impressions[kept]]
    assert least == 1 or sum(len(found[0]) for found in one.values()) < sum(
        len(counts.ids) for counts in count_ids(files).values()
    )


def test_another_run_on_the_same_files_reads_what_the_first_has_found(data, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "ids"
    first = scan(data, tmp_path / "first", id_cache=cache)
    (place,) = cache.iterdir()
    np.savez(place / "user_id.npz", ids=np.array([7]), counts=np.array([100]), impressions=np.array([60]))
    caplog.set_level("INFO")
    second = scan(data, tmp_path / "second", id_cache=cache, min_count=2)
    assert second["user_id"] == ([7], 2, [0, 60]) and second["item_id"][0] == first["item_id"][0]
    assert "the ids of 2 files are known" in caplog.text


def test_files_that_change_are_scanned_again(data, tmp_path):
    first = scan(data, tmp_path / "first", id_cache=tmp_path / "ids")
    rows = [row | {"user_id": 12345} for row in request_rows(3)]
    write_requests(data / "requests" / "train" / "1.parquet", rows)
    second = scan(data, tmp_path / "first", id_cache=tmp_path / "ids")
    assert 12345 in second["user_id"][0] and 12345 not in first["user_id"][0]


def test_impressions_add_up_where_a_run_begins_from_another(data, tmp_path):
    first = scan(data, tmp_path / "first", min_count=20)
    second = scan(data, tmp_path / "second", warm_start=tmp_path / "first", min_count=10)
    counts = count_ids(Dataset(data).requests("train"))
    for name, (ids, _, impressions) in second.items():
        known, _, before = first[name]
        now, then = dict(zip(ids, impressions[1:], strict=True)), dict(zip(known, before[1:], strict=True))
        own = dict(zip(counts[name].ids.tolist(), counts[name].impressions.tolist(), strict=True))
        assert now == {i: own[i] + then.get(i, 0) for i in ids}
        assert impressions[0] == before[0] + sum(own.values()) - sum(own[i] for i in ids)
        assert len(known) <= len(ids)
    assert any(len(first[name][0]) < len(second[name][0]) for name in second)


def test_a_table_that_the_requests_do_not_have_cannot_be_shrunk(data, tmp_path):
    with pytest.raises(OptionError, match="--id-shrinkage-of shop: there is no such table"):
        scan(data, tmp_path / "out", id_shrinkage_of={"shop": 3.0})


def test_an_earlier_run_without_counts_is_refused_where_they_are_needed(data, tmp_path):
    scan(data, tmp_path / "first")
    for file in (tmp_path / "first" / "vocabulary").glob("*.npz"):
        with np.load(file) as stored:
            old = {name: stored[name] for name in ("ids", "num_embeddings")}
        np.savez(file, **old)
    with pytest.raises(OptionError, match="vocabularies of earlier releases do not hold"):
        scan(data, tmp_path / "second", warm_start=tmp_path / "first")


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
