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
        vision: the vision tower.
        text: the text tower.
        device: where they run.
    """

    def __init__(self, vision: VisionEncoder, text: TextEncoder, device: torch.device) -> None:
        self.vision, self.text = vision.to(device).eval(), text.to(device).eval()
        self.device = device
        self.feature_dim = vision.feature_dim + text.feature_dim
        settings = {"vision": asdict(vision.config), "text": asdict(text.config)}
        self.description: dict[str, Any] = {"kind": "plain", **settings}
        self.version = f"{module_version(self.vision)}-{module_version(self.text)}"

    @classmethod
    def open(cls, spec: str, image_size: int | None, device: torch.device) -> "PlainTowers":
        """Towers by a specification.

        Args:
            spec: ``plain:<vision>+<text>``, names as the encoders have them, or ``plain:<directory>``.
            image_size: side of the images; ``None`` is the tower's own, and that of a directory.
            device: where they run.

        Raises:
            CheckpointError: the directory holds no towers.
            OptionError: ``spec`` is neither, or there is an image size beside a directory.
        """
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
        return cls(vision, text, device)

    def of_features(self, image: Tensor, text: Tensor) -> Tensor:
        """Features (num_items, dim) of both towers side by side, the part of each of length 1."""
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
