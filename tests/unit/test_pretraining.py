"""Objectives of pre-training against naive loops and against transformers' own models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

from mim_torchrec.encoders.checkpoint import Towers
from mim_torchrec.encoders.pixels import PixelInputs
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.pretraining.config import ImageAdaptionConfig, TextAdaptionConfig
from mim_torchrec.pretraining.text import IGNORED, LanguageModel
from mim_torchrec.pretraining.vision import MaskedImageModel
from mim_torchrec.training.distributed import DistributedContext

TITLES = [
    "red wool hat", "blue wool scarf with fringes", "green cotton shirt", "", "grey hat", "pink silk scarf"
]  # fmt: skip
ROWS = np.arange(len(TITLES))
ONE = DistributedContext(0, 1, torch.device("cpu"))


class Catalog:
    """Random images and the titles above."""

    num_images = len(TITLES)

    def __init__(self, titles: list[str] = TITLES) -> None:
        self._titles = titles

    def titles(self, rows: np.ndarray) -> list[str]:
        return [self._titles[row] for row in rows]

    def decode(self, image: int, vision: VisionEncoder) -> torch.Tensor:
        draws = torch.Generator().manual_seed(image)
        shape = (3, vision.image_size, vision.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, generator=draws)


def vision_tower(name: str = "test_convnext", size: int = 64) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(VisionEncoderConfig(name=name, weights="random", image_size=size))


def bert() -> TextEncoder:
    torch.manual_seed(0)
    config = TextEncoderConfig(name="bert-tiny", weights="random", max_length=12)
    return TextEncoder(config, tokenizer=train_tokenizer(TITLES))


def gpt2(folder: Path) -> TextEncoder:
    """A tiny GPT-2 from a local directory, whose tokenizer has neither a mask nor a pad token."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_str(train_tokenizer(TITLES))
    tokenizer.post_processor = None
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
    config = GPT2Config(
        vocab_size=len(fast), n_embd=16, n_layer=2, n_head=2, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2Model(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return TextEncoder(TextEncoderConfig(name=str(folder), max_length=16))


def inputs(vision: VisionEncoder | None, text: TextEncoder | None, titles: list[str] = TITLES) -> PixelInputs:
    return PixelInputs(Catalog(titles), Towers(vision, text) if vision else _TextOnly(text), None, ONE)


class _TextOnly:
    class vision:
        image_size = 1

    def __init__(self, text: TextEncoder) -> None:
        self.text = text


def image_model(name: str = "test_convnext", size: int = 64, fix: bool = False, **config) -> MaskedImageModel:
    vision = vision_tower(name, size)
    settings = ImageAdaptionConfig(**{"mask_size": 16, "mask_ratio": 0.5} | config)
    return MaskedImageModel(vision, inputs(vision, bert()), settings, fix)


def language_model(text: TextEncoder, titles: list[str] = TITLES, **config) -> LanguageModel:
    return LanguageModel(text, inputs(None, text, titles), TextAdaptionConfig(**config))


def test_image_loss_is_the_mean_over_masked_pixels():
    model = image_model().eval()
    batch = model.batch(ROWS, (0,))
    mean, std = model.vision.mean.flatten(), model.vision.std.flatten()
    pixels = torch.empty(len(ROWS), 3, 64, 64)
    for c in range(3):
        pixels[:, c] = (batch.images[:, c] / 255 - mean[c]) / std[c]
    seen, masked = pixels.clone(), torch.zeros(len(ROWS), 64, 64, dtype=torch.bool)
    for n in range(len(ROWS)):
        for i in range(64):
            for j in range(64):
                if batch.masked[n, i // 16, j // 16]:
                    masked[n, i, j] = True
                    seen[n, :, i, j] = 0
    with torch.no_grad():
        features = model.vision.model.forward_features(seen)
        rebuilt = model.head(features)
        losses = [abs(rebuilt[n, c, i, j] - pixels[n, c, i, j])
                  for n, i, j in masked.nonzero().tolist() for c in range(3)]  # fmt: skip
        loss = model(batch)[0]
    assert float(loss) == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


def test_what_is_masked_is_not_seen():
    model = image_model().eval()
    batch = model.batch(ROWS, (0,))
    hidden = batch.masked.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    seen = []
    model.head.register_forward_hook(lambda _, __, output: seen.append(output))
    model(batch)
    batch.images = torch.where(hidden, 255 - batch.images, batch.images)
    model(batch)
    assert torch.equal(*seen)


def test_the_same_share_of_every_image_is_masked_elsewhere():
    masked = image_model(mask_ratio=0.6).batch(ROWS, (0,)).masked
    assert masked.sum((1, 2)).tolist() == [10] * len(ROWS)  # of 16 patches
    assert len({tuple(mask.flatten().tolist()) for mask in masked}) > 1


def test_masks_depend_on_the_key_alone():
    model = image_model()
    first, other, again = (model.batch(ROWS, key).masked for key in ((1, 2), (1, 3), (1, 2)))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "name", ["test_convnext", "test_vit", "test_efficientnet", "test_resnet", "test_nfnet"]
)
def test_every_kind_of_tower_learns_to_reconstruct(name):
    model = image_model(name)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(8):
        loss = model(model.batch(ROWS, (step // 4,)))[0]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[0] and losses[7] < losses[4]


def test_what_follows_the_last_stage_is_adapted_too():
    model = image_model("tf_efficientnet_lite0")
    model(model.batch(ROWS[:2], (0,)))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_share_explained_is_that_of_guessing_the_mean_color():
    model = image_model().eval()
    torch.nn.init.zeros_(model.head[0].weight)
    torch.nn.init.zeros_(model.head[0].bias)
    assert float(model(model.batch(ROWS, (0,)))[1]["explained"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("fix", [True, False])
def test_fixed_batch_norm_keeps_its_statistics_in_training(fix):
    model = image_model("test_resnet", fix=fix).train()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model(model.batch(ROWS, (0,)))
    changed = [
        name for name, value in model.named_buffers() if name in before and (value != before[name]).any()
    ]
    assert before and bool(changed) == (not fix)
    assert any(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize("size", [64, 48])
def test_images_that_are_not_several_patches_are_refused(size):
    with pytest.raises(ValueError, match=r"--dda-vision.mask-size"):
        image_model(mask_size=size)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masking_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match=r"--dda-vision.mask-ratio"):
        image_model(mask_ratio=ratio)
    with pytest.raises(ValueError, match=r"--dda-text.mask-ratio"):
        language_model(bert(), mask_ratio=ratio)


def test_labels_are_the_tokens_that_were_masked_and_never_special_ones():
    text = bert()
    model = language_model(text, mask_ratio=0.5)
    original = text.tokenize(TITLES)["input_ids"]
    special = {text.tokenizer.cls_token_id, text.tokenizer.sep_token_id, text.tokenizer.pad_token_id}
    batch = model.batch(ROWS, (0,))
    labels, ids = batch.labels, batch.tokens["input_ids"]
    wanted = labels != IGNORED
    assert wanted.any()
    assert torch.equal(labels[wanted], original[wanted])
    assert torch.equal(ids[~wanted], original[~wanted])
    assert not special & set(labels[wanted].tolist())


def test_so_many_tokens_are_masked_as_was_asked_for():
    text = bert()
    model = language_model(text, mask_ratio=0.3)
    masked = total = 0
    for key in range(100):
        masked += int((model.batch(ROWS, (key,)).labels != IGNORED).sum())
        total += sum(len(text.tokenizer(title, add_special_tokens=False)["input_ids"]) for title in TITLES)
    assert masked / total == pytest.approx(0.3, abs=0.03)  # 4 standard deviations


def test_masked_tokens_depend_on_the_key_alone():
    model = language_model(bert(), mask_ratio=0.5)
    first, other, again = (model.batch(ROWS, key).labels for key in ((1, 2), (1, 3), (1, 2)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_masked_loss_is_that_of_transformers():
    text = bert()
    model = language_model(text, mask_ratio=0.5)
    batch = model.batch(ROWS, (0,))
    theirs = BertForMaskedLM(text.model.config)
    theirs.bert.load_state_dict(text.model.state_dict(), strict=False)  # it has no pooler
    theirs.cls.load_state_dict(model.head.model.cls.state_dict())
    with torch.no_grad():
        expected = theirs(**batch.tokens, labels=batch.labels)
        loss, report = model(batch)
    assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
    wanted = batch.labels != IGNORED
    right = expected.logits.argmax(-1)[wanted] == batch.labels[wanted]
    assert float(report["accuracy"]) == pytest.approx(float(right.float().mean()))


def test_causal_loss_is_that_of_transformers(tmp_path):
    text = gpt2(tmp_path)
    model = language_model(text)
    assert model.objective == "causal"
    batch = model.batch(np.array([0, 1, 2]), (0,))
    theirs = GPT2LMHeadModel(text.model.config)
    theirs.transformer.load_state_dict(text.model.state_dict())
    with torch.no_grad():
        expected = theirs(**batch.tokens, labels=batch.labels)
        assert float(model(batch)[0]) == pytest.approx(float(expected.loss), rel=1e-5)


def test_the_head_shares_the_embeddings_of_the_tower(tmp_path):
    for text in (bert(), gpt2(tmp_path)):
        model = language_model(text)
        embeddings = text.model.get_input_embeddings().weight
        assert any(parameter is embeddings for parameter in model.head.parameters())
        shared = [name for name, parameter in model.named_parameters() if parameter is embeddings]
        assert len(shared) == 1 and shared[0].startswith("text.")


def test_a_language_model_learns():
    torch.manual_seed(0)
    model = language_model(bert(), mask_ratio=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batch = model.batch(ROWS, (0,))
    losses = []
    for _ in range(5):
        loss = model(batch)[0]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_titles_without_words_give_no_loss_and_no_nan(tmp_path):
    for text in (bert(), gpt2(tmp_path)):
        model = language_model(text, titles=[""] * 3)
        loss, _ = model(model.batch(np.arange(3), (0,)))
        loss.backward()
        assert float(loss.detach()) == 0
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_a_tower_without_a_mask_token_is_not_masked(tmp_path):
    with pytest.raises(ValueError, match="--dda-text.objective mlm: GPT2Config"):
        language_model(gpt2(tmp_path), objective="mlm")


def test_a_tower_that_sees_the_tokens_to_come_does_not_predict_them():
    with pytest.raises(ValueError, match="--dda-text.objective causal: BertConfig"):
        language_model(bert(), objective="causal")
