"""Columns as other writers make them, in the few forms that the readers compute with.

Writers choose among many types for the same thing: lists of a fixed size and views of lists, views of text,
decimals, columns of nulls where a file has nothing, text and UUIDs as ids, times with and without a zone,
dates and integers as times. `plain` unifies how values are laid out, `ids` makes int64 of ids, `times` makes
microseconds of times. Whether a column may be used is decided in `schema.py` and `conventions.py`.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_torchrec.data.ids import holds_ids, is_text_id, original_ids, stable_ids

TIME = pa.timestamp("us")
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Units of times that are integers."""
EARLIEST, LATEST = 631_152_000, 7_258_118_400  # seconds: 1990-01-01 and 2200-01-01

Convert = Callable[[pa.Array], pa.Array]


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists, however they are laid out."""
    views = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return is_plain_list(kind) or pa.types.is_fixed_size_list(kind) or views


def is_plain_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists with offsets."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def value_type(kind: pa.DataType) -> pa.DataType:
    """Type of the values of a column, of its lists where it has lists and without a dictionary."""
    kind = kind.value_type if is_list(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def holds_text(kind: pa.DataType) -> bool:
    """Whether the values of a column, or of its lists, are text."""
    kind = value_type(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain(array: pa.Array, lists: bool = False) -> pa.Array:
    """The same values in lists with offsets, text and bytes without views; dictionaries only of text.

    Args:
        array: (n,) of any type.
        lists: whether the column should hold lists, which a column of nulls does not say.
    """
    kind = array.type
    if _is_plain(kind):
        return array
    if pa.types.is_null(kind):
        return array.cast(pa.list_(pa.int64()) if lists else pa.int64())
    if is_list(kind):
        return _map_lists(plain, array)
    if pa.types.is_dictionary(kind):
        if not holds_text(kind):
            return plain(array.dictionary_decode())
        return pa.DictionaryArray.from_arrays(array.indices, plain(array.dictionary))
    if pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_binary_view(kind):
        return array.cast(pa.large_binary())
    return array


def ids(array: pa.Array) -> pa.Array:
    """Ids or lists of ids as int64, see `stable_ids`; the array is plain."""
    if array.type == pa.int64() or (is_plain_list(array.type) and array.type.value_type == pa.int64()):
        return array
    return _map_lists(stable_ids, array) if is_plain_list(array.type) else stable_ids(array)


def originals(array: pa.Array) -> pa.Array:
    """Ids or lists of ids as people know them, see `original_ids`; the array is plain."""
    return _map_lists(original_ids, array) if is_plain_list(array.type) else original_ids(array)


def have_originals(kind: pa.DataType) -> bool:
    """Whether ids of a type are known to people by something else than the int64 they become."""
    kind = value_type(kind)
    return holds_ids(kind) and (is_text_id(kind) or pa.types.is_uint64(kind))


def times(array: pa.Array, unit: str | None) -> pa.Array:
    """Times or lists of times as timestamps in microseconds without a zone; the array is plain.

    Times with a zone are given in UTC. What is finer than a microsecond is cut off. A date is its midnight.

    Args:
        array: (n,) timestamps, dates, or integers since 1970 in UTC.
        unit: of integers, a key of `PER_SECOND`.

    Raises:
        ValueError: integers are of another unit, because the years that they give cannot be.
    """
    kind = array.type
    if value_type(kind) == TIME:
        return array
    if is_plain_list(kind):
        return _map_lists(lambda values: times(values, unit), array)
    if pa.types.is_integer(kind) and unit is not None and array.null_count < len(array):
        return _from_epoch(array, unit)
    if pa.types.is_timestamp(kind):
        array = array.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.int64())
    return array.cast(TIME)  # of dates, of nulls and of microseconds


def _is_plain(kind: pa.DataType) -> bool:
    if is_plain_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_dictionary(kind):
        return holds_text(kind) and _is_plain(kind.value_type)
    views = pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
    return not (is_list(kind) or views or pa.types.is_null(kind))


def _from_epoch(array: pa.Array, unit: str) -> pa.Array:
    values = array.cast(pa.int64())
    found = pc.min_max(values)
    for value in (found["min"].as_py(), found["max"].as_py()):
        if not EARLIEST <= value / PER_SECOND[unit] <= LATEST:
            raise ValueError(
                f"holds {value}, which in the unit {unit!r} is not between the years 1990 and 2200; correct "
                "time_unit in dataset.json, or the times"
            )
    if unit == "ns":
        return pc.divide(values, pa.scalar(1000, pa.int64())).cast(TIME)
    factor = PER_SECOND["us"] // PER_SECOND[unit]
    return pc.multiply(values, pa.scalar(factor, pa.int64())).cast(TIME)


def _map_lists(convert: Convert, array: pa.Array) -> pa.Array:
    """Lists with offsets, their values converted."""
    large = pa.types.is_large_list(array.type) or pa.types.is_large_list_view(array.type)
    make, width = (pa.LargeListArray, pa.int64()) if large else (pa.ListArray, pa.int32())
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), width)
    missing = array.is_null() if array.null_count else None
    return make.from_arrays(offsets, convert(array.flatten()), mask=missing)
