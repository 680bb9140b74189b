"""Ids that are text, UUIDs or uint64 as the int64 that tables, readers and servers compute with.

The mapping has no key, no state and no order: every process of every machine maps an id to the same number.
Two texts share a number with probability 2^-64; among a billion ids that is a chance of 3% for one pair.
"""

import hashlib
import uuid
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from mim_torchrec.errors import ExpectedError


class IdCollision(ExpectedError, ValueError):
    """Two different ids have the same number."""


def stable_ids(column: pa.Array | pa.ChunkedArray) -> pa.Int64Array:
    """Map ids to int64.

    Signed integers and decimals without fraction stay as they are. A uint64 above 2^63 - 1 becomes negative
    (its two's complement), so that no two are the same. Text becomes the 64-bit BLAKE2b hash of its UTF-8
    bytes, read as a big-endian signed integer. A UUID, also as 16 bytes, is hashed by its text form, lower
    case with hyphens.

    Args:
        column: (n,) of a type that :func:`holds_ids` accepts.

    Returns:
        (n,) int64; nulls stay null.

    Raises:
        IdCollision: two texts of the column have the same number; the message has both.
        TypeError: the type holds no ids.

    >>> stable_ids(pa.array(["a1", None, "a1"])).to_pylist()
    [-6961044876021404389, None, -6961044876021404389]
    >>> stable_ids(pa.array([2**64 - 1], pa.uint64())).to_pylist()
    [-1]
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.int64())
    if pa.types.is_uint64(kind):
        return column.view(pa.int64())
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return column.cast(pa.int64())
    if pa.types.is_dictionary(kind):
        return stable_ids(column.dictionary).take(column.indices)
    if not is_text_id(kind):
        raise TypeError(f"{kind} holds no ids")
    encoded = original_ids(column).dictionary_encode()
    numbers = _hashes(encoded.dictionary.to_pylist())
    return pa.array(numbers, pa.int64()).take(encoded.indices)


def original_ids(column: pa.Array) -> pa.Array:
    """The ids of a column (n,) as people know them: text of text and UUIDs, else the integers.

    >>> original_ids(pa.array([bytes(16)], pa.binary(16))).to_pylist()
    ['00000000-0000-0000-0000-000000000000']
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_uuid(column.type):
        stored = column.storage if isinstance(column, pa.ExtensionArray) else column
        texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in stored.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_decimal(column.type):
        return column.cast(pa.int64())
    return column.cast(pa.large_string()) if is_text_id(column.type) else column


def holds_ids(kind: pa.DataType) -> bool:
    """Whether values of a type are ids that :func:`stable_ids` maps."""
    if pa.types.is_dictionary(kind):
        return holds_ids(kind.value_type)
    whole = pa.types.is_decimal(kind) and kind.scale == 0
    return pa.types.is_integer(kind) or whole or is_text_id(kind)


def is_text_id(kind: pa.DataType) -> bool:
    """Whether ids of a type are mapped by a hash: text and UUIDs."""
    if pa.types.is_dictionary(kind):
        return is_text_id(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return text or _is_uuid(kind)


def _is_uuid(kind: pa.DataType) -> bool:
    return kind == pa.uuid() or (pa.types.is_fixed_size_binary(kind) and kind.byte_width == 16)


@lru_cache(maxsize=1 << 16)  # row groups have much the same categories
def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _hashes(texts: Sequence[str | None]) -> np.ndarray:
    """(n,) int64 of different texts."""
    digests = [_digest(text or "") for text in texts]
    numbers = np.frombuffer(b"".join(digests), ">i8").astype(np.int64)
    order = np.argsort(numbers, kind="stable")
    twice = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
    for at in twice:
        one, other = texts[order[at]], texts[order[at + 1]]
        if one != other:
            raise IdCollision(
                f"the ids {one!r} and {other!r} have the same 64-bit number {numbers[order[at]]}; rename one"
            )
    return numbers
