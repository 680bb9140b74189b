"""Encoded images of items and searches, read beside the relational program and never joined in it.

Threads read paths and URLs: the work is waiting for a disk or an object store, during which Python lets
others run, so a second framework would add nothing. At most one batch is in memory. Images that are bytes in
the user's files are streamed in the order of these files.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.prepare.files import Files, is_url

BATCH = 256


class ImageReader:
    """Reads images by path or URL, so many at a time. Use it as a context manager.

    Args:
        base: folder or URL that relative paths are relative to.
        threads: how many at a time.

    `missing` and `empty` count images that are not there and files without bytes.
    """

    def __init__(self, base: str, threads: int) -> None:
        self._base = base.rstrip("/")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._systems = threading.local()
        self.missing = self.empty = 0

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, places: Sequence[str | None]) -> list[bytes | None]:
        """Images in the order of their places; None where there is none.

        Raises:
            OSError: an image is there and cannot be read.
        """
        images = list(self._pool.map(self._one, places))
        self.missing += sum(image is None for image in images)
        self.empty += sum(image == b"" for image in images)
        return [image or None for image in images]

    def _one(self, place: str | None) -> bytes | None:
        if place is None:
            return None
        path = place if is_url(place) or place.startswith("/") else f"{self._base}/{place}"
        protocol, _, _ = path.partition("://")
        systems: dict[str, Any] = self._systems.__dict__
        name = protocol if is_url(path) else "file"
        if name not in systems:
            systems[name] = fsspec.filesystem(name)
        try:
            return systems[name].cat_file(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


def with_images(rows: pa.Table, reader: ImageReader) -> Iterator[pa.Table]:
    """Rows with `image` (a place, or null) replaced by the bytes, some at a time."""
    for start in range(0, len(rows), BATCH):
        part = rows.slice(start, BATCH)
        images = pa.array(reader.read(part["image"].to_pylist()), pa.binary())
        yield part.set_column(part.column_names.index("image"), "image", images)


def stream_images(files: Files, key: str, image: str, is_text: bool) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Keys and images of files whose images are bytes, some rows at a time.

    Args:
        files: Parquet files.
        key: column of the ids.
        image: column of the images.
        is_text: ids are kept as text, so integers in the files are hashed as text too.

    Yields:
        (n,) int64 stable ids, and (n,) binary.

    Raises:
        DataError: a file cannot be read.
    """
    for path in files.paths:
        try:
            with fsspec.open(path, "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=[key, image]):
                    ids = batch.column(key)
                    known = ids.is_valid()
                    ids = ids.filter(known)
                    if is_text and pa.types.is_integer(ids.type):
                        ids = ids.cast(pa.string())
                    elif not is_text:
                        ids = ids.cast(pa.int64())
                    yield np.asarray(stable_ids(ids)), batch.column(image).filter(known).cast(pa.binary())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot be read ({error}); copy or write it again", file=path) from None


def attach(rows: pa.Table, key: str, streamed: Iterator[tuple[np.ndarray, pa.Array]]) -> Iterator[pa.Table]:
    """Rows with the image of the first row in the files that has their key, in the order of the files.

    Args:
        rows: sorted by `key` (int64), which may repeat.
        key: column.
        streamed: see :func:`stream_images`.

    Yields:
        Parts of `rows` with a column `image`. Rows whose key does not come are not there.
    """
    keys = rows[key].to_numpy()
    seen = np.zeros(len(rows), bool)
    for ids, images in streamed:
        _, first = np.unique(ids, return_index=True)
        first = np.sort(first)
        begins = np.searchsorted(keys, ids[first], "left")
        counts = np.searchsorted(keys, ids[first], "right") - begins
        places = np.repeat(begins + counts - np.cumsum(counts), counts) + np.arange(counts.sum())
        of = np.repeat(first, counts)
        new = ~seen[places]
        seen[places] = True
        if new.any():
            part = rows.take(pa.array(places[new]))
            yield part.append_column("image", images.take(pa.array(of[new])))
