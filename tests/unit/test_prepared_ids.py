"""Vocabularies of what `mim prepare` has counted are those of a scan; other files are scanned."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mim_torchrec.ctr import vocabularies
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.vocabularies import scan_vocabularies
from mim_torchrec.data.features import NO_FEATURES, Features
from mim_torchrec.data.id_scan import IdCounts, count_ids
from mim_torchrec.data.prepared_ids import footer_sha256, prepared_ids
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.run import prepare
from mim_torchrec.training.distributed import distributed
from tests.raw_logs import make_log, write_log
from tests.said import said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    mapping = write_log(make_log(), root / "raw", text=True)
    prepare(PrepareConfig(
        mapping=mapping, out=root / "data", max_behaviors=4, threads=1, memory="500MB", row_group_rows=8,
        negative_rate=0.5,
    ))  # fmt: skip
    return root / "data"


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def read(data: Path, features: Features = NO_FEATURES) -> dict[str, IdCounts] | None:
    dataset = Dataset(data)
    return prepared_ids(dataset, dataset.requests("train"), features)


def test_they_are_what_a_scan_finds(prepared):
    found, scanned = read(prepared), count_ids(Dataset(prepared).requests("train"))
    assert found is not None and set(found) == set(scanned) == {"user_id", "query_id", "item_id", "category"}
    for name, counts in scanned.items():
        for ours, theirs in zip(found[name]._merge(), counts._merge(), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and len(ours)


def test_a_run_on_prepared_requests_scans_nothing(prepared, tmp_path, monkeypatch):
    def scan(folder: str) -> dict[str, bytes]:
        config = CTRConfig(data=prepared, out=tmp_path / folder, mim="off", id_shrinkage=1.0)
        with distributed(0) as context:
            scan_vocabularies(Dataset(prepared), config, context, resumes=False)
        return {file.name: file.read_bytes() for file in (tmp_path / folder / "vocabulary").iterdir()}

    monkeypatch.setattr(vocabularies, "prepared_ids", lambda *words: None)
    scanned = scan("scanned")
    monkeypatch.undo()
    monkeypatch.setattr(vocabularies, "count_ids", None)
    assert scan("known") == scanned and len(scanned) > 3


def rewrite(data: Path) -> None:
    """The same number of rows, one id is another."""
    file = Dataset(data).requests("train")[0]
    table = pq.read_table(file, partitioning=None)
    ids = table["user_id"].to_numpy().copy()
    ids[0] += 1
    pq.write_table(table.set_column(table.column_names.index("user_id"), "user_id", [ids]), file)


def remove(data: Path) -> None:
    Dataset(data).requests("train")[-1].unlink()


def count_otherwise(data: Path) -> None:
    file = data / "vocabularies" / "user_id.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)


def lose(data: Path) -> None:
    (data / "vocabularies" / "item_id.parquet").unlink()


def break_manifest(data: Path) -> None:
    (data / "manifest.json").write_text("{")


def be_older(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


@pytest.mark.parametrize("change, said", [
    (rewrite, "requests/split=train/dt=2026-11-01/part-00000.parquet is not the file that it was"),
    (remove, "files of the training part, and others are read"),
    (count_otherwise, "vocabularies/user_id.parquet is not the file that it was"),
    (lose, "vocabularies/item_id.parquet is not there"),
    (break_manifest, "Expecting property name"),
    (be_older, "its format is 1, not 2"),
])  # fmt: skip
def test_other_files_are_scanned_and_the_log_says_so(data, caplog, change, said):
    change(data)
    assert read(data) is None
    assert said in caplog.text and "are scanned" in caplog.text


def test_columns_that_were_not_counted_are_scanned(prepared, caplog):
    assert read(prepared, Features(sparse=("behavior_kinds",))) is None
    assert "it has no ids of behavior_kinds" in caplog.text


def test_other_data_sets_are_scanned_without_a_word(data, caplog):
    (data / "manifest.json").unlink()
    assert read(data) is None and not said(caplog, "data.prepared_ids")


def test_a_data_set_at_a_url_is_known_too(prepared):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(prepared), "/prepared", recursive=True)
    try:
        dataset = Dataset(Url("memory://prepared"))
        found = prepared_ids(dataset, dataset.requests("train"), NO_FEATURES)
    finally:
        memory.rm("/prepared", recursive=True)
    assert found is not None and np.array_equal(found["user_id"].ids, read(prepared)["user_id"].ids)


def test_what_is_no_parquet_has_no_footer(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.parquet is no Parquet file"):
        footer_sha256(tmp_path / "a.parquet")
