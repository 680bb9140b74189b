"""One shard file of a table: mapping it into memory, and checking its bytes, ids and vectors."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mim_torchrec.embeddings.files import sha256
from mim_torchrec.embeddings.table.manifest import (
    ChecksumMismatch,
    DuplicateId,
    IncompleteTable,
    LossyVector,
    Manifest,
    NonFiniteVector,
    ShardInfo,
    TableError,
    VersionMismatch,
)
from mim_torchrec.embeddings.table.quantize import (
    LOSS_LIMIT,
    finite_rows,
    is_quantized,
    relative_errors,
)

CHUNK = 1 << 16  # rows looked at together: all temporary memory is of this many rows


def map_shard(path: Path, manifest: Manifest, info: ShardInfo) -> tuple[Tensor, Tensor]:
    """Map a shard of the table at ``path``: nothing is read but the ids, which must ascend.

    Returns:
        ids (num_rows,) int64 and vectors (num_rows, stored_width), both in the page cache and not in private
        memory; what is written into them stays in this process.

    Raises:
        TableError: the file is absent, unreadable, or not as its manifest says.
    """
    file = shard_file(path, info)
    try:
        with safe_open(file, framework="pt") as shard:
            if set(shard.keys()) != {"ids", "vectors"}:
                raise TableError(f"{file}: holds {sorted(shard.keys())}, expected ids and vectors")
            ids, vectors = shard.get_tensor("ids"), shard.get_tensor("vectors")
            written_as = (shard.metadata() or {}).get("table_version")
    except SafetensorError as error:
        raise TableError(f"{file}: not a readable safetensors file ({error})") from None
    if written_as != manifest.table_version:
        raise VersionMismatch(
            f"{file}: table_version is {written_as}, its manifest says {manifest.table_version}"
        )
    expected = (info.rows, manifest.stored_width)
    if ids.dtype != torch.int64 or ids.shape != expected[:1]:
        raise TableError(f"{file}: ids are {ids.dtype} {tuple(ids.shape)}, expected int64 {expected[:1]}")
    if vectors.dtype != manifest.torch_dtype or vectors.shape != expected:
        raise TableError(
            f"{file}: vectors are {vectors.dtype} {tuple(vectors.shape)}, "
            f"expected {manifest.dtype} {expected}"
        )
    check_ascending(ids, file)
    return ids, vectors


def shard_file(path: Path, info: ShardInfo) -> Path:
    """The file of a shard of the table at ``path``.

    Raises:
        IncompleteTable: the file is absent.
        TableError: it is a link to a file outside the table.
    """
    file = path / info.file
    if not file.is_file():
        raise IncompleteTable(f"{file}: listed in the manifest but not found")
    if file.is_symlink() and not file.resolve().is_relative_to(path.resolve()):
        raise TableError(f"{file}: a link to {file.resolve()}, which is outside the table; copy the file")
    return file


def verify_shard(path: Path, info: ShardInfo) -> None:
    """Compare a shard's bytes with its SHA-256.

    Raises:
        IncompleteTable: the file is absent.
        ChecksumMismatch: the bytes differ.
    """
    file = shard_file(path, info)
    if (found := sha256(file)) != info.sha256:
        raise ChecksumMismatch(
            f"{file}: SHA-256 is {found}, its manifest says {info.sha256}; copy or export it again"
        )


def check_ascending(ids: Tensor, file: Path) -> None:
    """Raise :class:`DuplicateId` or :class:`TableError` unless ids (num_rows,) ascend strictly."""
    for start in range(0, ids.numel(), CHUNK):
        part = ids[max(start - 1, 0) : start + CHUNK]
        wrong = (part[1:] <= part[:-1]).nonzero()
        if wrong.numel():
            row = max(start - 1, 0) + int(wrong[0]) + 1
            if ids[row] == ids[row - 1]:
                raise DuplicateId(f"{file}: rows {row - 1} and {row} both have item id {int(ids[row])}")
            raise TableError(
                f"{file}: row {row} has item id {int(ids[row])} after {int(ids[row - 1])}; ids must ascend"
            )


def check_finite(stored: Tensor, dtype: str, ids: Tensor, file: Path, rows: int | Tensor = 0) -> None:
    """Raise :class:`NonFiniteVector` if a stored row holds NaN or infinity.

    Args:
        stored: (num_rows, stored_width).
        dtype: their storage type.
        ids: (num_rows,), for the message.
        file: likewise.
        rows: the row in ``file`` of the first, where they are consecutive, or of each.
    """
    if not is_quantized(dtype) and stored.sum(dtype=torch.float32).isfinite():
        return  # a sum with NaN or infinity is neither finite; one that overflows is looked at below
    wrong = (~finite_rows(stored, dtype)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        row = int(rows[at]) if isinstance(rows, Tensor) else rows + at
        raise NonFiniteVector(
            f"{file}: row {row}, item id {int(ids[at])}: the vector holds NaN or infinity as {dtype}"
        )


def check_loss(
    vectors: Tensor, stored: Tensor, dtype: str, ids: Tensor, place: Callable[[int], str], remedy: str
) -> None:
    """Raise :class:`LossyVector` if storing has changed a vector by more than ``LOSS_LIMIT``.

    float16 has nothing below 6e-8: a vector of values of 1e-9 would become zero. A vector of which only some
    values are that small keeps its length and direction, and passes.

    Args:
        vectors: (num_rows, dim) floating point.
        stored: (num_rows, stored_width), finite.
        dtype: their storage type.
        ids: (num_rows,), for the message.
        place: says where a row is from.
        remedy: what to do instead.
    """
    errors = relative_errors(vectors, stored, dtype)
    if (wrong := (errors > LOSS_LIMIT[dtype]).nonzero()).numel():
        row = int(wrong[0])
        raise LossyVector(
            f"{place(row)}, item id {int(ids[row])}: {dtype} changes the vector by {float(errors[row]):.0%} "
            f"of its length (values up to {float(vectors[row].abs().max()):.1e}), more than "
            f"{LOSS_LIMIT[dtype]:.0%}; {remedy}"
        )
