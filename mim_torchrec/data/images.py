"""Bytes of an image to an RGB image, and back."""

import io
import struct
import zlib

from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.extras import needs

with needs("train"):
    from PIL import Image, UnidentifiedImageError

_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode_image(data: bytes, where: Location | str = "image") -> Image.Image:
    """Decode JPEG, PNG, WebP or whatever Pillow reads.

    Args:
        data: the encoded image.
        where: what the error message says about its place.

    Returns:
        The image in mode RGB.

    Raises:
        DataError: the bytes are truncated or no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")  # reads all of it
    except _UNREADABLE as error:
        # Pillow's message would name an object of this process
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        problem = f"the image of {len(data)} bytes cannot be decoded ({reason}); replace it"
        if isinstance(where, Location):
            raise DataError(problem, where.file, where.row_group, where.row, where.column) from None
        raise DataError(f"{where}: {problem}") from None


def encode_jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """Encode a image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
