"""Rows in any order are brought into the order of ids through files.

They are dealt out to files of consecutive ids, and each file is sorted when it is read: memory is for the ids
of one file, a batch of rows, and 8 bytes a file.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.embeddings.table.shards import CHUNK


class Buckets:
    """Rows dealt out to files of consecutive ids, and read back in ascending order of ids.

    Args:
        folder: where the files are; made here.
        ids: (num_rows,) int64, all ids to come, ascending.
        rows: rows of a file, and so of what is sorted in memory.
        dim: length of a vector.
        dtype: type that the vectors are kept in.
    """

    def __init__(self, folder: Path, ids: np.ndarray, rows: int, dim: int, dtype: torch.dtype) -> None:
        folder.mkdir()
        self._folder, self._dim, self._dtype = folder, dim, dtype
        self._bounds = torch.from_numpy(ids[rows::rows].copy())

    def add(self, ids: Tensor, vectors: Tensor) -> None:
        """Deal out ids (num_rows,) and vectors (num_rows, dim)."""
        bucket, order = torch.bucketize(ids, self._bounds, right=True).sort(stable=True)
        numbers, counts = bucket.unique_consecutive(return_counts=True)
        vectors = vectors.to(self._dtype)[order].view(torch.uint8)
        sizes = counts.tolist()
        for number, own, stored in zip(
            numbers.tolist(), ids[order].split(sizes), vectors.split(sizes), strict=True
        ):
            for name, rows in (("ids", own), ("vectors", stored)):
                with self._file(number, name).open("ab") as file:
                    file.write(rows.numpy().data)

    def read(self, last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all rows in ascending order of ids; the ``last`` time each file goes when it was read."""
        for number in range(self._bounds.numel() + 1):
            files = [self._file(number, name) for name in ("ids", "vectors")]
            unsorted = np.fromfile(files[0], dtype=np.int64)
            order = torch.from_numpy(np.argsort(unsorted))
            ids = torch.from_numpy(unsorted)
            vectors = torch.from_numpy(np.memmap(files[1], dtype=np.uint8, mode="c"))
            vectors = vectors.view(self._dtype).reshape(-1, self._dim)
            for start in range(0, ids.numel(), CHUNK):
                own = slice(start, start + CHUNK)
                yield ids[order[own]], vectors[order[own]]
            if last:
                for file in files:
                    file.unlink()
        if last:
            shutil.rmtree(self._folder)

    def _file(self, number: int, name: str) -> Path:
        return self._folder / f"{number:05d}.{name}"
