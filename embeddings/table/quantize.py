"""How vectors are stored: the storage types of a table, and the way from float32 to each and back.

``int8`` is fbgemm's fused 8-bit row-wise format: a row is ``dim`` unsigned bytes q, then scale and bias as
float32, and its vector is q * scale + bias. Its bytes are those of ``FloatToFused8BitRowwiseQuantized``, so
that fbgemm's kernels read a stored row as it is. ``int4`` is its fused 4-bit format: two values a byte, the
first in the lower half, then scale and bias as float16 (``FloatToFusedNBitRowwiseQuantizedSBHalf``). A row of
zero bytes is the zero vector in every type.

On a CPU torch's own operators compute both: they call the same functions of fbgemm, and a server need not
import fbgemm_gpu. On a GPU it is fbgemm_gpu's kernels.

Not here: a scale shared by several rows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mim_torchrec.errors import OptionError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.uint8,
    "int4": torch.uint8,
}
LOSS_ROWS = 4096  # rows compared at once
# The largest relative error of a stored vector. float16 rounds to 0.05% and bfloat16 to 0.4%: only vectors
# below the range of the type lose more. int8 rounds each value to 1/255 of the range of its row, which is at
# most 8% of the length of a vector of 1,536 values of which one is large. int4 rounds to 1/15 of that range.
LOSS_LIMIT = {"float32": 0.01, "float16": 0.01, "bfloat16": 0.01, "int8": 0.1, "int4": 0.5}
SCALE_AND_BIAS = {"int8": (8, torch.float32), "int4": (4, torch.float16)}  # bytes of the two, and their type


def is_quantized(dtype: str) -> bool:
    """Whether a stored row is codes with a scale and a bias, which have to be decoded."""
    return dtype in SCALE_AND_BIAS


def stored_width(dtype: str, dim: int) -> int:
    """Return the number of columns of a stored row.

    It is ``dim``; for int8 8 bytes more, and for int4 half of ``dim`` and 4 bytes.

    Raises:
        OptionError: int8 or int4 vectors whose dim is not a multiple of 4; fbgemm lays out int8 differently
            on a GPU then, and has no int4.

    >>> stored_width("float16", 128), stored_width("int8", 128), stored_width("int4", 128)
    (128, 136, 68)
    """
    if not is_quantized(dtype):
        return dim
    if dim % 4:
        raise OptionError(
            f"{dtype} rows need a dim that is a multiple of 4, found {dim}; pad it or use float16"
        )
    return (dim if dtype == "int8" else dim // 2) + SCALE_AND_BIAS[dtype][0]


def row_bytes(dtype: str, dim: int) -> int:
    """Return the bytes of a stored row.

    >>> row_bytes("float16", 128), row_bytes("int8", 128), row_bytes("int4", 128)
    (256, 136, 68)
    """
    return stored_width(dtype, dim) * DTYPES[dtype].itemsize


def encode(vectors: Tensor, dtype: str) -> Tensor:
    """Return vectors as they are stored.

    Args:
        vectors: (num_rows, dim) float32. For int8 and int4, a row with NaN or infinity becomes one whose bias
            is NaN, so that :func:`finite_rows` finds it: fbgemm alone overlooks a NaN that is not the first
            value.
        dtype: a key of ``DTYPES``.

    Returns:
        (num_rows, stored_width) in ``DTYPES[dtype]``.
    """
    width = stored_width(dtype, vectors.shape[1])
    if not is_quantized(dtype):
        return vectors.to(DTYPES[dtype])
    stored = _kernels(dtype, vectors.device)[0](vectors.contiguous())
    if dtype == "int4":
        stored[~vectors.any(1)] = 0  # fbgemm gives them a scale of 1
    assert stored.shape[1] == width
    wrong = ~torch.isfinite(vectors).all(1)
    if wrong.any():
        nan = torch.tensor([float("nan")], dtype=SCALE_AND_BIAS[dtype][1], device=stored.device)
        nan = nan.view(torch.uint8)
        stored[wrong, width - nan.numel() :] = nan
    return stored


def decode(stored: Tensor, dtype: str) -> Tensor:
    """Return stored rows (num_rows, stored_width) as float32 vectors (num_rows, dim)."""
    return _kernels(dtype, stored.device)[1](stored.contiguous()) if is_quantized(dtype) else stored.float()


def _kernels(
    dtype: str, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What makes stored rows of vectors on a device, and vectors of stored rows."""
    if device.type == "cpu":
        own = torch.ops.quantized
        if dtype == "int8":
            return own.embedding_bag_byte_prepack, own.embedding_bag_byte_unpack
        return own.embedding_bag_4bit_prepack, own.embedding_bag_4bit_unpack
    import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm, which a server on a CPU does without

    fbgemm = torch.ops.fbgemm
    if dtype == "int8":
        return fbgemm.FloatToFused8BitRowwiseQuantized, fbgemm.Fused8BitRowwiseQuantizedToFloat
    return (partial(fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf, bit_rate=4),
            partial(fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat, bit_rate=4))  # fmt: skip


