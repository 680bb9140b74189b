"""The synthetic shop of experiments: its size, the stages that make it and its encoder, common settings."""

from dataclasses import dataclass
from pathlib import Path

from mim_torchrec.benchmarks.harness.stages import Stage, Value

ENCODER: dict[str, Value] = {
    "vision.name": "efficientnet_lite0",
    "vision.image-size": 64,
    "text.name": "minilm",
    "freeze-towers": True,
}
PLAIN = "plain:efficientnet_lite0+minilm"
PLAIN_OPTIONS: dict[str, Value] = {"image-size": 64}
CTR: dict[str, Value] = {"dot_product_features": True, "content-pooling": "mean", "lr": 1e-3}


@dataclass(frozen=True, kw_only=True)
class ShopSizes:
    """Sizes of a synthetic shop and of what is trained on it."""

    items: int = 4000
    """Items of the shop."""
    users: int = 3000
    """Users of the shop."""
    requests: int = 20_000
    """Requests of the shop."""
    candidates: int = 5
    """Candidates of a request."""
    searches: int = 4000
    """Image searches that C-SFT learns from."""
    csft_epochs: int = 10
    """Passes of C-SFT over the searches."""
    csft_batch_size: int = 256
    """Pairs in a step of C-SFT, over all ranks."""
    ctr_epochs: int = 3
    """Passes of the CTR models over the requests; the best by validation AUC is kept."""
    nproc: int = 2
    """Ranks of every stage."""
    seed: int = 0
    """Seed of the shop and of all training."""


def shop_stage(sizes: ShopSizes, root: Path, name: str, style_weight: float) -> Stage:
    """The shop, or with `style_weight` 0 the same items and users who do not care for style."""
    options: dict[str, Value] = {
        "out": root / name,
        "items": sizes.items,
        "users": sizes.users,
        "requests": sizes.requests,
        "candidates": sizes.candidates,
        "searches": sizes.searches,
        "browsing": 3 * sizes.requests,
        "style-weight": style_weight,
        "seed": sizes.seed,
    }
    return Stage(name=name, command=("shop",), options=options, out=root / name)


def csft_stage(sizes: ShopSizes, root: Path, name: str, shop: Stage) -> Stage:
    """C-SFT on the shop's image searches, above frozen pretrained towers."""
    options: dict[str, Value] = {
        "data": shop.out,
        "out": root / name,
        "epochs": sizes.csft_epochs,
        "batch-size": sizes.csft_batch_size,
        "seed": sizes.seed,
    }
    return Stage(name=name, command=("csft",), options=options | ENCODER, out=root / name,
                 ranks=f"1x{sizes.nproc}", after=(shop,))  # fmt: skip
