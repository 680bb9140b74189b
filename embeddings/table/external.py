"""Vectors of another team: what a file of them gives, and the checks that all files share.

A source gives ids as int64 and vectors in their own type (float64, and integers other than int8, as float32),
a batch of rows at a time, and refuses by file, row, id and column what cannot be imported.
``external_parquet.py``, ``external_tensors.py`` and ``external_dcp.py`` know the files.
``stable_ids.py`` says which numbers ids of text, UUIDs and uint64 become. Not here: text formats, sparse
vectors, and int8 vectors that come with a scale.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mim_torchrec.embeddings.table.manifest import NonFiniteVector
from mim_torchrec.embeddings.table.shards import CHUNK, check_loss

BATCH_BYTES = 32 << 20  # of a batch's vectors as float32
KEPT = (torch.int8, torch.float16, torch.bfloat16, torch.float32)  # types that sources give as they are


class ExternalVectors(Protocol):
    """One file of ids and vectors.

    ``dtype`` is the type of the vectors as :meth:`read` gives them; ``columns`` names the column or tensor of
    the ids and that of the vectors; ``has_text_ids`` says whether the ids are text in the file.
    """

    path: Path
    format: str
    columns: tuple[str, str]
    rows: int
    dim: int
    dtype: torch.dtype
    has_text_ids: bool

    def ids(self) -> Iterator[Tensor]:
        """Give the ids in the order of the file: int64 (num_rows,), a batch at a time."""

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give ids (num_rows,) and finite vectors (num_rows, dim), a batch at a time."""

    def place(self, row: int) -> str:
        """Say where a row of the file is."""


def places(sources: Iterable[ExternalVectors], item: int) -> list[str]:
    """Say where all rows of an item id are, by reading the ids again."""
    found = []
    for source in sources:
        at = 0
        for ids in source.ids():
            found += [source.place(at + int(row)) for row in (ids == item).nonzero()[:, 0]]
            at += ids.numel()
    return found


def batch_rows(dim: int) -> int:
    """Return how many rows make a batch."""
    return max(1, min(CHUNK, BATCH_BYTES // (4 * dim)))


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type as messages and the manifest have it.

    >>> type_name(torch.int8)
    'int8'
    """
    return str(dtype).removeprefix("torch.")


def delivered_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a source gives vectors that lie in its file as ``dtype``."""
    return dtype if dtype in KEPT else torch.float32


def as_delivered(source: ExternalVectors, ids: Tensor, vectors: Tensor, start: int) -> Tensor:
    """Return vectors (num_rows, dim) of the rows of ``source`` from ``start`` in the type it gives.

    Raises:
        NonFiniteVector: one holds NaN or infinity, or is too large for float32.
        LossyVector: one of float64 is too small for float32.
    """
    made = vectors.to(source.dtype)
    if made.is_floating_point() and (wrong := (~torch.isfinite(made).all(1)).nonzero()).numel():
        row = int(wrong[0])
        finite = bool(torch.isfinite(vectors[row]).all())
        problem = "is too large for float32" if finite else "holds NaN or infinity"
        raise NonFiniteVector(
            f"{source.place(start + row)}, item id {int(ids[row])}, column {source.columns[1]!r}: the vector "
            f"{problem}; leave the row out or fix it"
        )
    if vectors.dtype == torch.float64:
        place = f", column {source.columns[1]!r}"
        check_loss(
            vectors, made, "float32", ids, lambda row: source.place(start + row) + place, "scale the vectors"
        )
    return made