def fuse_codes(codes: Tensor) -> Tensor:
    """Return int8 codes without a scale as stored int8 rows, exactly: q = code + 128, scale 1, bias -128.

    Args:
        codes: (num_rows, dim) int8.

    Returns:
        (num_rows, dim + 8) uint8; :func:`decode` gives the codes as floats.
    """
    stored = torch.empty(codes.shape[0], stored_width("int8", codes.shape[1]), dtype=torch.uint8)
    stored[:, : codes.shape[1]] = codes.view(torch.uint8) ^ 0x80  # two's complement: + 128 flips the sign bit
    stored[:, codes.shape[1] :] = torch.tensor([1.0, -128.0]).view(torch.uint8)
    return stored


def finite_rows(stored: Tensor, dtype: str) -> Tensor:
    """Return (num_rows,) bool: whether a stored row's vector is finite (of codes: scale and bias are)."""
    if is_quantized(dtype):
        size, scale_type = SCALE_AND_BIAS[dtype]
        stored = stored[:, -size:].contiguous().view(scale_type)
    return torch.isfinite(stored).all(1)


def relative_errors(vectors: Tensor, stored: Tensor, dtype: str) -> Tensor:
    """Return |stored - vector| / |vector| of every row, float64 (num_rows,); 0 for two zero vectors.

    Args:
        vectors: (num_rows, dim) floating point.
        stored: (num_rows, stored_width), what :func:`encode` made of them.
        dtype: their storage type.

    >>> vectors = torch.tensor([[0.5, 1e-9], [1e-9, 1e-9], [0.0, 0.0]])
    >>> relative_errors(vectors, encode(vectors, "float16"), "float16").round(decimals=3).tolist()
    [0.0, 1.0, 0.0]
    """
    found = []
    for before, after in zip(vectors.split(LOSS_ROWS), stored.split(LOSS_ROWS), strict=True):
        decoded = decode(after, dtype)
        squares = before.float().square().sum(1)
        errors = ((before - decoded).float().square().sum(1) / squares).sqrt().double()
        far = ((squares < 1e-20) | (squares > 1e20)).nonzero()[:, 0]  # float32 may not hold their squares
        exact = before[far].double()
        norms = torch.linalg.vector_norm(exact, dim=1)
        wrong = torch.linalg.vector_norm(exact - decoded[far].double(), dim=1)
        errors[far] = torch.where(wrong > 0, wrong / norms, wrong)
        found.append(errors)
    return torch.cat([torch.empty(0, dtype=torch.float64, device=vectors.device), *found])


def cosine_errors(vectors: Tensor, others: Tensor) -> Tensor:
    """Return 1 - cos of each pair of float32 vectors (num_rows, dim), float64 (num_rows,); 0 for two zeros.

    >>> cosine_errors(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    both_zero = ~(vectors.any(1) | others.any(1))
    similarity = torch.cosine_similarity(vectors.double(), others.double(), dim=1)
    return torch.where(both_zero, 0.0, 1 - similarity)
