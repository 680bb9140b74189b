"""Directories that hold no plain encoder: each is loaded right, or refused in one line."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel

from mim_torchrec.encoders.checkpoint import save_towers
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig
from mim_torchrec.errors import OptionError
from tests.unit.test_encoder_files import (
    ARCH,
    SIZES,
    TITLES,
    TOKENIZER,
    assert_weights,
    bert,
    save_tokenizer,
    sentence_transformer,
    text,
    to_pointer,
    vision,
    vit,
)


def entry(folder: Path, name: str = "config.json", **entries) -> None:
    """Set entries of a JSON file."""
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | entries))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(OptionError, match=message) as found:
        text(folder)
    assert "\n" not in str(found.value)


def test_an_adapter_is_refused_with_and_without_its_model(tmp_path):
    (tmp_path / "lora").mkdir()
    entry(tmp_path / "lora", "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/base")
    refused(tmp_path / "lora", r"holds an adapter \(PEFT\) of org/base; give the merged model")
    entry(bert(tmp_path / "both"), "adapter_config.json", peft_type="LORA")
    refused(tmp_path / "both", "both holds an adapter")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantized_weights_are_refused_by_their_method(tmp_path, method):
    folder = bert(tmp_path / "bert")
    entry(folder, quantization_config={"quant_method": method})
    refused(folder, f"holds weights quantized by {method}; give those of the model before")


@pytest.mark.parametrize("model_type", ["bert", "mpt-of-somebody"])
def test_a_model_with_code_of_its_own_is_refused_and_nobody_is_asked(tmp_path, monkeypatch, model_type):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question on the terminal"))
    folder = bert(tmp_path / "bert")
    entry(folder, auto_map={"AutoModel": "modeling.Mine"}, model_type=model_type)
    refused(folder, r"needs code of its own \(auto_map in config.json\), which is not run")


@pytest.mark.parametrize(
    "file", ["model-q4.gguf", "model.onnx", "onnx/model.onnx", "tf_model.h5", "flax.msgpack"]
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_of_other_frameworks_are_refused_by_name(tmp_path, file, with_config):
    folder = bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"weights")
    if not with_config:
        (folder / "config.json").unlink()
    refused(folder, f"has no (weights|config).*, but {Path(file).name}, which is not read")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_pointers_of_git_lfs_are_refused(tmp_path, file):
    folder = bert(tmp_path / "bert")
    to_pointer(folder / file)
    refused(folder, f"{file} is a pointer of Git LFS, not the file; run `git lfs pull`")


def test_pointers_of_git_lfs_in_place_of_weights_are_refused(tmp_path):
    folder = bert(tmp_path / "bert")
    to_pointer(folder / "model.safetensors")
    refused(folder, "model.safetensors is a pointer of Git LFS, not the file; run `git lfs pull`")
    to_pointer(tmp_path / "w.safetensors")
    with pytest.raises(
        OptionError, match="w.safetensors is a pointer of Git LFS, not the file; run `git lfs pull`"
    ):
        vision(tmp_path / "w.safetensors")


def test_a_tokenizer_of_a_much_smaller_vocabulary_is_refused(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES | {"vocab_size": 400})).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    refused(
        tmp_path / "bert", r"the tokenizer has \d+ tokens, the model knows 400: they are not of one model"
    )


def test_sharded_weights_are_loaded_whole_and_a_lost_shard_is_named(tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES))
    model.save_pretrained(tmp_path / "bert", max_shard_size="4KB")
    save_tokenizer(tmp_path / "bert")
    shards = sorted((tmp_path / "bert").glob("model-*.safetensors"))
    assert len(shards) > 1
    found = text(tmp_path / "bert").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    shards[0].unlink()
    refused(tmp_path / "bert", f"has no {shards[0].name}, which model.safetensors.index.json names")


def test_weights_of_several_forms_are_read_in_the_first_that_is_there(tmp_path):
    folder = sharded_vit(tmp_path / "vit")
    entry(folder, "pytorch_model.bin.index.json", weight_map={"cls_token": "never-downloaded.bin"})
    assert_weights(vision(folder), vit().state_dict())
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(vit().state_dict(), whole / "model.safetensors")
    entry(whole, "pytorch_model.bin.index.json", weight_map={"cls_token": "never-downloaded.bin"})
    assert_weights(vision(whole), vit().state_dict())


def sharded_vit(folder: Path) -> Path:
    state, folder = vit().state_dict(), folder
    folder.mkdir()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, folder / file)
    entry(folder, "model.safetensors.index.json",
          weight_map={name: file for file, some in parts.items() for name in some})  # fmt: skip
    return folder


def test_sharded_vision_weights_are_loaded_by_their_index(tmp_path):
    folder = sharded_vit(tmp_path / "vit")
    assert_weights(vision(folder), vit().state_dict())
    (folder / "b.safetensors").rename(tmp_path / "b.safetensors")
    with pytest.raises(OptionError, match="has no b.safetensors, which model.safetensors.index.json names"):
        vision(folder)
    entry(folder, "model.safetensors.index.json", weight_map={"cls_token": "../b.safetensors"})
    with pytest.raises(OptionError, match="has no ../b.safetensors"):
        vision(folder)


def test_what_a_trainer_writes_beside_weights_is_not_read(tmp_path):
    folder = bert(tmp_path / "bert")
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({f"module.{name}": value for name, value in expected.items()}, folder / "pytorch_model.bin")
    torch.save({"args": Path("x")}, folder / "training_args.bin")
    found = text(folder).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_directory_around_a_model_names_the_one_inside(tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    bert(outer / "0_Transformer")
    refused(outer, "outer has no config.json and cannot be loaded; a model lies in 0_Transformer: give")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty has no config.json and cannot be loaded; give a directory that")


def test_modules_of_sentence_transformers_that_pool_otherwise_are_refused(tmp_path):
    folder = bert(tmp_path / "splade")
    modules = [{"path": "", "type": "sentence_transformers.sparse.MLMTransformer"},
               {"path": "1", "type": "sentence_transformers.sparse.SpladePooling"}]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, r"by modules that are not read \(MLMTransformer, SpladePooling\)")


def test_a_pooling_that_was_not_downloaded_is_named(tmp_path):
    folder = bert(tmp_path / "bert")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"},
               {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, "1_Pooling/config.json is not there, which modules.json names; download it, or say how")


def test_a_prompt_before_every_title_is_refused(tmp_path):
    folder = sentence_transformer(tmp_path / "st", Pooling(8, pooling_mode="mean"))
    model = SentenceTransformer(
        str(folder), device="cpu", prompts={"query": "query: "}, default_prompt_name="query"
    )
    model.save(str(tmp_path / "asked"))
    refused(tmp_path / "asked", "puts 'query: ' before every title .*set default_prompt_name to null")
    entry(tmp_path / "asked", "config_sentence_transformers.json", default_prompt_name=None)
    assert text(tmp_path / "asked").pooling == "mean"


def test_titles_that_are_lowered_before_the_tokenizer_are_refused_where_it_matters(tmp_path):
    folder = bert(tmp_path / "bert")
    entry(folder, "sentence_bert_config.json", do_lower_case=True)
    assert text(folder).pooling == "mean"  # the tokenizer lowers them itself
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    about["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(about))
    refused(folder, "lowers titles before its tokenizer")


def test_an_encoder_of_this_package_is_no_text_model(tmp_path):
    words = TextEncoder(TextEncoderConfig(name="bert-tiny", weights="random"), tokenizer=TOKENIZER)
    torch.manual_seed(0)
    pictures = vision_random()
    save_towers(pictures, words, tmp_path / "towers")
    refused(tmp_path / "towers", "holds an encoder of this package, not a text model; give it to --towers")


def vision_random():
    from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig

    return VisionEncoder(VisionEncoderConfig(name=ARCH, weights="random"))


def test_directories_of_the_other_tower_are_refused(tmp_path):
    timm.models.save_for_hf(vit(), tmp_path / "vit", safe_serialization=True)
    refused(tmp_path / "vit", r"holds a model of timm \(test_vit\); give --vision.weights")
    with pytest.raises(
        OptionError, match=r"holds a model of transformers \(type bert\), and vision towers are"
    ):
        vision(bert(tmp_path / "bert"))


def test_a_config_that_is_no_json_is_refused(tmp_path):
    folder = bert(tmp_path / "bert")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read: ")


def test_weights_of_half_precision_become_float32(tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).half()
    model.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    encoder = text(tmp_path / "bert")
    assert encoder(encoder.tokenize(TITLES)).dtype == torch.float32
