"""Images and tables by path and URL: read in parallel, so many at a time, in order, missing ones counted."""

import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.prepare.engines import DuckDB
from mim_torchrec.prepare.files import find_files
from mim_torchrec.prepare.images import ImageReader, attach


def test_images_come_in_order_and_missing_ones_are_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").write_bytes(b"")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/images/c", b"c")
    with ImageReader(str(tmp_path), 2) as reader:
        places = ["b", "no such file", None, "a", "empty", "memory://images/c", "memory://images/d"]
        assert reader.read(places) == [b"b", None, None, b"a", None, b"c", None]
        assert (reader.missing, reader.empty) == (3, 1)
    with ImageReader("memory://images", 1) as reader:
        assert reader.read(["c"]) == [b"c"]


class Waiting:
    """A file system whose reads wait until three are at work."""

    def __init__(self) -> None:
        self.barrier, self.lock = threading.Barrier(3, timeout=60), threading.Lock()
        self.now = self.most = 0

    def cat_file(self, path: str) -> bytes:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.barrier.wait()
        with self.lock:
            self.now -= 1
        return path.encode()


def test_so_many_images_are_read_at_a_time(monkeypatch):
    system = Waiting()
    monkeypatch.setattr(fsspec, "filesystem", lambda name: system)
    with ImageReader("/images", 3) as reader:
        assert reader.read([str(k) for k in range(9)]) == [f"/images/{k}".encode() for k in range(9)]
    assert system.most == 3


def test_an_image_that_cannot_be_read_is_an_error(monkeypatch):
    class Refusing:
        def cat_file(self, path: str) -> bytes:
            raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(fsspec, "filesystem", lambda name: Refusing())
    with ImageReader("/images", 2) as reader, pytest.raises(PermissionError, match="/images/a"):
        reader.read(["a"])


def test_bytes_are_attached_to_every_row_of_their_key_from_the_first_place():
    rows = pa.table({"key": [1, 1, 3, 5], "name": ["a", "b", "c", "d"]})
    streamed = [
        (np.array([3, 9, 3]), pa.array([b"three", b"nine", b"other"])),
        (np.array([1, 3]), pa.array([b"one", b"late"])),
    ]
    found = pa.concat_tables(attach(rows, "key", iter(streamed))).to_pylist()
    assert found == [
        {"key": 3, "name": "c", "image": b"three"},
        {"key": 1, "name": "a", "image": b"one"},
        {"key": 1, "name": "b", "image": b"one"},
    ]


def test_tables_behind_a_url_are_read(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("dt=1/part-0.parquet", "dt=2/part-0.parquet", "_delta_log/x.parquet", "dt=2/.part.parquet"):
        with memory.open(f"/logs/{name}", "wb") as file:
            pq.write_table(pa.table({"n": [len(name)]}), file)
    files = find_files("events.click", "memory://logs", tmp_path, ["n"])
    assert [path.partition("logs/")[2] for path in files.paths] == [
        "dt=1/part-0.parquet", "dt=2/part-0.parquet",
    ]  # fmt: skip
    engine = DuckDB(tmp_path, "200MB", 1)
    assert engine.fetch(engine.read(files))["n"].to_pylist() == [19, 19]
    engine.close()
