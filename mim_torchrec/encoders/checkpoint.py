"""An item encoder on disk: a directory that needs nothing from anywhere else to be loaded.

    config.json          format, names, sizes, preprocessing
    model.safetensors    all weights, towers included
    text/                configuration and tokenizer of the text tower
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.training.checkpoint import whole_directory, write_json

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A directory is no encoder checkpoint, or a damaged one."""


def save_encoder(encoder: ItemEncoder, path: Path) -> str:
    """Write a checkpoint, in the place of what is at `path`; returns its version."""
    with whole_directory(path) as folder:
        state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
        # shared tensors are saved twice rather than refused
        save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
        encoder.text.save(folder / "text")
        config = {
            "format_version": FORMAT_VERSION,
            "encoder_version": module_version(encoder),
            "vision": {"name": encoder.config.vision.name} | encoder.vision.preprocessing(),
            "text": {"name": Path(encoder.config.text.name).name, "max_length": encoder.text.max_length},
            "head": dataclasses.asdict(encoder.config.head),
        }
        write_json(folder / "config.json", config)
    return config["encoder_version"]


def load_encoder(path: Path | str, device: torch.device | str = "cpu") -> ItemEncoder:
    """Read a checkpoint.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        CheckpointError: it is not there, of another format, or its content is not what its version says.
    """
    path = Path(path)
    config = _read_config(path)
    settings = ItemEncoderConfig(
        vision=VisionEncoderConfig(
            name=config["vision"]["name"], weights="random", image_size=config["vision"]["image_size"]
        ),
        text=TextEncoderConfig(weights="random", **config["text"]),
        head=HeadConfig(**config["head"]),
    )
    vision = VisionEncoder(settings.vision, load_weights=False)
    text = TextEncoder(settings.text, saved=path / "text")
    encoder = ItemEncoder(settings, vision, text)
    try:
        encoder.load_state_dict(load_file(path / "model.safetensors"))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path / 'model.safetensors'}: {error}") from error
    found = module_version(encoder)
    if found != config["encoder_version"]:
        raise CheckpointError(
            f"{path}: config.json says version {config['encoder_version']}, the content is {found}: weights, "
            "tokenizer or preprocessing have changed since it was written"
        )
    return encoder.to(device).eval()


def encoder_version(path: Path | str) -> str:
    """Version of a checkpoint, which tables of its vectors carry: a hash of all they depend on."""
    return _read_config(Path(path))["encoder_version"]


def module_version(encoder: ItemEncoder | VisionEncoder | TextEncoder) -> str:
    """Hash of weights and preprocessing (and with them of sizes): 16 hexadecimal digits."""
    digest = hashlib.sha256()
    if isinstance(encoder, ItemEncoder):
        settings: dict[str, Any] = {
            "vision": encoder.vision.preprocessing(),
            "text": encoder.text.preprocessing(),
            "head": dataclasses.asdict(encoder.config.head),
        }
    else:
        settings = encoder.preprocessing()
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise CheckpointError(f"{path} is no encoder checkpoint: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / 'config.json'}: format_version {config.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}"
        )
    return config
