"""Encoders that other libraries have written: loaded whole, or refused by what is wrong with them."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from timm.utils import CheckpointSaver, ModelEmaV3
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5Model,
)

from mim_torchrec.encoders import text as text_module
from mim_torchrec.encoders.checkpoint import load_towers, save_towers
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.errors import OptionError

TITLES = ["a red wool hat", "blue ceramic vases 42", "a long rug of wool and silk"]
TOKENIZER = train_tokenizer(TITLES, 64)
SIZES = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 40}  # fmt: skip
ARCH = "test_vit"


def save_tokenizer(folder: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=text_module.Tokenizer.from_str(TOKENIZER), pad_token="[PAD]", eos_token="[SEP]"
    )
    fast.save_pretrained(folder)


def bert(folder: Path, model: type = BertModel) -> Path:
    torch.manual_seed(0)
    model(BertConfig(**SIZES)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def change(folder: Path, rename) -> None:
    """Rename the tensors of a directory; None leaves one out."""
    file = folder / "model.safetensors"
    state = {new: value for name, value in load_file(file).items() if (new := rename(name)) is not None}
    save_file(state, file, metadata={"format": "pt"})


def text(folder: Path, **options) -> TextEncoder:
    return TextEncoder(TextEncoderConfig(name=str(folder), **options)).eval()


def test_a_text_directory_is_loaded_whole(tmp_path):
    folder = bert(tmp_path / "bert")
    expected = BertModel.from_pretrained(folder).state_dict()
    found = text(folder).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    cut(file.with_name("pytorch_model.bin"))


def to_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


@pytest.mark.parametrize("damage", [cut, to_pickle, to_pointer])
def test_a_damaged_text_directory_is_refused(damage, tmp_path):
    folder = bert(tmp_path / "bert")
    damage(folder / "model.safetensors")
    with pytest.raises(OptionError, match="text tower .*bert' cannot be loaded"):
        text(folder)


def test_missing_tensors_of_a_text_directory_are_named(tmp_path):
    folder = bert(tmp_path / "bert")
    change(folder, lambda name: None if "encoder.layer.1" in name else name)
    with pytest.raises(OptionError, match=r"bert lack 16 tensors of the tower \(encoder.layer.1.attention"):
        text(folder)


def test_a_text_model_with_more_layers_than_its_config_is_refused(tmp_path):
    folder = bert(tmp_path / "bert")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(OptionError, match=r"have 16 tensors that the tower has not \(encoder.layer.1"):
        text(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.bert."])
def test_wrappers_of_text_weights_are_taken_off(tmp_path, prefix):
    folder = bert(tmp_path / "bert")
    expected = load_file(folder / "model.safetensors")
    change(folder, lambda name: prefix + name)
    found = text(folder).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_head_and_a_missing_pooler_of_a_text_model_are_no_harm(tmp_path):
    folder = bert(tmp_path / "bert", BertForMaskedLM)
    saved = load_file(folder / "model.safetensors")
    found = text(folder).model.state_dict()
    assert torch.equal(found["encoder.layer.1.output.dense.weight"],
                       saved["bert.encoder.layer.1.output.dense.weight"])  # fmt: skip


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    with pytest.raises(OptionError, match="bert has no tokenizer .* give --text.tokenizer"):
        text(tmp_path / "bert")


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES | {"vocab_size": 20})).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    with pytest.raises(OptionError, match=r"the tokenizer has \d+ tokens, the model knows 20"):
        text(tmp_path / "bert")


def test_titles_that_are_longer_than_the_positions_are_refused(tmp_path):
    folder = bert(tmp_path / "bert")
    assert text(folder, max_length=40)(text(folder).tokenize(TITLES)).shape == (3, 8)
    with pytest.raises(OptionError, match="--text.max-length is 41, the model has positions for 40 tokens"):
        text(folder, max_length=41)
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)).save_pretrained(tmp_path / "roberta")
    save_tokenizer(tmp_path / "roberta")
    with pytest.raises(OptionError, match="the model has positions for 38 tokens"):
        text(tmp_path / "roberta", max_length=39)
    long = text(tmp_path / "roberta", max_length=38)
    assert torch.isfinite(long(long.tokenize(["wool " * 60]))).all()


@pytest.mark.parametrize("name", ["/nowhere/bert", "./bert", "~/no-such-encoder", "runs/some/encoder"])
@pytest.mark.parametrize("flag", ["name", "tokenizer"])
def test_a_missing_directory_is_refused_without_asking_a_hub(tmp_path, monkeypatch, name, flag):
    def asked(*args, **named) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(text_module.AutoTokenizer, "from_pretrained", asked)
    options = {"name": str(bert(tmp_path / "bert")), flag: name}
    with pytest.raises(OptionError, match=f"--text.{flag} {name}: there is no such directory"):
        TextEncoder(TextEncoderConfig(**options))


def test_a_directory_that_is_not_beside_others_is_refused(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="runs/encoder: there is no such directory"):
        TextEncoder(TextEncoderConfig(name="runs/encoder"))


def test_weights_that_give_all_titles_one_vector_are_refused(tmp_path):
    folder = bert(tmp_path / "bert")
    file = folder / "model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file,
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(OptionError, match="gives two different titles the same vector"):
        text(folder)


def sentence_transformer(folder: Path, *modules) -> Path:
    inner = Transformer(str(bert(folder.parent / "inner")))
    SentenceTransformer(modules=[inner, *modules], device="cpu").save(str(folder))
    return folder


@pytest.mark.parametrize(("mode", "pooling"), [("cls", "cls"), ("mean", "mean"), ("lasttoken", "last")])
def test_pooling_is_that_of_sentence_transformers(tmp_path, mode, pooling):
    folder = sentence_transformer(tmp_path / "st", Pooling(8, pooling_mode=mode), Normalize())
    encoder = text(folder)
    assert encoder.pooling == pooling
    expected = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TITLES))
    found = torch.nn.functional.normalize(encoder(encoder.tokenize(TITLES)), dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_poolings_in_the_form_of_earlier_releases_are_read(tmp_path):
    folder = sentence_transformer(tmp_path / "st", Pooling(8, pooling_mode="mean"))
    file = next(folder.glob("1_Pooling/config.json"))
    file.write_text(json.dumps({"word_embedding_dimension": 8, "pooling_mode_cls_token": True,
                                "pooling_mode_mean_tokens": False}))  # fmt: skip
    assert text(folder).pooling == "cls"


def test_a_pooling_or_a_layer_that_towers_do_not_have_is_refused(tmp_path):
    folder = sentence_transformer(tmp_path / "max", Pooling(8, pooling_mode="max"))
    with pytest.raises(OptionError, match="pools tokens by max, .*--text.pooling takes"):
        text(folder)
    assert text(folder, pooling="mean").pooling == "mean"
    folder = sentence_transformer(tmp_path / "dense", Pooling(8, pooling_mode="mean"), Dense(8, 4))
    with pytest.raises(OptionError, match=r"has layers after its transformer that are not read \(Dense\)"):
        text(folder)


def test_the_text_half_of_clip_and_the_encoder_of_t5_are_loaded(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 64, "max_position_embeddings": 40, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(text_config=tower | words, vision_config=tower | {"image_size": 8, "patch_size": 4})
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    t5 = T5Model(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    t5.save_pretrained(tmp_path / "t5")
    for name in ("clip", "t5"):
        save_tokenizer(tmp_path / name)
    one, other = text(tmp_path / "clip"), text(tmp_path / "t5")
    assert (one.pooling, other.pooling) == ("last", "mean")
    tokens = one.tokenize(TITLES)
    torch.testing.assert_close(one(tokens), clip.text_model(**tokens).pooler_output)
    hidden = t5.encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    torch.testing.assert_close(other(tokens), (hidden * mask).sum(1) / mask.sum(1))
    siglip = SiglipConfig(text_config=tower | {"vocab_size": 64}, vision_config=tower | {"image_size": 8,
                          "patch_size": 4})  # fmt: skip
    SiglipModel(siglip).save_pretrained(tmp_path / "siglip")
    save_tokenizer(tmp_path / "siglip")
    with pytest.raises(OptionError, match="is a model of type siglip, of which no part is known"):
        text(tmp_path / "siglip")


def vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCH, **options)


def vision(weights: Path, **options) -> VisionEncoder:
    return VisionEncoder(VisionEncoderConfig(name=ARCH, weights=str(weights), **options)).eval()


def assert_weights(encoder: VisionEncoder, expected: dict[str, torch.Tensor]) -> None:
    state = encoder.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def timm_directory(folder: Path, **own) -> Path:
    model = vit()
    model.pretrained_cfg = model.pretrained_cfg | own
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear",
       "input_size": (3, 160, 160)}  # fmt: skip


def test_a_directory_of_timm_says_how_pixels_are_scaled(tmp_path):
    folder = timm_directory(tmp_path / "vit", **OWN)
    encoder = vision(folder)
    found = encoder.preprocessing()
    assert found["mean"] == pytest.approx(OWN["mean"]) and found["std"] == pytest.approx(OWN["std"])
    assert (found["interpolation"], found["image_size"]) == ("bilinear", 160)
    assert_weights(encoder, vit().state_dict())
    words = TextEncoder(TextEncoderConfig(name="bert-tiny", weights="random"), tokenizer=TOKENIZER)
    save_towers(encoder, words, tmp_path / "towers")
    back = load_towers(tmp_path / "towers").vision
    assert back.preprocessing() == found
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    assert torch.equal(back(images), encoder(images))


def test_a_directory_of_another_architecture_is_refused(tmp_path):
    folder = timm_directory(tmp_path / "vit")
    config = VisionEncoderConfig(name="test_convnext", weights=str(folder))
    with pytest.raises(
        OptionError, match="holds a test_vit, not a test_convnext; give --vision.name test_vit"
    ):
        VisionEncoder(config)


@pytest.mark.parametrize("name", ["local-dir:/some/where", "hf-hub:timm/vit"])
def test_names_of_timm_for_places_are_refused_with_a_way_out(name):
    with pytest.raises(OptionError, match="give the architecture as --vision.name"):
        VisionEncoder(VisionEncoderConfig(name=name))


def test_a_checkpoint_of_timms_training_gives_its_averaged_weights(tmp_path):
    model = vit()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.add_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(model, optimizer, args=argparse.Namespace(model=ARCH), model_ema=ema,
                            checkpoint_dir=str(tmp_path))  # fmt: skip
    saver.save_checkpoint(0, metric=1.0)
    assert_weights(vision(tmp_path / "last.pth.tar"), ema.module.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_of_vision_weights_are_taken_off(tmp_path, prefix):
    state = vit().state_dict()
    torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, tmp_path / "w.pth")
    assert_weights(vision(tmp_path / "w.pth"), state)


def test_vision_tensors_that_the_tower_has_not_are_named(tmp_path):
    state = vit().state_dict()
    save_file(state | {"blocks.99.norm1.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        OptionError, match=r"have 1 tensors that the tower has not \(blocks.99.norm1.weight\)"
    ):
        vision(tmp_path / "w.safetensors")


def test_a_file_that_is_none_of_weights_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    torch.save({"state_dict": {"a": Path("x")}}, tmp_path / "code.pth")
    for name in ("w.safetensors", "w.pth", "code.pth"):
        with pytest.raises(OptionError, match=f"{name} cannot be read"):
            vision(tmp_path / name)


def test_vision_weights_that_give_all_images_one_vector_are_refused(tmp_path):
    save_file({name: torch.zeros_like(value) for name, value in vit().state_dict().items()},
              tmp_path / "w.safetensors")  # fmt: skip
    with pytest.raises(OptionError, match="gives two different images one vector"):
        vision(tmp_path / "w.safetensors")
