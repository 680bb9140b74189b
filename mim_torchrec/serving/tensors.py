"""Tensors of the Open Inference Protocol: values from JSON or from bytes, and values to bytes.

JSON may have the values of a tensor flat or nested in row-major order. Bytes are little-endian; each element
of BYTES is preceded by its length in four bytes.
"""

import struct
from collections.abc import Sequence
from math import isfinite, prod
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

BYTES, BOOL = "BYTES", "BOOL"
DATATYPES: dict[str, pa.DataType] = {
    "FP32": pa.float32(), "FP64": pa.float64(), "INT64": pa.int64(), "INT32": pa.int32(),
    "UINT64": pa.uint64(), BYTES: pa.string(), "FP16": pa.float16(), "INT16": pa.int16(), "INT8": pa.int8(),
    "UINT32": pa.uint32(), "UINT16": pa.uint16(), "UINT8": pa.uint8(), BOOL: pa.bool_(),
}  # fmt: skip
"""Datatypes of the protocol, in the order in which they are the usual one of an input."""
LARGEST = 3e38  # within float32


class BadTensor(ValueError):
    """The values of a tensor do not fit its datatype or shape."""


def from_json(datatype: str, shape: Sequence[int], data: list[Any]) -> pa.Array:
    """Values of a tensor in JSON.

    Args:
        datatype: a key of DATATYPES.
        shape: of the tensor.
        data: its values, flat or nested.

    Returns:
        (prod(shape),) of the type of the datatype.

    Raises:
        BadTensor: they do not fit.
    """
    values = _flat(shape, data)
    found, arrow = set(map(type, values)), DATATYPES[datatype]
    if datatype == BYTES:
        if not found <= {str}:
            raise BadTensor("it is BYTES: its values are strings")
    elif datatype == BOOL:
        if not found <= {bool}:
            raise BadTensor("it is BOOL: its values are true and false")
    elif pa.types.is_integer(arrow):
        if not found <= {int}:
            raise BadTensor(f"its values are integers of {datatype}")
    elif not found <= {int, float}:
        raise BadTensor(f"its values are numbers of {datatype}")
    else:
        if not all(abs(value) < LARGEST and isfinite(value) for value in values):
            raise BadTensor("its values are finite numbers within float32")
        return pa.array(np.array([float(value) for value in values], arrow.to_pandas_dtype()))
    try:
        return pa.array(values, arrow)
    except (UnicodeEncodeError, OverflowError, pa.ArrowException) as error:
        said = error if datatype == BYTES else f"its values are integers of {datatype}"
        raise BadTensor(str(said)) from None


def from_bytes(datatype: str, shape: Sequence[int], data: memoryview) -> pa.Array:
    """Values of a tensor in the binary form; see `from_json`."""
    count, arrow = prod(shape), DATATYPES[datatype]
    if datatype == BYTES:
        texts = _elements(data)
        if len(texts) != count:
            raise BadTensor(f"it has shape {list(shape)} and {len(texts)} values")
        try:
            return pa.array([bytes(text).decode() for text in texts], arrow)
        except UnicodeDecodeError as error:
            raise BadTensor(f"its values are text in UTF-8: {error}") from None
    numpy = np.dtype(arrow.to_pandas_dtype()).newbyteorder("<")
    if len(data) != count * numpy.itemsize:
        raise BadTensor(
            f"it has shape {list(shape)}, which are {count * numpy.itemsize} bytes of {datatype}, and "
            f"{len(data)} bytes"
        )
    values = np.frombuffer(data, numpy)
    if numpy.kind == "f" and not (np.abs(values) < LARGEST).all():  # NaN is not less than it
        raise BadTensor("its values are finite numbers within float32")
    return pa.array(values)


def to_bytes(values: Tensor) -> bytes:
    """The binary form of an FP32 tensor."""
    return values.detach().numpy().astype("<f4").tobytes()


def _flat(shape: Sequence[int], data: list[Any]) -> list[Any]:
    """Values in row-major order, whether they are nested or not."""
    values = data
    if any(type(value) is list for value in data):
        nested: list[Any] = [data]
        for size in shape:
            if not all(type(part) is list and len(part) == size for part in nested):
                raise BadTensor(f"it has shape {list(shape)}, which its nested values do not have")
            nested = [value for part in nested for value in part]
        values = nested
    if len(values) != prod(shape):
        raise BadTensor(f"it has shape {list(shape)} and {len(values)} values")
    return values


def _elements(data: memoryview) -> list[memoryview]:
    """The elements of BYTES."""
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise BadTensor("its last bytes are no length of an element")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise BadTensor(f"an element of {size} bytes is longer than what is left, {len(data) - at}")
        found.append(data[at : at + size])
        at += size
    return found
