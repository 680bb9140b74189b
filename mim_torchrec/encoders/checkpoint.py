"""An item encoder, or two towers alone, on disk: a directory that needs nothing else to be loaded.

config.json          format, names, sizes, preprocessing
model.safetensors    all weights, towers included; for towers vision.safetensors and text.safetensors
text/                configuration and tokenizer of the text tower
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.tensor_files import DamagedFile, read_tensors, write_tensors
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.errors import ExpectedError, OptionError

FORMAT_VERSION = 1


class CheckpointError(ExpectedError, ValueError):
    """A directory is no checkpoint of what was asked for, or a damaged one."""


class Towers(NamedTuple):
    """What pre-training gives to the next stage."""

    vision: VisionEncoder
    text: TextEncoder


def save_encoder(encoder: ItemEncoder, path: Path) -> str:
    """Write a checkpoint, replacing what is at `path`; returns its version."""
    with atomic_directory(path) as folder:
        _save_weights(encoder, folder / "model.safetensors")
        encoder.text.save(folder / "text")
        config = {
            "format_version": FORMAT_VERSION,
            "encoder_version": module_version(encoder),
            **_describe(encoder.vision, encoder.text),
            "head": dataclasses.asdict(encoder.config.head),
        }
        write_json(folder / "config.json", config)
    return config["encoder_version"]


def load_encoder(path: Path | str | Url, device: torch.device | str = "cpu") -> ItemEncoder:
    """Read an item encoder that `mim csft` or `save_encoder` wrote.

    Args:
        path: the checkpoint's directory or URL, such as `<out>/encoder` of a run of `mim csft`.
        device: where the encoder goes.

    Returns:
        The encoder, in evaluation mode; `encode` takes it.

    Raises:
        CheckpointError: it is not there, of another format, or its content is not what its version says.
    """
    path = fetched(path)
    config = _read_config(path, "encoder_version")
    vision, text = _build_towers(config, path)
    settings = ItemEncoderConfig(vision=vision.config, text=text.config, head=HeadConfig(**config["head"]))
    encoder = ItemEncoder(settings, vision, text)
    _load_weights(encoder, path / "model.safetensors")
    _check_version(path, config["encoder_version"], module_version(encoder))
    return encoder.to(device).eval()


def encoder_version(path: Path | str | Url) -> str:
    """Version of a checkpoint, which tables of its vectors carry: a hash of all they depend on."""
    return _read_config(fetched(path), "encoder_version")["encoder_version"]


def save_towers(vision: VisionEncoder, text: TextEncoder, path: Path) -> str:
    """Write two towers, replacing what is at `path`; returns their version."""
    version = towers_version(vision, text)
    with atomic_directory(path) as folder:
        _save_weights(vision, folder / "vision.safetensors")
        _save_weights(text, folder / "text.safetensors")
        text.save(folder / "text")
        config = {"format_version": FORMAT_VERSION, "towers_version": version, **_describe(vision, text)}
        write_json(folder / "config.json", config)
    return version


def load_towers(
    path: Path | str | Url, vision: VisionEncoderConfig | None = None, text: TextEncoderConfig | None = None
) -> Towers:
    """Read two towers.

    Args:
        path: what `save_towers` wrote, or the URL of it.
        vision: options besides the name, the weights and the sizes, which are those in `path`.
        text: likewise.

    Returns:
        The towers on the CPU, in evaluation mode.

    Raises:
        CheckpointError: they are not there, of another format, or not what their version says.
    """
    path = fetched(path)
    config = _read_config(path, "towers_version")
    towers = _build_towers(config, path, vision, text)
    _load_weights(towers.vision, path / "vision.safetensors")
    _load_weights(towers.text, path / "text.safetensors")
    _check_version(path, config["towers_version"], towers_version(*towers))
    return Towers(towers.vision.eval(), towers.text.eval())


def towers_in_place_of(path: Path | Url, vision: VisionEncoderConfig, text: TextEncoderConfig) -> Towers:
    """`load_towers` for a stage whose flags could name towers as well.

    Raises:
        CheckpointError: as `load_towers`.
        OptionError: a flag names a tower, its weights or its sizes, all of which are those in `path`.
    """
    of_text = ("name", "weights", "tokenizer", "max_length", "pooling")
    defaults: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
        "vision": (vision, VisionEncoderConfig(), ("name", "weights", "image_size")),
        "text": (text, TextEncoderConfig(), of_text),
    }
    for tower, (given, default, fields) in defaults.items():
        for name in fields:
            if getattr(given, name) != getattr(default, name):
                flag = f"--{tower}.{name.replace('_', '-')}"
                raise OptionError(f"{flag} is settled by --towers {path}; leave one of them out")
    return load_towers(path, vision, text)


def towers_version(vision: VisionEncoder, text: TextEncoder) -> str:
    """Hash of both towers: 16 hexadecimal digits."""
    both = f"{module_version(vision)} {module_version(text)}"
    return hashlib.sha256(both.encode()).hexdigest()[:16]


def module_version(encoder: ItemEncoder | VisionEncoder | TextEncoder) -> str:
    """Hash of weights and preprocessing (and with them of sizes): 16 hexadecimal digits."""
    digest = hashlib.sha256()
    if isinstance(encoder, ItemEncoder):
        settings: dict[str, Any] = {
            "vision": encoder.vision.preprocessing(),
            "text": encoder.text.preprocessing(),
            "head": encoder.config.head.facts(),
        }
    else:
        settings = encoder.preprocessing()
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _describe(vision: VisionEncoder, text: TextEncoder) -> dict[str, Any]:
    return {
        "vision": vision.description(),
        "text": {"name": Path(text.config.name).name, "max_length": text.max_length, "pooling": text.pooling},
    }


def _build_towers(
    config: dict[str, Any],
    path: Path,
    vision: VisionEncoderConfig | None = None,
    text: TextEncoderConfig | None = None,
) -> Towers:
    sizes = {"name": config["vision"]["name"], "image_size": config["vision"]["image_size"]}
    vision = dataclasses.replace(vision or VisionEncoderConfig(), weights="random", **sizes)
    written = {"pooling": "mean"} | config["text"]  # all there was before there was a choice
    text = dataclasses.replace(text or TextEncoderConfig(), weights="random", **written)
    tower = VisionEncoder(vision, load_weights=False, described=config["vision"])
    return Towers(tower, TextEncoder(text, saved=path / "text"))


def _save_weights(module: nn.Module, file: Path) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    # shared tensors are saved twice rather than refused
    write_tensors(file, {name: value.clone() for name, value in state.items()})


def _load_weights(module: nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(read_tensors(file))
    except (RuntimeError, OSError, DamagedFile) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_version(path: Path, stated: str, found: str) -> None:
    if found != stated:
        raise CheckpointError(
            f"{path}: config.json says version {stated}, the content is {found}: weights, tokenizer or "
            "preprocessing have changed since it was written"
        )


def _read_config(path: Path, version: str) -> dict[str, Any]:
    kind = {"encoder_version": "an encoder checkpoint", "towers_version": "a checkpoint of towers"}[version]
    try:
        config = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise CheckpointError(f"{path} is not {kind}: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / 'config.json'}: format_version {config.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}"
        )
    if version not in config:
        raise CheckpointError(f"{path} is not {kind}: its config.json has no {version}")
    return config
