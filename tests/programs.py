"""Small shops, and command lines for the programs that run on them."""

from collections.abc import Mapping
from pathlib import Path

from mim_torchrec.data.shop import main as make_shop

TINY_TOWERS = {
    "vision.name": "test_vit", "vision.weights": "random", "vision.image-size": "32",
    "text.name": "bert-tiny", "text.weights": "random", "head.dim": "16", "head.fusion-dim": "8",
}  # fmt: skip


def small_shop(
    folder: Path, items: int = 150, searches: int = 300, requests: int = 50, users: int = 30, seed: int = 0
) -> Path:
    """Write a shop of three categories and images of 32 pixels to `<folder>/shop`."""
    sizes = {"items": items, "searches": searches, "requests": requests, "users": users, "seed": seed,
             "browsing": 2 * items, "categories": 3, "image-size": 32}  # fmt: skip
    make_shop(["--out", str(folder / "shop"), *(w for k, v in sizes.items() for w in (f"--{k}", str(v)))])
    return folder / "shop"


def words(data: Path, out: Path, flags: Mapping[str, str], **changes: str) -> list[str]:
    """A command line; a dash in a flag is an underscore in a change, a dot two."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    flags = {**flags, **named}
    return ["--data", str(data), "--out", str(out), *(w for k, v in flags.items() for w in (f"--{k}", v))]
