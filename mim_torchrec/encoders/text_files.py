"""Directories of text models that other people have written: what they say, read or refused by name.

Read: models of transformers (encoders, decoders, the text halves of CLIP and T5), and the pooling that
sentence-transformers keeps in `1_Pooling`. Not here: models that have names of our own (`foundation.py`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextModel,
    MT5EncoderModel,
    PretrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)

from mim_torchrec.encoders.foreign import check_text_directory, holds_open_clip
from mim_torchrec.encoders.open_clip_files import text_config_of, text_model_of
from mim_torchrec.encoders.weights import (
    load_strictly,
    read_json,
    read_weights,
    refuse_others,
    refuse_pointer,
    unwrapped,
    weight_files,
)
from mim_torchrec.errors import OptionError

PARTS: dict[str, Any] = {"clip": CLIPTextModel, "t5": T5EncoderModel, "mt5": MT5EncoderModel}
"""By the type of a larger model, the half of it that reads titles."""
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""Poolings of sentence-transformers that a tower has, and our names of them."""
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""The form that it wrote them in before."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
                   "sentencepiece.bpe.model")  # fmt: skip
AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
}
"""Types of models whose positions begin after the number of the padding token."""


def place_of(name: str, flag: str) -> str:
    """A directory, or a name on the hub; what looks like a directory and is none is no name on the hub.

    Args:
        name: as given.
        flag: that it was given with.

    Raises:
        OptionError: there is no such directory. A hub would be asked for it, and waited for.
    """
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if path.is_dir():
        return str(path)
    if is_path or (len(path.parts) == 2 and path.parent.is_dir()):
        raise OptionError(f"{flag} {name}: there is no such directory")
    return name


def check_tokenizer_files(folder: Path) -> None:
    """See that a directory has a tokenizer: transformers makes an empty one where there is none.

    Raises:
        OptionError: it has none, or one that Git LFS has not fetched.
    """
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise OptionError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); give --text.tokenizer")
    for file in found:
        refuse_pointer(file)


def read_config(source: str) -> PretrainedConfig:
    """The configuration of a model in a directory or on the hub.

    Raises:
        OptionError: it is of a model that has no text tower.
    """
    local = Path(source).is_dir()
    if local:
        check_text_directory(Path(source), weights=False)
        if holds_open_clip(Path(source)):
            return text_config_of(Path(source))
    config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    if config.model_type not in PARTS:
        both = hasattr(config, "text_config") or hasattr(config, "vision_config")
        if both or getattr(config, "is_encoder_decoder", False):
            raise OptionError(
                f"{source} is a model of type {config.model_type}, of which no part is known that reads "
                f"titles alone; take an encoder, a decoder, or a model of type {', '.join(PARTS)}"
            )
    return config


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """The part of a model that reads titles, with random weights."""
    part: Any = PARTS.get(config.model_type)
    if part is None:
        return AutoModel.from_config(config)
    return part(config.get_text_config())


def load_model(source: str) -> PreTrainedModel:
    """A model with its weights in float32, all of them.

    Raises:
        OptionError: weights are missing, left over, or of another shape.
    """
    local = Path(source).is_dir()
    if local and holds_open_clip(Path(source)):
        return text_model_of(Path(source))
    config = read_config(source)
    part: Any = PARTS.get(config.model_type, AutoModel)
    model, found = part.from_pretrained(
        source,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=local,
        trust_remote_code=False,
    )
    own = set(model.state_dict())
    roots = {name.split(".")[0] for name in own}
    prefix = model.base_model_prefix

    def left_out(name: str) -> bool:  # of a head, or of the other half
        name = name.removeprefix(f"{prefix}.")
        return name.split(".")[0] not in roots or name.startswith("pooler.")

    missing = _without_pooler(found["missing_keys"])
    if missing and local and (files := weight_files(Path(source))):
        state = unwrapped(read_weights(files), own, prefix)
        if _without_pooler(own - state.keys()) < missing:  # the names had a wrapper
            state = {
                **{name: value for name, value in model.state_dict().items() if _is_pooler(name)},
                **state,
            }
            load_strictly(model, state, source, left_out)
            return model
    refuse_others(missing, found["unexpected_keys"], source, left_out)
    return model


def pooling_of(source: str) -> str | None:
    """How a directory of sentence-transformers makes one vector of the tokens; None where nothing says it.

    Raises:
        OptionError: in a way that a tower does not have, or a layer comes after it.
    """
    folder = Path(source)
    try:
        modules = json.loads((folder / "modules.json").read_text())
        kinds = {one["type"].split(".")[-1]: folder / one["path"] for one in modules}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{folder / 'modules.json'} cannot be read: {error!r}") from None
    if not kinds.keys() - {"Transformer", "Normalize"}:
        return None
    if "Pooling" not in kinds:
        kind = ", ".join(sorted(kinds))
        raise OptionError(
            f"{source} makes vectors by modules that are not read ({kind}); say how tokens make one "
            "vector without them with --text.pooling"
        )
    pooling = read_json(kinds["Pooling"] / "config.json")
    if not pooling:
        raise OptionError(
            f"{kinds['Pooling'] / 'config.json'} is not there, which modules.json names; download it, or say "
            "how tokens make one vector with --text.pooling"
        )
    if others := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise OptionError(
            f"{source} has layers after its transformer that are not read ({', '.join(others)}); say how "
            "tokens make one vector without them with --text.pooling"
        )
    named = pooling.get("pooling_mode", [])
    modes = [named] if isinstance(named, str) else list(named)
    modes += [mode for key, mode in FLAGS.items() if pooling.get(key) is True]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise OptionError(
            f"{source} pools tokens by {', '.join(map(str, modes)) or 'nothing'}, which towers do not; "
            "--text.pooling takes mean, cls or last"
        )
    return POOLINGS[modes[0]]


def check_sizes(config: PretrainedConfig, num_tokens: int, max_length: int) -> None:
    """See that a model knows all tokens of its tokenizer, and positions for the longest title.

    Args:
        config: of the model.
        num_tokens: of the tokenizer, the largest number plus one.
        max_length: tokens of the longest title.

    Raises:
        OptionError: it does not.
    """
    if num_tokens > config.vocab_size:
        raise OptionError(
            f"the tokenizer has {num_tokens} tokens, the model knows {config.vocab_size}: they are not of "
            "one model; give --text.tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:  # of relative positions
        return
    if config.model_type in AFTER_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    if config.model_type == "beit3_text":
        positions -= 2
    if max_length > positions:
        raise OptionError(
            f"--text.max-length is {max_length}, the model has positions for {positions} tokens"
        )


def check_vectors(vectors: Tensor, source: str) -> None:
    """See that the vectors of two different titles are numbers, and two.

    Args:
        vectors: (2, feature_dim).
        source: of the weights, for messages.

    Raises:
        OptionError: they are not.
    """
    if not torch.isfinite(vectors).all():
        raise OptionError(f"{source} gives a title a vector that is not finite; its weights are damaged")
    if torch.allclose(vectors[0], vectors[1], rtol=1e-5, atol=1e-7):
        raise OptionError(
            f"{source} gives two different titles the same vector: its tokenizer or its weights are not "
            "those of its model"
        )


def _without_pooler(names: Any) -> set[str]:
    return {name for name in names if not _is_pooler(name)}


def _is_pooler(name: str) -> bool:
    return name.startswith("pooler.")  # not used
