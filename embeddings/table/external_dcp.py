"""A table of a distributed checkpoint (DCP) as vectors: rows that ``torch.distributed.checkpoint`` has saved.

TorchRec's sharded tables are saved in blocks of rows or columns, one for each rank. They are mapped where
they lie in the files, so that a table of any size is read a batch of rows at a time. Its ids are row numbers.

Not here: checkpoints on other storage than a directory, compressed ones, and loading a whole model.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from mim_torchrec.embeddings.table.external import (
    as_delivered,
    batch_rows,
    delivered_dtype,
    type_name,
)
from mim_torchrec.embeddings.table.external_tensors import ID_TYPES, VECTOR_TYPES, map_npy
from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.embeddings.table.shards import CHUNK


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds a distributed checkpoint."""
    return (path / ".metadata").is_file()


class CheckpointSource:
    """Rows of one table of a checkpoint; see :class:`external.ExternalVectors`.

    Args:
        path: the checkpoint's directory.
        key: name of the tensor; ``None`` takes the only one of two dimensions.
        ids: a ``.npy`` of the ids of its rows (num_rows,); ``None``: ids are row numbers.

    Raises:
        TableError: it is no checkpoint, has no such tensor of vectors, or lacks a part of it; or there are
            not as many ids as rows.
    """

    format = "dcp"
    has_text_ids = False

    def __init__(self, path: Path, key: str | None, ids: Path | None = None) -> None:
        self.path = path
        metadata = _metadata(path)
        key = _key(path, metadata, key)
        self.columns = ("row number" if ids is None else "ids", key)
        stored = cast(TensorStorageMetadata, metadata.state_dict_metadata[key])
        self.rows, self.dim = stored.size
        if stored.properties.dtype not in VECTOR_TYPES:
            raise TableError(
                f"{path}: {key!r} is {type_name(stored.properties.dtype)}, expected vectors of "
                f"{', '.join(map(type_name, VECTOR_TYPES))}"
            )
        self.dtype = delivered_dtype(stored.properties.dtype)
        places = metadata.storage_data or {}
        self._blocks = [
            (int(index.offset[0]), int(index.offset[1]), _map(path, key, place))
            for index, place in places.items()
            if index.fqn == key and index.offset is not None
        ]
        found = sum(values.numel() for _, _, values in self._blocks)
        if found != self.rows * self.dim:
            raise TableError(
                f"{path}: {key!r} is {self.rows} x {self.dim}, but its parts hold {found} values; save the "
                f"checkpoint again"
            )

        self._ids = None if ids is None else _read_ids(ids)
        if self._ids is not None and self._ids.shape != (self.rows,):
            raise TableError(
                f"{ids}: {tuple(self._ids.shape)} ids, but {path} has {self.rows} rows of {key!r}; one id is "
                f"needed for each row"
            )

    def ids(self) -> Iterator[Tensor]:
        for start in range(0, self.rows, CHUNK):
            yield self._ids_of(start, min(start + CHUNK, self.rows))

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = batch_rows(self.dim)
        for start in range(0, self.rows, step):
            ids = self._ids_of(start, min(start + step, self.rows))
            yield ids, as_delivered(self, ids, self._values(start, start + ids.numel()), start)

    def place(self, row: int) -> str:
        return f"{self.path}: row {row}"

    def _ids_of(self, start: int, stop: int) -> Tensor:
        if self._ids is None:
            return torch.arange(start, stop)
        return self._ids[start:stop].to(torch.int64)  # uint64: two's complement

    def _values(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, self.dim, dtype=self._blocks[0][2].dtype)
        for row, column, values in self._blocks:
            first, last = max(start, row), min(stop, row + values.shape[0])
            if first < last:
                out[first - start : last - start, column : column + values.shape[1]] = values[
                    first - row : last - row
                ]
        return out


def _read_ids(file: Path) -> Tensor:
    ids = map_npy(file)
    if ids.dtype not in ID_TYPES:
        raise TableError(f"{file}: is {type_name(ids.dtype)}, expected the ids as integers (num_rows,)")
    return ids


def _metadata(path: Path) -> Metadata:
    try:
        return FileSystemReader(path).read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise TableError(
            f"{path / '.metadata'}: not readable as a distributed checkpoint ({error})"
        ) from None


def _key(path: Path, metadata: Metadata, key: str | None) -> str:
    tables = {
        name: "{} x {} {}".format(*found.size, type_name(found.properties.dtype))
        for name, found in metadata.state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata) and len(found.size) == 2 and all(found.size)
    }
    if key in tables:
        return key
    if key is None and len(tables) == 1:
        return next(iter(tables))
    problem = f"has no table {key!r}" if key is not None else f"has {len(tables)} tensors of two dimensions"
    there = ", ".join(f"{name!r} ({size})" for name, size in tables.items()) or "none"
    raise TableError(f"{path}: {problem}; name one with --key; there are {there}")


def _map(path: Path, key: str, place: Any) -> Tensor:
    """Map a block of a tensor where it lies in a file of the checkpoint; nothing is read of its values.

    A block is a file of ``torch.save`` within the checkpoint's file. Loaded as a fake tensor, it says where
    in it the values begin.
    """
    if place.transform_descriptors:
        raise TableError(f"{path}: {key!r} is compressed or changed by {place.transform_descriptors}")
    file = path / place.relative_path
    try:
        with file.open("rb") as opened, FakeTensorMode():
            view = cast(IO[bytes], _create_file_view(opened, place.offset, place.length))
            fake = torch.load(view, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise TableError(f"{file}: a part of {key!r} is not readable ({error})") from None
    if not fake.is_contiguous():
        raise TableError(f"{file}: a part of {key!r} is not contiguous; save a contiguous tensor")
    size = fake.dtype.itemsize
    start = place.offset + fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * size
    count = fake.numel() * size
    if file.stat().st_size < start + count:
        raise TableError(f"{file}: is shorter than its metadata say")
    values = np.memmap(file, dtype=np.uint8, mode="c", offset=start, shape=(count,))
    return torch.from_numpy(values).view(fake.dtype).view(fake.shape)
