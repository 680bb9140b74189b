"""Directories of open_clip, as its `save_for_hf` writes them and hubs hold them: their two towers.

Image towers are models of timm, or open_clip's own vision transformer, which timm's `vit_*_clip_*` are. The
text tower is the causal transformer of CLIP, which transformers has. Towers end before the projections.
Not here: ResNets, CoCa, text towers of transformers inside open_clip, and SigLIP's text tower, which are
refused by the entry that says so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from mim_torchrec.encoders.weights import load_strictly, read_json, read_weights
from mim_torchrec.errors import OptionError

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of open_clip, where a directory says nothing."""
VIT_READ = {
    "image_size",
    "patch_size",
    "width",
    "layers",
    "head_width",
    "mlp_ratio",
    "patch_dropout",
    "output_tokens",
}
TIMM_READ = {"timm_model_name", "image_size", "timm_pool", "timm_proj"}
TIMM_TRAINING = {"timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_proj_bias", "patch_dropout"}
TEXT_READ = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id"}
TEXT_HARMLESS = {"pad_id", "output_tokens", "proj_type", "proj_bias", "hf_tokenizer_name"}
PLAIN = {"pos_embed_type": "learnable", "tokenizer_mode": "clean"}
"""Entries that name what towers have. Of all others, only what is off (null, false, empty) is."""
BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
"""Names in a block of open_clip, and those of transformers."""
TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def is_open_clip(folder: Path) -> bool:
    """Whether a directory is one of open_clip."""
    return (folder / CONFIG).is_file()


def weights_of(folder: Path) -> list[Path]:
    """The file of weights of a directory of open_clip.

    Raises:
        OptionError: there is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    raise OptionError(f"{folder} has no weights of open_clip ({' or '.join(WEIGHTS)})")


def vision_of(folder: Path, name: str) -> dict[str, Any]:
    """What the image tower of a directory is built from.

    Args:
        folder: the directory.
        name: of the tower in timm, without a tag.

    Returns:
        `model_args` for timm, `image_size`, `mean`, `std` and `interpolation`.

    Raises:
        OptionError: the name is of another tower, or towers do not have what the directory says.
    """
    about = _read(folder)
    cfg, pre = _part(about, "vision_cfg", folder), about.get("preprocess_cfg") or {}
    size = cfg.get("image_size", 224)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise OptionError(f"{folder} reads images of {size} pixels, towers those of a square")
        size = size[0]
    scaling = {
        "image_size": size,
        "mean": list(pre.get("mean") or MEAN),
        "std": list(pre.get("std") or STD),
        "interpolation": pre.get("interpolation") or "bicubic",
    }
    if named := cfg.get("timm_model_name"):
        _refuse(cfg, TIMM_READ | TIMM_TRAINING | VIT_READ, folder, "vision_cfg")  # timm overrides
        if named.split(".")[0] != name:
            raise OptionError(f"{folder} holds a {named}, not a {name}; give --vision.name {named}")
        pool = cfg.get("timm_pool", "avg")
        if pool in ("abs_attn", "rot_attn"):
            raise OptionError(f"{folder} pools by {pool} (vision_cfg.timm_pool), which towers do not")
        return scaling | {"model_args": {"global_pool": pool} if pool else {}}
    if isinstance(cfg.get("layers", 12), list):
        raise OptionError(f"{folder} holds a ResNet of open_clip, which is not read; take a ViT or timm's")
    if cfg.get("pool_type", "tok") not in ("tok", "avg"):
        raise OptionError(f"{folder} pools by {cfg['pool_type']} (vision_cfg.pool_type), which towers do not")
    _refuse({key: value for key, value in cfg.items() if key != "pool_type"}, VIT_READ, folder, "vision_cfg")
    if not (name.startswith("vit_") and "_clip_" in name):
        raise OptionError(
            f"{folder} holds a vision transformer of open_clip, not a {name}; give --vision.name "
            "vit_base_patch16_clip_224, the sizes are read from the directory"
        )
    width = cfg.get("width", 768)
    args = {
        "img_size": size,
        "patch_size": cfg.get("patch_size", 16),
        "embed_dim": width,
        "depth": cfg.get("layers", 12),
        "num_heads": width // cfg.get("head_width", 64),
        "mlp_ratio": cfg.get("mlp_ratio", 4.0),
        "act_layer": _activation(about),
    }
    if cfg.get("pool_type", "tok") == "avg":
        args |= {"global_pool": "avg", "fc_norm": False}  # the norm comes before the mean
    return scaling | {"model_args": args}


def vision_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the image tower by the names that timm converts: without those of the text tower."""
    trunk = "visual.trunk."
    if any(name.startswith(trunk) for name in state):
        return {name.removeprefix(trunk): value for name, value in state.items() if name.startswith(trunk)}
    return {name: value for name, value in state.items() if name.startswith("visual.")}


