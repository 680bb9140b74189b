"""Towers without C-SFT: the baseline that C-SFT has to beat (Tables 3 and 5, "w/o C-SFT").

The features of both towers are L2-normalized, concatenated and projected to the table's dim by a principal
component analysis of all items. Nothing is trained.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mim_torchrec.embeddings.remote.places import in_object_store
from mim_torchrec.encoders.checkpoint import load_towers, module_version
from mim_torchrec.encoders.principal import principal_components
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext

PLAIN = "plain:"


class PlainTowers:
    """Pretrained towers, as they are.

    Args:
        spec: ``plain:<vision>+<text>``, names as the encoders have them, or ``plain:<directory>`` of towers.
        image_size: side of the images; ``None`` is the tower's own, and that of a directory.
        device: where they run.

    Raises:
        CheckpointError: the directory holds no towers.
        OptionError: ``spec`` is neither, or there is an image size beside a directory.
    """

    def __init__(self, spec: str, image_size: int | None, device: torch.device) -> None:
        place = spec.removeprefix(PLAIN)
        names = place.split("+")
        if in_object_store(place) or Path(place).is_dir():
            if image_size is not None:
                raise OptionError(f"--image-size: the towers in {place} have theirs, leave it out")
            vision, text = load_towers(place)
        elif len(names) == 2 and all(names):
            named = VisionEncoderConfig(name=names[0], weights="pretrained", image_size=image_size)
            vision, text = VisionEncoder(named), TextEncoder(TextEncoderConfig(name=names[1]))
        else:
            expected = f"{PLAIN}<vision>+<text> or {PLAIN}<directory of towers>"
            raise OptionError(f"--encoder {spec}: expected {expected}")
        self.vision, self.text = vision.to(device).eval(), text.to(device).eval()
        self.device = device
        self.feature_dim = vision.feature_dim + text.feature_dim
        settings = {"vision": asdict(vision.config), "text": asdict(text.config)}
        self.description: dict[str, Any] = {"kind": "plain", **settings}
        self.version = f"{module_version(self.vision)}-{module_version(self.text)}"

    def of_pixels(self, pixels: Tensor, titles: list[str]) -> Tensor:
        """Return the concatenated features (num_items, feature_dim), the part of each tower of length 1.

        Args:
            pixels: (num_items, 3, image_size, image_size) uint8, as ``vision.transform`` makes them.
            titles: as many.
        """
        tokens = {name: value.to(self.device) for name, value in self.text.tokenize(titles).items()}
        return self.of_features(self.vision(pixels.to(self.device)), self.text(tokens))

    def of_features(self, image: Tensor, text: Tensor) -> Tensor:
        """Return what ``of_pixels`` returns, from the features (num_items, dim) of each tower."""
        return torch.cat([F.normalize(image, dim=1), F.normalize(text, dim=1)], dim=1)


@dataclass(frozen=True)
class Projection:
    """x -> (x - mean) V, with V (feature_dim, dim) the leading principal components of ``items`` items."""

    mean: Tensor
    components: Tensor
    items: int

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.components

    def version(self, towers: str) -> str:
        """Return the table_version of features of these towers projected like this."""
        digest = hashlib.sha256(towers.encode())
        for part in (self.mean, self.components):
            digest.update(part.contiguous().numpy().tobytes())
        return f"plain-{digest.hexdigest()[:16]}"


def fit_projection(features: Tensor, dim: int, most: int, context: DistributedContext) -> Projection:
    """Compute the principal components on rank 0 and give them to all ranks.

    Args:
        features: (num_items, feature_dim) of this rank's items.
        dim: number of components.
        most: items used, over all ranks; evenly spaced where there are more.
        context: the ranks, all of which call this.

    Raises:
        OptionError: fewer items or features than ``dim``.
    """
    total = sum(context.all_gather_objects(len(features)))
    step = -(-total // most) if total else 1
    gathered = context.all_gather_objects(features[::step])
    sample = torch.cat(gathered)
    projection = None
    if context.is_main:
        found = principal_components(sample, dim)
        projection = Projection(found.mean, found.components, len(sample))
    return context.broadcast_object(projection)
