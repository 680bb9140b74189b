"""Small encoders with random weights: what is timed or compared does not depend on their values."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mim_torchrec.data.images import decode_image
from mim_torchrec.encoders.checkpoint import save_encoder
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.representation.export import TrainedEncoder


@cache
def word_tokenizer() -> str:
    """A tokenizer of 64 invented words, as JSON, for text towers that learn their own."""
    return train_tokenizer([" ".join(f"word{k}" for k in range(64))], 256)


def make_encoder(
    out: Path, titles: list[str], dim: int, vision: str = "test_resnet.r160_in1k", size: int = 32
) -> str:
    """A small encoder of images of `size` pixels and titles, with random weights; returns its version."""
    torch.manual_seed(0)
    config = ItemEncoderConfig(
        vision=VisionEncoderConfig(name=vision, weights="random", image_size=size),
        text=TextEncoderConfig(name="bert-tiny", weights="random", max_length=16),
        head=HeadConfig(dim=dim, fusion_dim=4, hidden_dim=16),
    )
    return save_encoder(ItemEncoder.build(config, train_tokenizer(titles, 512)), out)


def encode_alone(encoder: TrainedEncoder, title: str, image: bytes) -> Tensor:
    """The vector (dim,) float32 of one item by itself."""
    with torch.inference_mode():
        return encoder([decode_image(image)], [title])[0].float().clone()