def text_config_of(folder: Path) -> CLIPTextConfig:
    """The configuration of the text tower of a directory.

    Raises:
        OptionError: transformers' CLIP does not have what the directory says.
    """
    about = _read(folder)
    cfg = _part(about, "text_cfg", folder)
    if named := cfg.get("hf_model_name"):
        raise OptionError(
            f"{folder} has a text tower of transformers ({named}) in open_clip's names, which is not read; "
            f"save its `model.text.transformer` by save_pretrained, or give --text.name {named}"
        )
    if cfg.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise OptionError(f"{folder} pools by {cfg['pool_type']} (text_cfg.pool_type), which towers do not")
    _refuse(cfg, TEXT_READ | TEXT_HARMLESS, folder, "text_cfg")
    width = cfg.get("width", 512)
    return CLIPTextConfig(
        vocab_size=cfg.get("vocab_size", 49408),
        hidden_size=width,
        intermediate_size=int(width * cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=cfg.get("layers", 12),
        num_attention_heads=cfg.get("heads", 8),
        max_position_embeddings=cfg.get("context_length", 77),
        hidden_act=_activation(about),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=2,  # its pooled output, which is not used, is then that of the highest token
    )


def text_model_of(folder: Path) -> CLIPTextModel:
    """The text tower of a directory, in float32.

    Raises:
        OptionError: as `text_config_of`; or tensors are missing, left over, or of another shape.
    """
    model: Any = CLIPTextModel(text_config_of(folder))
    files = weights_of(folder)
    state = read_weights(files)
    prefix = "text." if "text.token_embedding.weight" in state else ""
    own: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(prefix) and not name.startswith(("visual.", "logit_")):
            own |= _converted(name.removeprefix(prefix), value)
    nested = all(name.startswith("text_model.") for name in model.state_dict())
    own = {f"text_model.{name}" if nested else name: value for name, value in own.items()}
    load_strictly(model, own, str(files[0]), lambda name: "text_projection" in name or "attn_mask" in name)
    return model


def check_end(tokenizer: Any, folder: Path) -> None:
    """See that the last token of a title is the one whose place open_clip's text tower reads.

    Raises:
        OptionError: it is not: the tokenizer is of another model.
    """
    cfg = _part(_read(folder), "text_cfg", folder)
    ids = tokenizer("a red wool hat")["input_ids"]
    wanted = cfg.get("eos_id", 2) if cfg.get("pool_type") == "eos" else max(tokenizer.get_vocab().values())
    if not ids or ids[-1] != wanted:
        raise OptionError(
            f"{folder} reads a title at its token {wanted}, with which the tokenizer ends none: it is of "
            "another model; give --text.tokenizer"
        )


def _converted(name: str, value: Tensor) -> dict[str, Tensor]:
    if name in TOP:
        return {TOP[name]: value}
    if not name.startswith("transformer.resblocks."):
        return {name: value}
    number, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
    block = f"encoder.layers.{number}."
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {
            f"{block}self_attn.{letter}_proj.{kind}": part
            for letter, part in zip("qkv", torch.chunk(value, 3), strict=True)
        }
    for theirs, ours in BLOCK.items():
        if rest.startswith(theirs):
            return {block + ours + rest.removeprefix(theirs): value}
    return {name: value}


def _activation(about: dict[str, Any]) -> str:
    return "quick_gelu" if about["model_cfg"].get("quick_gelu") else "gelu"


def _read(folder: Path) -> dict[str, Any]:
    about = read_json(folder / CONFIG)
    if not isinstance(about.get("model_cfg"), dict):
        raise OptionError(f"{folder / CONFIG} has no model_cfg: it is none of open_clip's")
    return about


def _part(about: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    part = about["model_cfg"].get(name)
    if not isinstance(part, dict):
        raise OptionError(f"{folder / CONFIG} has no {name}: it is no dual encoder of images and titles")
    return part


def _refuse(cfg: Mapping[str, Any], read: set[str], folder: Path, part: str) -> None:
    defaults = {"attn_pooler_queries", "attn_pooler_heads"}  # of a pooler that another entry turns on
    for key, value in cfg.items():
        if key not in read | defaults and value and value != PLAIN.get(key):
            raise OptionError(
                f"{folder} has a tower of open_clip that is not read: {part}.{key} is {value!r}; take a "
                "model without it, or its form for timm or transformers"
            )
