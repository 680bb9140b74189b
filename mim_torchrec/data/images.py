"""Bytes of a picture to an RGB image, and back: the one decoder of every stage.

Pictures come as users and cameras make them. What is done to all of them:

- The orientation that EXIF or XMP states is applied, so the pixels are upright.
- Gray of 16 (or, in TIFF, 9 to 15) bits is scaled to 8 bits. Gray without a known white, of signed or 32-bit
  integers or of floats, is refused.
- Transparent pixels are composited over white, the usual background of a shop.
- Of an animation the first frame is taken.
- A picture of more than `MAX_PIXELS` is refused by its header, before memory for its pixels is asked for.

Not here: color profiles, whose effect on a vector is small.
"""

import io
import struct
import zlib

import numpy as np

from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.extras import needs

with needs("train"):
    from PIL import ExifTags, Image, TiffImagePlugin, TiffTags, UnidentifiedImageError

MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded, such as 8,192 x 8,192, which take 192 MiB in RGB."""
DECODER = "2"
"""Changes whenever a picture decodes to other pixels than before; part of the key of cached features."""

_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what undoes each orientation of EXIF
_TAGS = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}


def decode_image(
    data: bytes | Image.Image, where: Location | str = "image", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode JPEG, PNG, WebP or whatever Pillow reads, except PostScript, which is a program.

    Args:
        data: the encoded picture, or one that Pillow has opened, which is left as it is.
        where: what the error message says about its place.
        max_pixels: a larger picture is refused before it is decoded.

    Returns:
        The picture in mode RGB, upright, over white.

    Raises:
        DataError: the bytes are truncated or no image, or the picture is too large.
    """
    try:
        if isinstance(data, Image.Image):
            return _to_rgb(data)
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
            if image.format == "EPS":
                raise ValueError("PostScript is not read")
            return _to_rgb(image)
    except _UNREADABLE as error:
        # Pillow's message would name an object of this process
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        size = f"image of {len(data)} bytes" if isinstance(data, bytes) else "image"
        problem = f"the {size} cannot be decoded ({reason}); replace it"
        if isinstance(where, Location):
            raise DataError(problem, where.file, where.row_group, where.row, where.column) from None
        raise DataError(f"{where}: {problem}") from None


def encode_jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """Encode a image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The orientation of the metadata, 1 where there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, IndexError, EOFError, struct.error, UserWarning):
        return 1  # damaged metadata state no orientation; viewers show the picture as it is, too


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits, scaled.

    Raises:
        ValueError: what is white is not known.
    """
    is_16_bit = image.mode.startswith("I;16")
    # in these formats Pillow's 32-bit integers hold 16 bits
    if not is_16_bit and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        raise ValueError(f"gray of mode {image.mode} has no known white; write 8 or 16 bits, unsigned")
    white, inverted = 0xFFFF, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white = (1 << image.tag_v2.get(_TAGS["BitsPerSample"], (16,))[0]) - 1
        inverted = image.tag_v2.get(_TAGS["PhotometricInterpretation"]) == 0
    values = np.asarray(image).astype(np.int64)
    gray = ((values * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    if inverted:
        gray = 255 - gray
    clear = image.info.get("transparency")
    if clear is not None:
        gray[values == clear] = 255
    return Image.fromarray(gray)
