"""What a directory of a text model is, told from its files before any library reads them.

Adapters, quantized weights, weights of other frameworks and models with code of their own are refused by
name, each with what to do. A library would fail with a traceback, ask on the terminal, or load another model.
"""

from pathlib import Path
from typing import Any

from mim_torchrec.encoders.open_clip_files import CONFIG, check_end, is_open_clip
from mim_torchrec.encoders.weights import read_json, refuse_pointer, shards_of, weight_files
from mim_torchrec.errors import OptionError

UNREAD = ("*.gguf", "*.onnx", "onnx/*.onnx", "*.h5", "*.msgpack", "*.ckpt.index", "*.tflite", "openvino*.xml",
          "*.mlmodel")  # fmt: skip
"""Weights of other frameworks."""


def holds_open_clip(folder: Path) -> bool:
    """Whether a directory is one of open_clip, and not of transformers as well."""
    return is_open_clip(folder) and "model_type" not in read_json(folder / "config.json")


def check_text_directory(folder: Path, *, weights: bool = True) -> None:
    """See that a directory holds a text model that can be read.

    Args:
        folder: a directory that exists.
        weights: whether its weights are read, and not its configuration alone.

    Raises:
        OptionError: it does not; the message says what it holds and what to do.
    """
    adapter = read_json(folder / "adapter_config.json")
    if adapter or (folder / "adapter_config.json").is_file():
        base = adapter.get("base_model_name_or_path")
        raise OptionError(
            f"{folder} holds an adapter (PEFT) of {base}; give the merged model, which peft's "
            "`merge_and_unload().save_pretrained` writes"
        )
    config = read_json(folder / "config.json")
    for version, flag in (("towers_version", "--towers"), ("encoder_version", "--init")):
        if version in config:
            raise OptionError(
                f"{folder} holds an encoder of this package, not a text model; give it to {flag}"
            )
    if holds_open_clip(folder):
        return
    if not config:
        raise OptionError(f"{folder} has no config.json and cannot be loaded{_instead(folder)}")
    if "architecture" in config and "model_type" not in config:
        raise OptionError(f"{folder} holds a model of timm ({config['architecture']}); give --vision.weights")
    if config.get("auto_map"):
        raise OptionError(
            f"{folder} needs code of its own (auto_map in config.json), which is not run; take a model that "
            "transformers has, or remove auto_map where its type is one of them"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise OptionError(
            f"{folder} holds weights quantized by {method}; give those of the model before it was quantized"
        )
    if not weights:
        return
    files = shards_of(folder) or weight_files(folder)
    if not files:
        raise OptionError(f"{folder} has no weights (.safetensors or .bin){_instead(folder)}")
    try:
        for file in files:
            refuse_pointer(file)
    except OptionError as error:
        raise ValueError(error) from None  # the caller says which tower


def check_tokenizer(tokenizer: Any, vocab_size: int, source: str) -> None:
    """See that a tokenizer makes of titles what the model was made for.

    Args:
        tokenizer: as loaded.
        vocab_size: tokens that the model knows.
        source: of the model, a directory or a name on the hub.

    Raises:
        OptionError: it is of another model, or the directory changes titles in a way that towers do not.
    """
    if 2 * len(tokenizer) < vocab_size:
        raise OptionError(
            f"the tokenizer has {len(tokenizer)} tokens, the model knows {vocab_size}: they are not of one "
            "model; give --text.tokenizer"
        )
    folder = Path(source)
    if not folder.is_dir():
        return
    if holds_open_clip(folder):
        check_end(tokenizer, folder)
    about = read_json(folder / "config_sentence_transformers.json")
    name = about.get("default_prompt_name")
    if name and about.get("prompts", {}).get(name):
        raise OptionError(
            f"{folder} puts {about['prompts'][name]!r} before every title (config_sentence_transformers.json"
            "), which towers do not; set default_prompt_name to null to do without"
        )
    lower = read_json(folder / "sentence_bert_config.json").get("do_lower_case")
    if lower and tokenizer("A Red HAT")["input_ids"] != tokenizer("a red hat")["input_ids"]:
        raise OptionError(
            f"{folder} lowers titles before its tokenizer (sentence_bert_config.json), which towers do not; "
            "give a --text.tokenizer that lowers them"
        )


def _instead(folder: Path) -> str:
    """What the directory holds in place of what is missing, as the end of a sentence."""
    inner = sorted(file.parent for file in folder.glob("*/config.json") if "model_type" in read_json(file))
    if inner:
        return f"; a model lies in {inner[0].name}: give {inner[0]}"
    found = sorted({file.name for pattern in UNREAD for file in folder.glob(pattern)})
    if found:
        return f", but {', '.join(found[:3])}, which is not read; give the model as transformers saves it"
    if is_open_clip(folder):
        return f", but {CONFIG}; remove config.json to read it"
    return "; give a directory that transformers' save_pretrained wrote"
