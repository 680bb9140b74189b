"""The foundation models of Figure 5: built by name, read from files, and what they cost."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from mim_torchrec.benchmarks.measures.flops import tower_cost
from mim_torchrec.encoders import foundation
from mim_torchrec.encoders import text as text_module
from mim_torchrec.encoders.beit3 import Beit3TextConfig, Beit3TextModel
from mim_torchrec.encoders.checkpoint import load_towers, save_towers
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, learns_tokenizer, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig
from mim_torchrec.pretraining.text import LanguageHead, objective_of

TITLES = ["a red lamp", "blue vase", "a long rug of wool and silk", ""]
TOKENIZER = train_tokenizer(TITLES, 64)
SMALL = {
    "bert": BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2),
    "beit3_base": Beit3TextConfig(64, 8, 2, 2, 16),
}
SMALL |= {"bge_base": SMALL["bert"], "bge_large": SMALL["bert"], "beit3_large": SMALL["beit3_base"]}


@pytest.fixture
def small(monkeypatch) -> None:
    """All text models with small sizes."""
    for name, model in foundation.TEXT.items():
        shrunk = foundation.TextModel(model.title, model.hub, lambda n=name: SMALL[n], model.pooling)
        monkeypatch.setitem(text_module.TEXT, name, shrunk)


def random(name: str, **options) -> TextEncoder:
    torch.manual_seed(0)
    config = TextEncoderConfig(name=name, weights="random", **options)
    assert learns_tokenizer(config)
    return TextEncoder(config, tokenizer=TOKENIZER).eval()


@pytest.mark.parametrize("name", foundation.VISION.values())
def test_every_vision_model_of_the_paper_is_built_at_full_size_with_its_own_preprocessing(name):
    own = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        encoder = VisionEncoder(VisionEncoderConfig(name=name, weights="random"))
        images = torch.zeros(2, 3, own.input_size[1], own.input_size[2], dtype=torch.uint8)
        assert encoder(images).shape == (2, encoder.feature_dim)
    found = encoder.preprocessing()
    assert found["mean"] == pytest.approx(own.mean) and found["std"] == pytest.approx(own.std)
    assert (found["image_size"], found["interpolation"]) == (own.input_size[1], own.interpolation)


def test_preprocessing_is_each_models_own():
    made = {
        name: VisionEncoder(VisionEncoderConfig(name=name, weights="random"))
        for name in ("test_vit", "test_convnext", "eva02_tiny_patch14_224", "vit_tiny_patch16_224")
    }
    for name, encoder in made.items():
        own = timm.get_pretrained_cfg(name)
        assert encoder.mean.flatten().tolist() == pytest.approx(own.mean)
        assert encoder.std.flatten().tolist() == pytest.approx(own.std)
        assert (encoder.image_size, encoder.interpolation) == (own.input_size[1], own.interpolation)
    assert len({encoder.mean.flatten()[0].item() for encoder in made.values()}) > 1


@pytest.mark.parametrize("name", foundation.SHORT)
def test_a_short_name_is_that_model_of_the_paper_and_hides_none_of_timms(name):
    assert not timm.is_model(name)
    with torch.device("meta"):
        encoder = VisionEncoder(VisionEncoderConfig(name=name, weights="random"))
    assert encoder.model.pretrained_cfg["architecture"] == foundation.SHORT[name]


@pytest.mark.parametrize(("name", "size", "layers"), [
    ("bert", 768, 12), ("gpt2", 768, 12), ("bge_base", 768, 12), ("bge_large", 1024, 24),
    ("beit3_base", 768, 12), ("beit3_large", 1024, 24),
])  # fmt: skip
def test_every_text_model_of_the_paper_has_its_sizes(name, size, layers):
    config = foundation.TEXT[name].config()
    assert (config.hidden_size, config.num_hidden_layers) == (size, layers)


@pytest.mark.parametrize(("name", "millions"), [
    ("bert", 109.5), ("gpt2", 124.4), ("bge_base", 109.5), ("bge_large", 335.1),
    ("beit3_base", 135.1), ("beit3_large", 369.2),
])  # fmt: skip
def test_every_text_model_of_the_paper_runs_forward_at_full_size(name, millions):
    with FakeTensorMode():
        encoder = TextEncoder(TextEncoderConfig(name=name, weights="random"), tokenizer=TOKENIZER)
        ids = torch.zeros(2, 10, dtype=torch.int64)
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cost = tower_cost(encoder, lambda: encoder(tokens))
        assert encoder(tokens).shape == (2, encoder.feature_dim)
    size, layers = encoder.feature_dim, encoder.model.config.num_hidden_layers
    products = layers * 2 * 10 * (12 * size**2 + 2 * 10 * size)  # projections, MLP, attention
    assert cost.gflops * 1e9 == pytest.approx(2 * products, rel=2e-3)  # and BERT's pooler
    assert cost.parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", foundation.TEXT)
def test_text_models_are_built_without_a_hub(small, name):
    encoder = random(name)
    vectors = encoder(encoder.tokenize(TITLES))
    assert vectors.shape == (4, 8)
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize("name", foundation.TEXT)
def test_padding_changes_no_vector(small, name):
    encoder = random(name)
    together = encoder(encoder.tokenize(TITLES))
    alone = torch.cat([encoder(encoder.tokenize([title])) for title in TITLES])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", foundation.TEXT)
def test_towers_come_back_from_disk_with_their_pooling(small, name, tmp_path):
    encoder = random(name)
    vision = VisionEncoder(VisionEncoderConfig(name="test_vit", weights="random", image_size=32))
    save_towers(vision, encoder, tmp_path / "towers")
    loaded = load_towers(tmp_path / "towers").text
    assert loaded.pooling == encoder.pooling == foundation.TEXT[name].pooling
    assert torch.equal(loaded(loaded.tokenize(TITLES)), encoder(encoder.tokenize(TITLES)))


def test_poolings_take_the_first_the_last_and_the_mean_of_the_tokens(small):
    encoders = {pooling: random("bert", pooling=pooling) for pooling in ("cls", "last", "mean")}
    tokens = encoders["mean"].tokenize(TITLES[:3])
    hidden = encoders["mean"].model(**tokens).last_hidden_state
    for row, mask in enumerate(tokens["attention_mask"]):
        kept = hidden[row][mask.bool()]
        expected = {"cls": kept[0], "last": kept[-1], "mean": kept.mean(0)}
        for pooling, encoder in encoders.items():
            assert torch.allclose(encoder(tokens)[row], expected[pooling], atol=1e-6), pooling


def saved_directory(folder: Path, config: GPT2Config | BertConfig, model: type) -> str:
    torch.manual_seed(3)
    model(config).save_pretrained(folder)
    tokenizer = text_module.Tokenizer.from_str(TOKENIZER)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]")
    fast.save_pretrained(folder)
    return str(folder)


def test_weights_come_from_a_local_directory(small, tmp_path):
    folder = saved_directory(tmp_path / "bge", SMALL["bert"], BertModel)
    encoder = TextEncoder(TextEncoderConfig(name="bge_base", weights=folder)).eval()
    assert encoder.pooling == "cls"
    expected = BertModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.model.state_dict().items())


def test_weights_of_another_size_than_the_name_says_are_refused(small, tmp_path):
    other = BertConfig(vocab_size=64, hidden_size=12, num_attention_heads=2, intermediate_size=16)
    folder = saved_directory(tmp_path / "other", other, BertModel)
    with pytest.raises(ValueError, match="its hidden_size is 12, that of the named model 8"):
        TextEncoder(TextEncoderConfig(name="bge_base", weights=folder))


def test_a_directory_of_bge_takes_the_first_token(tmp_path):
    folder = saved_directory(tmp_path / "bge-small-zh", SMALL["bert"], BertModel)
    assert TextEncoder(TextEncoderConfig(name=folder)).pooling == "cls"


def test_towers_of_before_there_was_a_pooling_come_back_with_the_mean(tmp_path):
    folder = saved_directory(tmp_path / "gpt2", SMALL["gpt2"], GPT2Model)
    text = TextEncoder(TextEncoderConfig(name=folder, pooling="mean")).eval()
    vision = VisionEncoder(VisionEncoderConfig(name="test_vit", weights="random", image_size=32))
    save_towers(vision, text, tmp_path / "towers")
    file = tmp_path / "towers" / "config.json"
    config = json.loads(file.read_text())
    del config["text"]["pooling"]
    file.write_text(json.dumps(config))
    assert load_towers(tmp_path / "towers").text.pooling == "mean"


def test_gpt2_without_a_padding_token_takes_titles_without_a_token(tmp_path):
    folder = saved_directory(tmp_path / "gpt2", SMALL["gpt2"], GPT2Model)
    (tmp_path / "gpt2" / "tokenizer.json").write_text(without_special_tokens())
    encoder = TextEncoder(TextEncoderConfig(name=folder)).eval()
    assert encoder.pooling == "last"
    for titles in (["", ""], ["lamp", ""]):
        tokens = encoder.tokenize(titles)
        assert (tokens["attention_mask"].sum(1) >= 1).all()
        assert torch.isfinite(encoder(tokens)).all()


def without_special_tokens() -> str:
    tokenizer = text_module.Tokenizer.from_str(TOKENIZER)
    tokenizer.post_processor = text_module.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer.to_str()


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "bert", "weights": "/nowhere"}, "/nowhere is no directory"),
    ({"name": "beit3_base"}, "its weights are on no hub"),
    ({"name": "beit3_base", "weights": "beit3.pth"}, "give --text.tokenizer"),
])  # fmt: skip
def test_weights_that_cannot_be_had_are_refused_with_a_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(TextEncoderConfig(**options))


def test_vision_weights_come_from_a_file_and_a_directory(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for weights in (tmp_path / "model.safetensors", tmp_path):
        encoder = VisionEncoder(VisionEncoderConfig(name="test_vit", weights=str(weights)))
        state = encoder.model.state_dict()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_a_directory_with_weights_in_both_forms_of_a_hub_is_read(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    encoder = VisionEncoder(VisionEncoderConfig(name="test_vit", weights=str(tmp_path)))
    assert torch.equal(encoder.model.cls_token, state["cls_token"])


@pytest.mark.parametrize("change", ["lacks", "shape"])
def test_vision_weights_of_another_model_are_refused(tmp_path, change):
    state = timm.create_model("test_vit").state_dict()
    state["cls_token"] = torch.zeros(1, 1, 3)
    if change == "lacks":
        del state["cls_token"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="(?s)model.safetensors.*cls_token"):
        VisionEncoder(VisionEncoderConfig(name="test_vit", weights=str(tmp_path)))


def original_checkpoint() -> dict[str, torch.Tensor]:
    """A small BEiT-3 in the layout of the original files, both branches."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

    saved = {"beit3.text_embed.weight": draw(11, 8), "beit3.vision_embed.cls_token": draw(1, 1, 8)}
    norms = ["self_attn_layer_norm.{}", "final_layer_norm.{}", "self_attn.inner_attn_ln.{}"]
    for branch in "AB":
        saved[f"beit3.encoder.embed_positions.{branch}.weight"] = draw(9, 8)
        for layer in range(2):
            at = f"beit3.encoder.layers.{layer}."
            shapes = {f"self_attn.{p}_proj.{branch}": (8, 8) for p in ("q", "k", "v", "out")}
            shapes |= {f"ffn.{branch}.fc1": (16, 8), f"ffn.{branch}.fc2": (8, 16)}
            saved |= {f"{at}{name}.weight": draw(*shape) for name, shape in shapes.items()}
            saved |= {f"{at}{name}.bias": draw(shape[0]) for name, shape in shapes.items()}
            sizes = {name.format(branch): 8 for name in norms} | {f"ffn.{branch}.ffn_layernorm": 16}
            for kind in ("weight", "bias"):
                saved |= {f"{at}{name}.{kind}": draw(size) for name, size in sizes.items()}
        saved |= {f"beit3.encoder.layer_norm.{branch}.{kind}": draw(8) for kind in ("weight", "bias")}
    return saved


