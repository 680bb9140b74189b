"""What is between a rendering and a photo that a user takes (§3.3): crop, perspective, ground, light, blur.

`mim shop --photo-gap` takes the queries of image searches so, and `mim csft --augment-queries` shows them to
the encoder in further ways. The transforms are those of torchvision; drawn on the CPU, by seeds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mim_torchrec.extras import needs

Transform = Callable[[Tensor], Tensor]
CLUTTER = 4
"""Patches of a ground, along each side."""
DRAWS = (torch.rand, torch.randint, torch.randperm, torch.Tensor.uniform_)
"""What transforms draw by."""


def geometry(gap: float) -> Transform:
    """Where the camera stands: perspective, rotation, distance, an object that is not in the middle.

    Args:
        gap: from 0 (none) to 1.
    """
    with needs("encoders"):
        from torchvision.transforms import v2
    return v2.Compose([
        v2.RandomPerspective(distortion_scale=0.5 * gap, p=1.0),
        v2.RandomAffine(degrees=25 * gap, translate=(0.15 * gap, 0.15 * gap),
                        scale=(1 - 0.4 * gap, 1 + 0.4 * gap), interpolation=v2.InterpolationMode.BILINEAR),
    ])  # fmt: skip


def light(gap: float) -> Transform:
    """Light, colors and focus; `gap` as in `geometry`."""
    with needs("encoders"):
        from torchvision.transforms import v2
    jitter = v2.ColorJitter(brightness=0.5 * gap, contrast=0.5 * gap, saturation=0.5 * gap, hue=0.05 * gap)
    return v2.Compose([jitter, v2.GaussianBlur(5, sigma=(0.1, 0.1 + 1.4 * gap))])


def photographed(pixels: np.ndarray, inside: np.ndarray, gap: float, seed: int) -> np.ndarray:
    """Photos of what renderings show, before a cluttered ground.

    Args:
        pixels: (n, size, size, 3) uint8, renderings.
        inside: (n, size, size) float, 1 where the object is.
        gap: from 0 to 1; at 1 nothing of the rendering's own ground is left.
        seed: equal ones give equal photos.

    Returns:
        (n, size, size, 3) uint8.
    """
    stand, develop, size = geometry(gap), light(gap), pixels.shape[1]
    colors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    kept = 1 - gap * (1 - torch.from_numpy(inside).float().clamp(0, 1))
    photos = []
    with seeded(seed):
        for layers in torch.cat([colors, kept[:, None]], dim=1):
            seen = stand(layers)
            ground = F.interpolate(torch.rand(1, 3, CLUTTER, CLUTTER), (size, size), mode="bilinear")[0]
            photos.append(develop(seen[:3] * seen[3:] + ground * (1 - seen[3:])))
    return (torch.stack(photos).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def augmented(images: Tensor, seeds: Sequence[int], strength: float) -> Tensor:
    """Images as another camera might have taken them; the ground stays.

    Args:
        images: (n, 3, size, size) uint8.
        seeds: of each image; equal ones give equal pixels.
        strength: from 0 to 1, as `gap`.
    """
    stand, develop = geometry(strength), light(strength)
    found = []
    for image, seed in zip(images, seeds, strict=True):
        with seeded(seed):
            found.append(develop(stand(image)))
    return torch.stack(found) if found else images


class seeded(TorchFunctionMode):  # noqa: N801  a context, as `torch.no_grad`
    """A stretch of code whose draws on the CPU depend on a seed.

    They are of a generator of its own: other threads, which may train meanwhile, draw what they would have.

    Args:
        seed: equal ones give equal draws.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = {"generator": self._generator} if func in DRAWS else {}
        return func(*args, **{**(kwargs or {}), **own})
