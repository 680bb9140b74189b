"""Vectors of another team as tensors: ``.npy`` beside a ``.npy`` of ids, ``.npz``, and safetensors.

``.npy`` and safetensors are mapped into memory; the two arrays of an ``.npz`` are read into it.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mim_torchrec.embeddings.stable_ids import IdCollision, stable_ids
from mim_torchrec.embeddings.table.external import (
    as_delivered,
    batch_rows,
    delivered_dtype,
    type_name,
)
from mim_torchrec.embeddings.table.manifest import TableError
from mim_torchrec.embeddings.table.shards import CHUNK

ID_TYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
VECTOR_TYPES = (
    torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int16, torch.uint16, torch.int32,
)  # fmt: skip


class TensorSource:
    """Ids and vectors as two tensors that are mapped into memory; see :class:`external.ExternalVectors`."""

    def __init__(
        self,
        path: Path,
        kind: str,
        columns: tuple[str, str],
        ids: Tensor,
        vectors: Tensor,
        ids_from: Path,
        has_text_ids: bool = False,
    ) -> None:
        self.path, self.format, self.columns, self.has_text_ids = path, kind, columns, has_text_ids
        if ids.ndim != 1 or ids.dtype not in ID_TYPES:
            raise TableError(
                f"{ids_from}: {columns[0]!r} is {type_name(ids.dtype)} {tuple(ids.shape)}, expected the ids "
                f"as integers (num_rows,)"
            )
        if vectors.ndim != 2 or not vectors.shape[1] or vectors.dtype not in VECTOR_TYPES:
            raise TableError(
                f"{path}: {columns[1]!r} is {type_name(vectors.dtype)} {tuple(vectors.shape)}, expected "
                f"vectors (num_rows, dim) of {', '.join(map(type_name, VECTOR_TYPES))}"
            )
        if ids.numel() != vectors.shape[0]:
            raise TableError(
                f"{ids_from}: {ids.numel()} ids {columns[0]!r}, but {vectors.shape[0]} vectors "
                f"{columns[1]!r} in {path}; one id is needed for each vector"
            )
        self.rows, self.dim = vectors.shape
        self.dtype = delivered_dtype(vectors.dtype)
        self._ids, self._vectors = ids, vectors

    def ids(self) -> Iterator[Tensor]:
        for start in range(0, self.rows, CHUNK):
            yield self._ids[start : start + CHUNK].to(torch.int64)  # uint64: two's complement

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = batch_rows(self.dim)
        for start in range(0, self.rows, step):
            ids = self._ids[start : start + step].to(torch.int64)
            yield ids, as_delivered(self, ids, self._vectors[start : start + step], start)

    def place(self, row: int) -> str:
        return f"{self.path}: row {row}"


def open_npy(path: Path, ids: Path) -> TensorSource:
    """Map a ``.npy`` of vectors (num_rows, dim) and one of their ids (num_rows,)."""
    own, has_text = _map_ids(ids)
    return TensorSource(path, "npy", ("ids", "vectors"), own, map_npy(path), ids, has_text)


def _map_ids(file: Path) -> tuple[Tensor, bool]:
    """Map a ``.npy`` of ids, or read those that are text; and say whether they are."""
    array = _load(file)
    if array.dtype.kind != "U":
        return map_npy(file), False
    return _of_text(file, array), True


def map_npy(file: Path) -> Tensor:
    """Map a ``.npy`` of numbers."""
    try:
        return torch.from_numpy(_load(file))
    except (ValueError, TypeError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{file}: not a readable .npy file of numbers ({error})") from None


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise TableError(f"{file}: not found") from None
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise TableError(f"{file}: not a readable .npy file of numbers ({error})") from None


def open_npz(path: Path, id_name: str, vector_name: str) -> TensorSource:
    """Read an ``.npz`` with an array of ids (num_rows,), also of text, and one of vectors (num_rows, dim)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if lacking := {id_name, vector_name} - set(file.files):
                raise TableError(
                    f"{path}: no array {sorted(lacking)}, there are {sorted(file.files)}; say which are ids "
                    f"and vectors with --id-column and --vector-column"
                )
            ids, vectors = file[id_name], file[vector_name]
    except TableError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TableError(f"{path}: not a readable .npz file of numbers ({error})") from None
    has_text = ids.dtype.kind == "U"
    try:
        found, made = _of_text(path, ids) if has_text else torch.from_numpy(ids), torch.from_numpy(vectors)
    except (TypeError, ValueError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path}: not arrays of numbers ({error})") from None
    return TensorSource(path, "npz", (id_name, vector_name), found, made, path, has_text)


def _of_text(file: Path, ids: np.ndarray) -> Tensor:
    if ids.ndim != 1:
        raise TableError(f"{file}: the ids are text of shape {ids.shape}, expected (num_rows,)")
    try:
        return torch.from_numpy(stable_ids(pa.array(ids)).to_numpy().copy())
    except IdCollision as error:
        raise TableError(f"{file}: {error}") from None


def open_safetensors(path: Path, id_name: str, vector_name: str) -> TensorSource:
    """Map a safetensors file with a tensor of ids (num_rows,) and one of vectors (num_rows, dim)."""
    try:
        with safe_open(path, framework="pt") as file:
            if lacking := {id_name, vector_name} - set(file.keys()):
                raise TableError(
                    f"{path}: no tensor {sorted(lacking)}, there are {sorted(file.keys())}; say which are "
                    f"ids and vectors with --id-column and --vector-column"
                )
            ids, vectors = file.get_tensor(id_name), file.get_tensor(vector_name)
    except SafetensorError as error:
        raise TableError(f"{path}: not a readable safetensors file ({error})") from None
    return TensorSource(path, "safetensors", (id_name, vector_name), ids, vectors, path)
