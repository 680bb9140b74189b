"""Directories that open_clip has written: both towers give what open_clip gives, or are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_torchrec.encoders.checkpoint import load_towers, save_towers
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.errors import OptionError
from tests.unit.test_encoder_files import TITLES
from tests.unit.test_encoder_files import TOKENIZER as LEARNED

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 40, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
CLIP = "vit_base_patch16_clip_224"


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")  # takes seconds to load


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer.from_str(LEARNED)
    learned.add_special_tokens(["<end>"])  # CLIP's end is its highest token
    end = learned.token_to_id("<end>")
    learned.post_processor = TemplateProcessing(single="[CLS] $A <end>",
                                                special_tokens=[("[CLS]", 2), ("<end>", end)])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="[PAD]", eos_token="<end>")


def written(open_clip, folder: Path, vision=(), text=(), safe=True, **top):
    """A model of open_clip and the directory that open_clip saves it in."""
    from open_clip.push_to_hf_hub import save_for_hf
    from open_clip.transform import PreprocessCfg

    fast = tokenizer()
    config = {"embed_dim": 8, "vision_cfg": VIT | dict(vision),
              "text_cfg": TEXT | {"vocab_size": len(fast)} | dict(text), **top}  # fmt: skip
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if top.get("custom_text") else open_clip.CLIP
    model = kind(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    with torch.no_grad():  # positions, classes and norms begin nearly alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    open_clip.model.set_model_preprocess_cfg(model, vars(PreprocessCfg(
        size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")))  # fmt: skip
    save_for_hf(model, fast, config, str(folder), safe_serialization=safe)
    return model


def vision(folder: Path, name: str = CLIP) -> VisionEncoder:
    return VisionEncoder(VisionEncoderConfig(name=name, weights=str(folder))).eval()


def text(folder: Path, **options) -> TextEncoder:
    return TextEncoder(TextEncoderConfig(name=str(folder), **options)).eval()


def their_image(model, images: Tensor) -> Tensor:
    model.visual.proj = None
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    return model.visual((images.float() / 255 - mean) / std)


def their_text(model, tokens: dict[str, Tensor], length: int = 40) -> Tensor:
    ids = torch.zeros(len(tokens["input_ids"]), length, dtype=torch.int64)
    ids[:, : tokens["input_ids"].shape[1]] = tokens["input_ids"] * tokens["attention_mask"]
    if hasattr(model, "text"):
        model.text.text_projection = None
    else:
        model.text_projection = torch.nn.Parameter(torch.eye(16))
    return model.encode_text(ids)


IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("top", "safe"), [({}, True), ({"quick_gelu": True}, False), ({"custom_text": True}, "both")]
)
def test_both_towers_give_what_open_clip_gives(open_clip, tmp_path, top, safe):
    model = written(open_clip, tmp_path / "clip", safe=safe, **top)
    pictures, words = vision(tmp_path / "clip"), text(tmp_path / "clip")
    tokens = words.tokenize(TITLES)
    torch.testing.assert_close(pictures(IMAGES), their_image(model, IMAGES), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(words(tokens), their_text(model, tokens), atol=1e-4, rtol=1e-4)
    found = pictures.preprocessing()
    assert (found["image_size"], found["interpolation"]) == (32, "bilinear")
    save_towers(pictures, words, tmp_path / "towers")
    back = load_towers(tmp_path / "towers")
    assert torch.equal(back.vision(IMAGES), pictures(IMAGES)) and torch.equal(
        back.text(tokens), words(tokens)
    )


def test_a_mean_over_patches_is_that_of_open_clip(open_clip, tmp_path):
    model = written(open_clip, tmp_path / "clip", vision={"pool_type": "avg"})
    torch.testing.assert_close(
        vision(tmp_path / "clip")(IMAGES), their_image(model, IMAGES), atol=1e-4, rtol=1e-4
    )


def test_an_image_tower_of_timm_inside_open_clip_is_loaded(open_clip, tmp_path):
    trunk = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}
    model = written(open_clip, tmp_path / "clip", vision=trunk)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    tower = vision(tmp_path / "clip", "test_vit")
    model.visual.head = torch.nn.Identity()
    torch.testing.assert_close(tower(images), their_image(model, images), atol=1e-4, rtol=1e-4)
    with pytest.raises(OptionError, match="holds a test_vit, not a resnet18; give --vision.name test_vit"):
        vision(tmp_path / "clip", "resnet18")


def test_another_architecture_than_that_of_open_clip_is_refused_with_a_name(open_clip, tmp_path):
    written(open_clip, tmp_path / "clip")
    with pytest.raises(OptionError, match="not a test_vit; give --vision.name vit_base_patch16_clip_224"):
        vision(tmp_path / "clip", "test_vit")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool is True"),
        ("vision_cfg", {"layers": [1, 1, 1, 1]}, "holds a ResNet of open_clip"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "vision_cfg.pos_embed_type is 'sin_cos_2d'"),
        ("vision_cfg", {"image_size": [32, 64]}, "images of .32, 64. pixels"),
        ("vision_cfg", {"timm_model_name": CLIP, "timm_pool": "rot_attn"}, "pools by rot_attn"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask is True"),
        ("text_cfg", {"pool_type": "last"}, "pools by last"),
        ("text_cfg", {"hf_model_name": "xlm-roberta-base"}, "give --text.name xlm-roberta-base"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "text_cfg.tokenizer_kwargs"),
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls is True"),
    ],
)
def test_what_towers_do_not_have_is_refused_by_its_entry(tmp_path, part, change, message):
    config = {"embed_dim": 8, "vision_cfg": dict(VIT), "text_cfg": dict(TEXT)}
    config[part] |= change
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=message):
        vision(tmp_path) if part == "vision_cfg" else text(tmp_path)


def test_missing_tensors_and_missing_weights_are_named(open_clip, tmp_path):
    written(open_clip, tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    state = load_file(file)
    cut = {key: value for key, value in state.items() if "resblocks.1" not in key}
    save_file(cut, file)
    with pytest.raises(OptionError, match=r"lack 16 tensors of the tower \(encoder.layers.1|text_model.enc"):
        text(tmp_path / "clip")
    with pytest.raises(OptionError, match=r"lack 12 tensors of the tower \(blocks.1"):
        vision(tmp_path / "clip")
    with pytest.raises(OptionError, match="says how pixels are scaled and which activation is used"):
        vision(file)
    file.unlink()
    for load in (text, vision):
        with pytest.raises(OptionError, match="clip has no weights of open_clip"):
            load(tmp_path / "clip")


def test_a_tokenizer_that_ends_titles_otherwise_is_refused(open_clip, tmp_path):
    written(open_clip, tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_config.json"
    about = json.loads(file.read_text())
    about["model_cfg"]["text_cfg"] |= {"pool_type": "eos", "eos_id": 5}
    file.write_text(json.dumps(about))
    with pytest.raises(OptionError, match="reads a title at its token 5, with which the tokenizer ends none"):
        text(tmp_path / "clip")
