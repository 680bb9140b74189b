"""What items of the synthetic shop look like and are called: images and titles drawn from a latent style.

A style is a vector of 8 coordinates of variance about 1. A image shows all of them, with noise: colors of
the shape and of the ground, the shape's roundness and slimness, and a stripe pattern. A title names only its
most striking ones, in words. A category has a style of its own on average, a number of lobes and a noun.
"""

from collections.abc import Iterator

import numpy as np

from mim_torchrec.data.images import encode_jpeg
from mim_torchrec.extras import needs

with needs("train"):
    from PIL import Image

STYLE_DIM = 8
NOUNS = ("bag", "lamp", "chair", "shirt", "vase", "watch", "rug", "mug", "scarf", "clock", "shoe", "mirror",
         "basket", "jacket", "pillow", "kettle", "hat", "desk", "ring", "tent")  # fmt: skip
NOISE_WORDS = ("new", "sale", "gift", "original", "best", "official", "quality", "daily", "home", "season",
               "free", "shipping", "hot", "value", "brand", "classic")  # fmt: skip
# eight axes of a style, five levels each from low to high, two words a level
WORDS = (
    ("inky ebony", "plum wine", "russet clay", "coral rose", "scarlet ruby"),
    ("dusky umber", "olive moss", "sage fern", "lime mint", "emerald jade"),
    ("amber straw", "sandy beige", "pearl ash", "sky azure", "cobalt navy"),
    ("midnight shadow", "smoky slate", "muted plain", "pale light", "snowy bright"),
    ("earthy rustic", "warm autumn", "neutral basic", "cool breeze", "icy arctic"),
    ("spiky jagged", "angular edged", "soft contour", "rounded curvy", "bubbly orb"),
    ("slim slender", "narrow sleek", "regular standard", "wide broad", "chunky oversized"),
    ("solid seamless", "ribbed grooved", "lined banded", "striped pinstripe", "dense corduroy"),
)
LEVELS = (-0.9, -0.3, 0.3, 0.9)
_CHUNK = 256


def draw_styles(categories: np.ndarray, centers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Styles (n, 8) of length sqrt(8) around the centers (num_categories, 8) of their categories (n,)."""
    return normalized(centers[categories] + rng.normal(size=(len(categories), STYLE_DIM)))


def normalized(styles: np.ndarray) -> np.ndarray:
    """Styles (n, 8) scaled to length sqrt(8)."""
    return styles * (np.sqrt(STYLE_DIM) / np.linalg.norm(styles, axis=1, keepdims=True))


def draw_titles(styles: np.ndarray, categories: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Titles of styles (n, 8): words for four axes, the strikingly low or high ones first, a noun, noise."""
    words = [[level.split() for level in axis] for axis in WORDS]
    levels = np.digitize(styles, LEVELS)
    axes = np.argsort(-np.abs(styles) + 0.4 * rng.normal(size=styles.shape), axis=1)[:, :4]
    which = rng.integers(2, size=axes.shape)
    noise = rng.integers(len(NOISE_WORDS), size=(len(styles), 2))
    titles = []
    for item in range(len(styles)):
        chosen = [words[a][levels[item, a]][w] for a, w in zip(axes[item], which[item], strict=True)]
        first, second = (NOISE_WORDS[k] for k in noise[item])
        titles.append(" ".join([first, *chosen, NOUNS[categories[item] % len(NOUNS)], second]))
    return titles


def draw_images(
    styles: np.ndarray,
    categories: np.ndarray,
    size: int,
    rng: np.random.Generator,
    photo_gap: float = 0.0,
    photo_seed: int = 0,
) -> Iterator[bytes]:
    """JPEG images (size x size) of styles (n, 8) in categories (n,), renderings or photos of them.

    Args:
        styles: (n, 8).
        categories: (n,).
        size: of an image in pixels.
        rng: of the renderings, which photos are taken of.
        photo_gap: how far photos are from renderings; 0 gives renderings.
        photo_seed: of the photos.
    """
    for start in range(0, len(styles), _CHUNK):
        part = slice(start, start + _CHUNK)
        images, inside = _render(styles[part].astype(np.float32), categories[part], size, rng)
        if photo_gap:
            from mim_torchrec.data.photos import photographed  # torchvision takes seconds to load

            images = photographed(images, inside, photo_gap, photo_seed + start)
        for pixels in images:
            yield encode_jpeg(Image.fromarray(pixels))


def _render(
    styles: np.ndarray, categories: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(n, size, size, 3) uint8, and (n, size, size) float32, 1 where the shape is."""
    n = len(styles)

    def axis(k: int) -> np.ndarray:
        return np.tanh(0.6 * styles[:, k, None, None])

    def noise(scale: float) -> np.ndarray:
        return rng.normal(scale=scale, size=(n, 1, 1)).astype(np.float32)

    grid = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = grid[None, None, :] - noise(0.1), grid[None, :, None] - noise(0.1)
    turn = noise(0.25)
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    slim = np.exp(0.35 * axis(6))
    radius, angle = np.hypot(x / slim, y * slim), np.arctan2(y, x)
    lobes = (3 + categories % 5)[:, None, None]
    spikes = 0.22 * (0.5 - 0.5 * axis(5)) * np.cos(lobes * angle)
    edge = 0.62 + spikes + noise(0.03)
    inside = 1 / (1 + np.exp(-(edge - radius) * 0.4 * size))

    frequency = 3 + 12 * (0.5 + 0.5 * axis(7))
    stripes = 1 + 0.22 * (0.5 + 0.5 * axis(7)) * np.cos(frequency * np.pi * x + np.pi * noise(1.0))
    light = 1 + noise(0.07)
    shape = np.stack([0.5 + 0.4 * axis(k) + noise(0.04) for k in (0, 1, 2)], axis=-1)
    ground_light, warmth = 0.5 + 0.38 * axis(3), 0.2 * axis(4)
    ground = np.stack([ground_light - warmth, ground_light + 0 * warmth, ground_light + warmth], axis=-1)
    shape = shape * (stripes * light)[..., None]
    ground = ground * (1 + 0.1 * noise(1.0) * grid[None, :, None])[..., None]
    pixels = ground + inside[..., None] * (shape - ground)
    pixels = pixels + rng.normal(scale=0.03, size=pixels.shape).astype(np.float32)
    return (pixels.clip(0, 1) * 255).astype(np.uint8), inside
