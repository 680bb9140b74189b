"""Towers on disk: they come back as they were, alone, and nothing else is taken for them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mim_torchrec.encoders.checkpoint import (
    CheckpointError,
    Towers,
    load_encoder,
    load_towers,
    save_encoder,
    save_towers,
    towers_in_place_of,
)
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig

TITLES = ["red wool hat", "blue wool scarf"]
VISION = VisionEncoderConfig(name="test_convnext", weights="random", image_size=32)
TEXT = TextEncoderConfig(name="bert-tiny", weights="random", max_length=8)


@pytest.fixture
def towers() -> Towers:
    torch.manual_seed(0)
    text = TextEncoder(TEXT, tokenizer=train_tokenizer(TITLES))
    return Towers(VisionEncoder(VISION).eval(), text.eval())


@pytest.fixture
def folder(towers, tmp_path) -> Path:
    save_towers(*towers, tmp_path / "towers")
    return tmp_path / "towers"


def test_towers_give_the_same_features_wherever_they_are_moved(towers, folder, tmp_path):
    loaded = load_towers(shutil.move(folder, tmp_path / "elsewhere"))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded.vision(pixels), towers.vision(pixels))
    assert torch.equal(*(tower.text(tower.text.tokenize(TITLES)) for tower in (loaded, towers)))
    assert not loaded.vision.training and not loaded.text.training


def test_towers_name_no_other_place(folder):
    for file in folder.rglob("*.json"):
        assert str(folder.parent) not in file.read_text()


def test_towers_are_replaced_as_a_whole(towers, folder):
    version = json.loads((folder / "config.json").read_text())["towers_version"]
    assert save_towers(*load_towers(folder), folder) == version
    with torch.no_grad():
        next(towers.text.parameters()).add_(1)
    assert save_towers(*towers, folder) != version
    assert sorted(path.name for path in folder.parent.iterdir()) == ["towers"]


@pytest.mark.parametrize("file", ["vision.safetensors", "text.safetensors"])
def test_changed_weights_under_the_old_version_are_refused(folder, file):
    state = load_file(folder / file)
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_file(state | {name: state[name] + 1}, folder / file)
    with pytest.raises(CheckpointError, match="config.json says version"):
        load_towers(folder)


def test_an_encoder_is_not_towers_and_towers_are_no_encoder(towers, folder, tmp_path):
    settings = ItemEncoderConfig(vision=VISION, text=TEXT, head=HeadConfig(dim=4, fusion_dim=2))
    save_encoder(ItemEncoder(settings, *towers), tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="is not a checkpoint of towers"):
        load_towers(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="is not an encoder checkpoint"):
        load_encoder(folder)


def test_no_towers_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint of towers"):
        load_towers(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "flag, vision, text",
    [
        ("--vision.name", VisionEncoderConfig(name="test_vit"), TextEncoderConfig()),
        ("--vision.image-size", VisionEncoderConfig(image_size=64), TextEncoderConfig()),
        ("--text.weights", VisionEncoderConfig(), TextEncoderConfig(weights="random")),
        ("--text.max-length", VisionEncoderConfig(), TextEncoderConfig(max_length=9)),
    ],
)
def test_flags_that_towers_settle_are_refused_beside_them(folder, flag, vision, text):
    with pytest.raises(ValueError, match=f"{flag} is settled by --towers"):
        towers_in_place_of(folder, vision, text)