def naive_beit3(saved: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """One title through branch B, as the papers write it: pre-norm, sub-LN before each last projection."""

    def linear(x, name):
        return x @ saved[f"{name}.weight"].T + saved[f"{name}.bias"]

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * saved[f"{name}.weight"] + saved[f"{name}.bias"]

    positions = saved["beit3.encoder.embed_positions.B.weight"]
    x = torch.stack([saved["beit3.text_embed.weight"][i] + positions[k + 2] for k, i in enumerate(ids)])
    for layer in range(2):
        at = f"beit3.encoder.layers.{layer}"
        y = norm(x, f"{at}.self_attn_layer_norm.B")
        q, k, v = (linear(y, f"{at}.self_attn.{p}_proj.B") for p in "qkv")
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (q[:, head] @ k[:, head].T / 2.0).softmax(1)
            heads.append(weights @ v[:, head])
        y = norm(torch.cat(heads, dim=1), f"{at}.self_attn.inner_attn_ln.B")
        x = x + linear(y, f"{at}.self_attn.out_proj.B")
        y = F.gelu(linear(norm(x, f"{at}.final_layer_norm.B"), f"{at}.ffn.B.fc1"))
        x = x + linear(norm(y, f"{at}.ffn.B.ffn_layernorm"), f"{at}.ffn.B.fc2")
    return norm(x, "beit3.encoder.layer_norm.B")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_beit3s_language_half_is_read_from_an_original_checkpoint(tmp_path, suffix):
    saved, file = original_checkpoint(), tmp_path / f"beit3{suffix}"
    save_file(saved, file) if suffix == ".safetensors" else torch.save({"model": saved}, file)
    sizes = Beit3TextConfig(11, 8, 2, 2, 16, max_position_embeddings=9)
    model = Beit3TextModel(sizes).double().eval()
    model.load_original(file)
    titles = [[3, 1, 4, 1, 5], [9, 2]]
    ids = torch.tensor([titles[0], titles[1] + [7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    hidden = model(ids, mask).last_hidden_state
    for row, title in enumerate(titles):
        assert torch.allclose(hidden[row, : len(title)], naive_beit3(saved, title), atol=1e-10)


def test_beit3_refuses_what_is_not_its_checkpoint_and_titles_that_are_too_long(tmp_path):
    model = Beit3TextModel(Beit3TextConfig(11, 8, 1, 2, 16, max_position_embeddings=4))
    with pytest.raises(ValueError, match="no such file"):
        model.load_original(tmp_path / "none.pth")
    save_file({"beit3.text_embed.weight": torch.zeros(11, 8)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="(?s)not those of this BEiT-3 text tower.*position_embed"):
        model.load_original(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="titles of 3 tokens: the tower has positions for 2"):
        model(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3))


def test_beit3_is_adapted_by_masked_language_modelling(small):
    text = random("beit3_base")
    assert objective_of(text, "auto") == "mlm"
    head, hidden = LanguageHead(text.model, "mlm"), torch.randn(5, 8)
    expected = hidden @ text.model.token_embed.weight.T + head.model.lm_head.bias
    torch.testing.assert_close(head(hidden), expected)


def test_beit3_comes_back_from_a_directory_of_transformers(small, tmp_path):
    text = random("beit3_base")
    text.model.save_pretrained(tmp_path)
    text.tokenizer.save_pretrained(tmp_path)
    other = TextEncoder(TextEncoderConfig(name=str(tmp_path))).eval()
    tokens = text.tokenize(TITLES)
    assert torch.equal(other(tokens), text(tokens))


def gradients(module: nn.Module, call) -> dict[str, torch.Tensor]:
    module.train().zero_grad()
    torch.manual_seed(0)
    call().square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bert", "gpt2", "beit3_base"])
def test_activation_checkpointing_changes_no_gradient_of_a_text_tower(small, name):
    plain, checkpointed = random(name), random(name, activation_checkpointing=True)
    tokens = plain.tokenize(TITLES)
    expected, found = (gradients(e, lambda e=e: e(tokens)) for e in (plain, checkpointed))
    assert checkpointed.model.is_activation_checkpointing
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_activation_checkpointing_changes_no_gradient_of_a_vision_tower(name):
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        config = VisionEncoderConfig(name=name, weights="random", image_size=32, activation_checkpointing=on)
        encoder = VisionEncoder(config)
        found.append(gradients(encoder, lambda e=encoder: e(images)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-5) for n in found[0])


def test_activation_checkpointing_that_a_model_has_not_is_refused():
    config = VisionEncoderConfig(name="selecsls42", weights="random", activation_checkpointing=True)
    with pytest.raises(ValueError, match="selecsls42 has no activation checkpointing"):
        VisionEncoder(config)


def test_towers_compute_in_bfloat16(small):
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    vision = VisionEncoder(VisionEncoderConfig(name="test_vit", weights="random", image_size=32)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(vision(images).float()).all()
        for name in foundation.TEXT:
            encoder = random(name)
            assert torch.isfinite(encoder(encoder.tokenize(TITLES)).float()).all()


def test_operations_of_attention_are_counted():
    length, size, heads = 7, 8, 2
    model = Beit3TextModel(Beit3TextConfig(11, size, 1, heads, 16, max_position_embeddings=9))
    ids = torch.zeros(3, length, dtype=torch.int64)
    cost = tower_cost(model, lambda: model(ids, torch.ones_like(ids)))
    projections = 4 * 2 * length * size * size
    mlp = 2 * 2 * length * size * 16
    attention = 2 * 2 * length * length * size
    assert cost.gflops * 1e9 == pytest.approx(3 * (projections + mlp + attention))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
