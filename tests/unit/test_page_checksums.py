"""Checksums of pages, which Spark writes, are verified wherever Parquet is read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.rim.sources import DirectorySource
from tests.datasets import open_items, write_items, write_pairs, write_requests


def flipped(path: Path, column: str) -> Path:
    """The file with checksums of pages as Spark writes them, and one bit of a value flipped."""
    table = pq.read_table(path)
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, path, write_page_checksum=True, **plain)
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = (group.column(k) for k in range(group.num_columns))
    chunk = next(c for c in chunks if c.path_in_schema.split(".")[0] == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("column", ["request_id", "user_id", "ts", "candidate_item_ids", "labels"])
def test_a_flipped_bit_of_requests_is_found_by_the_checksum_of_its_page(tmp_path, column):
    file = flipped(write_requests(tmp_path / "r.parquet"), column)
    with pytest.raises(DataError, match=r"r\.parquet, row group 0: cannot be read \(.*checksum"):
        list(RequestReader([file], batch_size=3))


def test_a_flipped_bit_of_items_is_found_by_the_checksum_of_its_page(tmp_path):
    flipped(write_items(tmp_path / "items" / "i.parquet"), "image")
    with pytest.raises(DataError, match=r"i\.parquet, row group 0: cannot be read \(.*checksum"):
        ItemStore.open(Dataset(tmp_path), tmp_path / "cache")


def test_a_flipped_bit_of_pairs_is_found_by_the_checksum_of_its_page(tmp_path):
    file = flipped(write_pairs(tmp_path / "p.parquet"), "query_image")
    with pytest.raises(DataError, match=r"p\.parquet, row group 0: cannot be read \(.*checksum"):
        PairDataset([file], open_items(tmp_path))


def test_a_flipped_bit_of_new_items_is_found_by_the_checksum_of_its_page(tmp_path):
    flipped(write_items(tmp_path / "new" / "i.parquet"), "image")
    (arrival,) = DirectorySource(tmp_path / "new").read(100, 0.0)
    assert "i.parquet, row group 0: cannot be read" in arrival.problem and "checksum" in arrival.problem


def test_a_flipped_bit_of_vectors_is_found_by_the_checksum_of_its_page(tmp_path):
    table = pa.table({"id": [1, 2], "v": pa.array([[1.0] * 4, [2.0] * 4], pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "v.parquet")
    with pytest.raises(TableError, match=r"v\.parquet: columns .* cannot be read \(.*checksum"):
        import_vectors(flipped(tmp_path / "v.parquet", "v"), tmp_path / "table")
