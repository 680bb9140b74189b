"""Two gloo ranks pre-train as one process that sees every item, and end a run together."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.encoders.checkpoint import Towers, load_towers
from mim_torchrec.encoders.pixels import PixelInputs
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.pretraining.alignment import ImageTextModel, ItemBatch
from mim_torchrec.pretraining.config import AlignmentConfig, ImageAdaptionConfig, TextAdaptionConfig
from mim_torchrec.pretraining.main import main
from mim_torchrec.pretraining.objective import PretrainingObjective
from mim_torchrec.pretraining.text import LanguageModel, TokenBatch, predicted
from mim_torchrec.pretraining.vision import MaskedImageModel, MaskedImages
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.history import read_history
from tests.ranks import run_ranks

N, RANKS = 4, 2
TITLES = ["red wool hat", "blue scarf with long fringes", "hat", "shirt", "", "", "", ""]
"""The second rank has no words in the test of that name."""


class Catalog:
    num_images = RANKS * N

    def titles(self, rows: np.ndarray) -> list[str]:
        return [TITLES[row] for row in rows]

    def decode(self, image: int, vision: VisionEncoder) -> torch.Tensor:
        draws = torch.Generator().manual_seed(image)
        return torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=draws)


def objective_of(phase: str) -> PretrainingObjective:
    torch.manual_seed(0)
    vision = VisionEncoder(VisionEncoderConfig(name="test_convnext", weights="random", image_size=32))
    text = TextEncoder(
        TextEncoderConfig(name="bert-tiny", weights="random", max_length=12),
        tokenizer=train_tokenizer(TITLES),
    )
    inputs = PixelInputs(Catalog(), Towers(vision, text), None, DistributedContext(0, 1, torch.device("cpu")))
    if phase == "dda-vision":
        return MaskedImageModel(vision, inputs, ImageAdaptionConfig(mask_size=8))
    if phase == "dma":
        return ImageTextModel(Towers(vision, text), inputs, AlignmentConfig(dim=6))
    return LanguageModel(text, inputs, TextAdaptionConfig(mask_ratio=0.5))


def part_of(batch, mine: slice):
    """Some of the items of a batch."""
    if isinstance(batch, MaskedImages):
        return MaskedImages(batch.images[mine], batch.masked[mine])
    if isinstance(batch, TokenBatch):
        tokens, labels = {name: value[mine] for name, value in batch.tokens.items()}, batch.labels[mine]
        return TokenBatch(tokens, labels, predicted(labels, "mlm"))
    tokens = {name: value[mine] for name, value in batch.tokens.items()}
    return ItemBatch(batch.images[mine], tokens, batch.rows[mine])


def one_rank_of_two(phase: str):
    rank = torch.distributed.get_rank()
    objective = objective_of(phase)
    batch = objective.batch(np.arange(RANKS * N), (0,))
    model = DistributedDataParallel(objective, find_unused_parameters=phase == "dda-vision")
    loss, _ = model(part_of(batch, slice(rank * N, (rank + 1) * N)))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("phase", ["dda-vision", "dda-text", "dma"])
def test_two_ranks_have_the_loss_and_the_gradients_of_one(phase):
    objective = objective_of(phase)
    loss, _ = objective(objective.batch(np.arange(RANKS * N), (0,)))
    loss.backward()
    found = run_ranks(one_rank_of_two, RANKS, phase)
    assert float(loss.detach()) > 0
    assert sum(rank[0] for rank in found) / RANKS == pytest.approx(float(loss.detach()), rel=1e-5)
    for _, theirs in found:
        for name, parameter in objective.named_parameters():
            if parameter.grad is None:  # a norm after pooling, of which a feature map knows nothing
                assert theirs.get(name) is None
            else:
                torch.testing.assert_close(theirs[name], parameter.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_a_rank_whose_titles_have_no_words_waits_for_the_other():
    (first, _), (second, _) = run_ranks(one_rank_of_two, RANKS, "dda-text")
    assert first > 0 and second == 0


def stage(data: str, out: str, *more: str):
    flags = {
        "data": data, "out": out, "item-cache": f"{out}.items",
        "vision.name": "test_convnext", "vision.weights": "random", "vision.image-size": "32",
        "text.name": "bert-tiny", "text.weights": "random",
        "dda-vision.mask-size": "8", "dma.temperature": "0.2",
    }  # fmt: skip
    for phase in ("dda-vision", "dda-text", "dma"):
        flags |= {f"{phase}.epochs": "2", f"{phase}.batch-size": "32"}
    main([word for name, value in flags.items() for word in (f"--{name}", value)] + list(more))


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    data = tmp_path_factory.mktemp("pretraining") / "shop"
    make_shop(["--out", str(data), "--items", "170", "--users", "30", "--requests", "60",
          "--searches", "30", "--browsing", "200", "--categories", "3", "--image-size", "32"])  # fmt: skip
    return str(data)


def test_two_ranks_align_the_towers_as_one_does(shop, tmp_path):
    histories = []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        run_ranks(stage, world_size, shop, str(out), "--phases", "dma")
        histories.append(asdict(read_history(out / "dma" / "history.jsonl")))
    losses = [[entry["loss"] for entry in history["steps"]] for history in histories]
    assert len(losses[0]) == 2 * (162 // 32)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    validation = [[entry["validation_loss"] for entry in history["epochs"]] for history in histories]
    assert validation[0] == pytest.approx(validation[1], abs=2e-3)
    one, two = (load_towers(tmp_path / name / "towers") for name in ("1", "2"))
    for ours, theirs in zip(one, two, strict=True):
        for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, atol=5e-3, rtol=1e-2, msg=name)


def test_two_ranks_run_every_phase(shop, tmp_path):
    out = tmp_path / "out"
    run_ranks(stage, RANKS, shop, str(out))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["world_size"] == RANKS
    assert list(metrics["phases"]) == ["dda-vision", "dda-text", "dma"]
    for phase in metrics["phases"].values():
        assert phase["best"]["validation_loss"] < phase["before"]["validation_loss"]
