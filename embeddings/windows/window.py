"""A window: items with their vectors, and deleted items, under one sequence number (§3.5, RIM).

Every reader applies windows by one rule, `is_due`. A window may be delivered twice and takes effect once.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mim_torchrec.embeddings.table.manifest import (
    DuplicateId,
    NonFiniteVector,
    TableError,
    VersionMismatch,
)
from mim_torchrec.embeddings.table.quantize import DTYPES, decode, encode, finite_rows, stored_width
from mim_torchrec.embeddings.table.shards import check_loss
from mim_torchrec.errors import Status

FORMAT_VERSION = "1"
TENSORS = ("ids", "vectors", "removed")


class MalformedWindow(TableError):
    """Bytes that are no window, or not the ones that were written."""


class WindowGap(TableError):
    """A window does not follow the last one that was applied."""

    status = Status.VERSION


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Changes of a table.

    Args:
        table_version: of the encoder that made the vectors.
        seq: place in the log; the first is 1.
        window_id: name that its maker gave it, the same when it is delivered again.
        dtype: storage type, a key of `quantize.DTYPES`.
        dim: length of a vector.
        ids: (num_items,) int64, each once.
        vectors: (num_items, stored_width) as stored.
        removed: (num_removed,) int64, items deleted, none of which is in `ids`.

    Raises:
        DuplicateId: an id is there twice.
        NonFiniteVector: a vector holds NaN or infinity.
        TableError: shapes or types do not fit.
    """

    table_version: str
    seq: int
    window_id: str
    dtype: str
    dim: int
    ids: Tensor
    vectors: Tensor
    removed: Tensor

    def __post_init__(self) -> None:
        name = f"window {self.seq} ({self.window_id})"
        if self.dtype not in DTYPES:
            raise TableError(f"{name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.seq < 1:
            raise TableError(f"{name}: sequence numbers begin at 1")
        width = (self.ids.numel(), stored_width(self.dtype, self.dim))
        if self.vectors.shape != width or self.vectors.dtype != DTYPES[self.dtype]:
            raise TableError(
                f"{name}: {self.ids.numel()} ids of {self.dtype} vectors of {self.dim} need {width}, found "
                f"{self.vectors.dtype} {tuple(self.vectors.shape)}"
            )
        for ids in (self.ids, self.removed):
            if ids.dtype != torch.int64 or ids.dim() != 1:
                raise TableError(f"{name}: ids are (n,) int64, found {ids.dtype} {tuple(ids.shape)}")
        found, counts = torch.cat([self.ids, self.removed]).unique(return_counts=True)
        if (counts > 1).any():
            raise DuplicateId(f"{name}: item id {int(found[counts > 1][0])} is there twice")
        finite = finite_rows(self.vectors, self.dtype)
        if not finite.all():
            wrong = int(self.ids[~finite][0])
            raise NonFiniteVector(f"{name}, item id {wrong}: the vector holds NaN or infinity")

    @classmethod
    def of(
        cls,
        ids: Tensor,
        vectors: Tensor,
        *,
        table_version: str,
        seq: int,
        window_id: str,
        dtype: str = "float16",
        removed: Tensor | None = None,
    ) -> "Window":
        """A window of vectors (num_items, dim) floating point.

        Raises:
            LossyVector: a vector is too small for ``dtype``; all else as for a window.
        """
        made = cls(
            table_version=table_version, seq=seq, window_id=window_id, dtype=dtype, dim=vectors.shape[1],
            ids=ids, vectors=encode(vectors.float(), dtype),
            removed=torch.empty(0, dtype=torch.int64) if removed is None else removed,
        )  # fmt: skip
        made._check_loss(vectors, made.vectors, dtype)
        return made

    def stored_as(self, dtype: str) -> Tensor:
        """The vectors as another table stores them; its own type is exact.

        Raises:
            NonFiniteVector: a vector overflows the type.
            LossyVector: a vector is too small for the type.
        """
        if dtype == self.dtype:
            return self.vectors
        vectors = decode(self.vectors, self.dtype)
        stored = encode(vectors, dtype)
        finite = finite_rows(stored, dtype)
        if not finite.all():
            wrong = int(self.ids[~finite][0])
            raise NonFiniteVector(f"window {self.seq}, item id {wrong}: the vector overflows {dtype}")
        self._check_loss(vectors, stored, dtype)
        return stored

    def _check_loss(self, vectors: Tensor, stored: Tensor, dtype: str) -> None:
        remedy = "write windows and table as float32, or scale the vectors"
        check_loss(vectors, stored, dtype, self.ids, lambda row: f"window {self.seq}, row {row}", remedy)

    def to_bytes(self) -> bytes:
        """A safetensors file, whose metadata has a SHA-256 of everything."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        facts = {
            field.name: str(getattr(self, field.name)) for field in fields(self) if field.name not in TENSORS
        } | {"format_version": FORMAT_VERSION}
        return save(tensors, metadata=facts | {"sha256": _digest(tensors, facts)})

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Window":
        """Read what `to_bytes` gave.

        Args:
            data: the bytes.
            source: where they are from, for messages.

        Raises:
            MalformedWindow: they are no window, or not as they were written.
        """
        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            facts = json.loads(data[8 : 8 + length])["__metadata__"]
            expected = facts.pop("sha256")
        except (SafetensorError, ValueError, KeyError) as error:
            raise MalformedWindow(f"{source} is no window: {error!r}") from None
        if facts.get("format_version") != FORMAT_VERSION or set(tensors) != set(TENSORS):
            raise MalformedWindow(
                f"{source}: format_version {facts.get('format_version')!r} with {', '.join(sorted(tensors))}"
                f"; this release reads {FORMAT_VERSION} with {', '.join(TENSORS)}"
            )
        if _digest(tensors, facts) != expected:
            raise MalformedWindow(f"{source}: its bytes are not those that were written")
        facts.pop("format_version")
        numbers: dict[str, Any] = {name: int(facts.pop(name)) for name in ("seq", "dim")}
        parts: dict[str, Any] = tensors
        return cls(**facts, **numbers, **parts)


def is_due(window_version: str, seq: int, table_version: str, watermark: int) -> bool:
    """The rule of every reader of windows.

    Args:
        window_version: `table_version` of the window.
        seq: of the window.
        table_version: of the table that it comes to.
        watermark: seq of the last window that was applied there.

    Returns:
        Whether to apply the window, and then move the watermark to its seq; False where that has been done.

    Raises:
        VersionMismatch: the vectors are of another encoder.
        WindowGap: windows are missing in between.

    >>> is_due("v1", 3, "v1", 2), is_due("v1", 2, "v1", 2)
    (True, False)
    """
    if window_version != table_version:
        raise VersionMismatch(f"the table has table_version {table_version}, window {seq} {window_version}")
    if seq > watermark + 1:
        raise WindowGap(
            f"window {seq} comes after {watermark}: those in between are gone; open the newest base table, "
            "which holds them"
        )
    return seq > watermark


def _digest(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in TENSORS:
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
