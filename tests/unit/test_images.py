"""Pictures as users and cameras make them decode to the pixels that a person sees."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.data.images import MAX_PIXELS, decode_image
from mim_torchrec.program import ignore_warnings

ROOT = Path(__file__).resolve().parents[2]
ORIENTATION = 0x0112
RAMP = np.linspace(0, 255, 64).astype(np.uint8)
GRAY = np.tile(RAMP, (32, 1))  # 64 wide, 32 high
COLORS = np.stack([GRAY, np.tile(RAMP[::2, None], (1, 64)), 255 - GRAY], -1)
UPRIGHT = {  # what a viewer does with stored pixels of each orientation
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes | Image.Image) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.stack([gray] * 3, -1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_of_the_metadata_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLORS), kind, exif=exif, **lossless)
    np.testing.assert_array_equal(pixels(data), UPRIGHT[orientation](COLORS))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_of_a_photo_is_applied(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = pixels(encoded(Image.fromarray(COLORS), "JPEG", quality=95, subsampling=0, exif=exif))
    assert np.abs(found - UPRIGHT[orientation](COLORS)).mean() < 4


def test_a_picture_that_pillow_has_opened_is_treated_alike_and_stays_as_it_is():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(COLORS), "PNG", exif=exif)))
    np.testing.assert_array_equal(pixels(image), UPRIGHT[6](COLORS))
    assert image.size == (64, 32)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_metadata_state_no_orientation(exif):
    data = encoded(Image.fromarray(COLORS), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(data), COLORS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled(kind):
    of_16_bits = GRAY.astype(np.uint16) * 257
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(of_16_bits), kind)), as_rgb(GRAY))


def test_16_bit_gray_rounds_to_the_nearest_value():
    values = np.array([[0, 128, 129, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    expected = [0, 0, 1, 127, 128, 254, 255, 255]
    assert pixels(encoded(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == expected


def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """An uncompressed little-endian TIFF of one strip, as scanners write them."""
    height, width = values.shape
    data = values.astype("<u2").tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
               (278, height), (279, len(data))]  # fmt: skip
    head = b"II*\0" + (8 + len(data)).to_bytes(4, "little")
    fields = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in entries
    )
    return head + data + len(entries).to_bytes(2, "little") + fields + b"\0\0\0\0"


def test_16_bit_gray_whose_zero_is_white_is_inverted():
    of_16_bits = GRAY.astype(np.uint16) * 257
    np.testing.assert_array_equal(pixels(tiff(of_16_bits, 16, 0)), as_rgb(255 - GRAY))
    np.testing.assert_array_equal(pixels(tiff(of_16_bits, 16, 1)), as_rgb(GRAY))


def test_12_bit_gray_is_scaled_by_its_own_white():
    pairs = np.array([[0, 4095, 2048, 1024]], np.uint16)
    packed = bytearray()
    for one, other in pairs.reshape(-1, 2).tolist():
        packed += bytes([one >> 4, (one & 15) << 4 | other >> 8, other & 255])
    whole = bytearray(tiff(np.zeros((1, 3), np.uint16), 12, 1))
    whole[8:14] = packed
    at = whole.index((256).to_bytes(2, "little") + b"\4\0", 14)
    whole[at + 8 : at + 12] = (4).to_bytes(4, "little")
    assert pixels(bytes(whole))[0, :, 0].tolist() == [0, 255, 128, 64]


@pytest.mark.parametrize(
    "values", [(GRAY / 255).astype(np.float32), GRAY.astype(np.int32) * 1000], ids=["floats", "int32"]
)
def test_gray_without_a_known_white_is_refused(values):
    with pytest.raises(DataError, match="has no known white; write 8 or 16 bits"):
        decode_image(encoded(Image.fromarray(values), "TIFF"))


def with_alpha() -> tuple[np.ndarray, np.ndarray]:
    """Transparent left half that holds black, half transparent column, opaque rest; and it over white."""
    alpha = np.where(GRAY > 127, 255, 0).astype(np.uint8)
    alpha[:, -1] = 128
    picture = np.dstack([np.where(alpha[..., None] == 0, 0, COLORS).astype(np.uint8), alpha])
    part = alpha[..., None] / 255
    return picture, np.rint(picture[..., :3] * part + 255 * (1 - part)).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_over_white(kind):
    picture, expected = with_alpha()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    assert np.abs(pixels(encoded(Image.fromarray(picture), kind, **lossless)) - expected).max() <= 1


def test_gray_with_alpha_is_over_white():
    picture = np.dstack([GRAY, np.where(GRAY > 127, 255, 0).astype(np.uint8)])
    found = pixels(encoded(Image.fromarray(picture, "LA"), "PNG"))
    np.testing.assert_array_equal(found, as_rgb(np.where(GRAY > 127, GRAY, 255)))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_color_of_a_palette_is_white(kind):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    found = pixels(encoded(image, kind, transparency=0))
    assert found.tolist() == [[[255, 255, 255], [10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transparent_value_of_gray_is_white(dtype):
    step = 1 if dtype == np.uint8 else 257
    values = np.array([[0, 7, 9]], dtype) * dtype(step)
    found = pixels(encoded(Image.fromarray(values), "PNG", transparency=7 * step))
    assert found[0, :, 0].tolist() == [0, 255, 9]


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == [255, 0, 0]).all()


def test_cmyk_is_converted():
    data = encoded(Image.fromarray(COLORS).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert np.abs(pixels(data) - COLORS).mean() < 4


@pytest.mark.parametrize("size", [(13_000, 13_000), (9_500, 9_500), (8_193, 8_192)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(size):
    data = encoded(Image.new("1", size), "PNG")
    assert len(data) < 40_000
    broken = data[:100]  # decoding would end in another error
    for given in (data, broken):
        with pytest.raises(DataError, match="pixels"):
            decode_image(given, Location("items.parquet", 0, 3, "image"))


def test_a_program_prints_no_warning_of_the_library_about_a_picture():
    data = encoded(Image.new("1", (9_500, 9_500)), "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ignore_warnings()
        with pytest.raises(DataError, match="9500 x 9500 pixels are more than"):
            decode_image(data)
    assert caught == []


def test_the_largest_picture_is_decoded():
    data = encoded(Image.new("RGB", (30, 20), "red"), "PNG")
    assert decode_image(data, max_pixels=600).size == (30, 20)
    with pytest.raises(DataError, match=r"image: .* \(30 x 20 pixels are more than 599\)"):
        decode_image(data, max_pixels=599)
    assert MAX_PIXELS >= 8192 * 8192


def test_postscript_is_not_run():
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="PostScript is not read"):
        decode_image(header)


def test_there_is_one_decoder():
    """Whoever opens pictures otherwise would see other pixels."""
    openers = {
        path.relative_to(ROOT).as_posix()
        for folder in ("mim_torchrec", "embeddings")
        for path in (ROOT / folder).rglob("*.py")
        if "Image.open(" in path.read_text(encoding="utf-8")
    }
    assert openers == {"mim_torchrec/data/images.py"}
