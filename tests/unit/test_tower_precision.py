"""Towers in bfloat16, and convolutions with the channels last: near float32, which stays what it was."""

import numpy as np
import pytest
import torch

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.encoders.tower import compute_in
from mim_torchrec.pretraining.alignment import ImageTextModel
from mim_torchrec.pretraining.config import AlignmentConfig, ImageAdaptionConfig, TextAdaptionConfig
from mim_torchrec.pretraining.objective import PretrainingObjective
from mim_torchrec.pretraining.text import LanguageModel
from mim_torchrec.pretraining.vision import MaskedImageModel
from tests.unit.test_pretraining import ROWS, TITLES, bert, inputs, vision_tower

IMAGES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_float32_features_are_those_of_the_models_themselves():
    vision, text = vision_tower(size=32).eval(), bert().eval()
    compute_in("fp32", vision, text)
    scaled = (IMAGES.float() / 255 - vision.mean) / vision.std
    assert torch.equal(vision(IMAGES), vision.model(scaled))
    tokens = text.tokenize(TITLES)
    assert torch.equal(text.hidden_states(tokens), text.model(**tokens).last_hidden_state)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_resnet"])
def test_features_in_bfloat16_are_float32_near_those_in_float32(name):
    for tower, given in ((vision_tower(name, 32).eval(), IMAGES), (bert().eval(), bert().tokenize(TITLES))):
        full = tower(given)
        compute_in("bf16", tower)
        low = tower(given)
        assert low.dtype == torch.float32 and not torch.equal(low, full)
        assert (low - full).norm() < 0.03 * full.norm()


def objective(phase: str) -> PretrainingObjective:
    vision, text = vision_tower(size=64), bert()
    read = inputs(vision, text)
    torch.manual_seed(1)
    if phase == "dda-vision":
        model = MaskedImageModel(vision, read, ImageAdaptionConfig(mask_size=16))
        torch.nn.init.normal_(model.head[0].weight, std=0.1)  # otherwise the loss is that of the mean color
        return model
    if phase == "dda-text":
        return LanguageModel(text, read, TextAdaptionConfig())
    return ImageTextModel((vision, text), read, AlignmentConfig(dim=8))


@pytest.mark.parametrize("phase", ["dda-vision", "dda-text", "dma"])
def test_phases_of_pretraining_in_bfloat16_have_nearly_the_loss_and_gradients_of_float32(phase):
    found = []
    for precision in ("fp32", "bf16"):
        model = objective(phase).eval()
        compute_in(
            precision, *(tower for name, tower in model.named_children() if name in ("vision", "text"))
        )
        loss, _ = model(model.batch(ROWS, (1,)))
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert loss.dtype == torch.float32 and {one.dtype for one in gradients} == {torch.float32}
        found.append((loss.item(), torch.cat(gradients)))
    (full, expected), (low, near) = found
    assert low != full and low == pytest.approx(full, rel=0.02)
    assert (near - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_the_channels_may_lie_last(name):
    tower = vision_tower(name, 32).eval()
    pixels = tower.scaled(IMAGES)
    assert tower.convolutional and pixels.is_contiguous()
    last = tower.model(pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, tower.model(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("test_convnext", True), ("test_vit", False)])
def test_they_do_on_a_gpu_where_a_tower_is_convolutional(name, last):
    with pretended_gpu(Counts()):
        tower = vision_tower(name, 32).to("cuda")
        pixels = tower.scaled(IMAGES.to("cuda"))
    assert pixels.is_contiguous(memory_format=torch.channels_last) is last


def test_batches_are_made_ahead_where_images_are_decoded_for_them():
    vision, text = vision_tower(size=32), bert()
    read = inputs(vision, text)
    assert read.ahead > 0
    held = type(read)(read._catalog, read._encoder, 1.0, read._context)
    assert held.ahead == 0
    assert torch.equal(held.images(np.array([3, 1])), read.images(np.array([3, 1])))
