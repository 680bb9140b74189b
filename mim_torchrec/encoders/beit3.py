"""The text tower of BEiT-3 (Wang et al. 2022, "Image as a Foreign Language"), which no library has.

Its blocks are those of the vision tower, which timm has: pre-norm with sub-LN, that is a further layer norm
before the last projection of the attention and before that of the MLP (Magneto, Wang et al. 2022). Here they
read tokens. Of an original checkpoint this is the language half (branch B of the multiway layers) without the
layers that BEiT-3 shares between both. Not here: its vision-language experts and pre-training.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from mim_torchrec.encoders.weights import read_weights
from mim_torchrec.errors import OptionError

FIRST_POSITION = 2  # rows before it stand for special positions, as in fairseq


class Beit3TextConfig(PretrainedConfig):
    """Sizes of the tower; the defaults are those of BEiT-3 base."""

    model_type = "beit3_text"

    def __init__(
        self,
        vocab_size: int = 64010,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 1024,
        layer_norm_eps: float = 1e-5,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size, self.max_position_embeddings = intermediate_size, max_position_embeddings
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**others)


class Beit3TextModel(PreTrainedModel):
    """Maps tokens to hidden states.

    Args:
        config: sizes.

    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = Beit3TextModel(Beit3TextConfig(intermediate_size=16, max_position_embeddings=6, **sizes))
    >>> model(torch.tensor([[1, 2, 3]]), torch.ones(1, 3)).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    config_class = Beit3TextConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Beit3TextConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.token_embed = nn.Embedding(config.vocab_size, size)
        self.position_embed = nn.Embedding(config.max_position_embeddings, size)
        self.blocks = nn.ModuleList(
            Block(
                size, config.num_attention_heads, mlp_ratio=config.intermediate_size / size, qkv_bias=True,
                scale_attn_norm=True, scale_mlp_norm=True,
                norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=config.layer_norm_eps)),
            )
            for _ in range(config.num_hidden_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embeddings of tokens."""
        return self.token_embed

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Hidden states of titles.

        Args:
            input_ids: (n, num_tokens) int64.
            attention_mask: (n, num_tokens), 0 where there is padding; every title has a token.

        Returns:
            `last_hidden_state` (n, num_tokens, hidden_size).

        Raises:
            OptionError: titles longer than the tower has positions.
        """
        length = input_ids.shape[1]
        longest = self.config.max_position_embeddings - FIRST_POSITION
        if length > longest:
            raise OptionError(f"titles of {length} tokens: the tower has positions for {longest}")
        positions = torch.arange(FIRST_POSITION, length + FIRST_POSITION, device=input_ids.device)
        kept = attention_mask[..., None].to(self.norm.weight.dtype)
        hidden = (self.token_embed(input_ids) + self.position_embed(positions)) * kept
        mask = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(block.__call__, hidden, mask)
            else:
                hidden = block(hidden, mask)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))

    def load_original(self, file: Path) -> None:
        """Take the language half of an original BEiT-3 checkpoint.

        Raises:
            OptionError: there is no such file, it is damaged, or it lacks what the tower has.
        """
        if not file.is_file():
            raise OptionError(f"weights {file}: no such file")
        try:
            self.load_state_dict(from_original(read_weights([file])))
        except RuntimeError as error:
            raise OptionError(f"weights {file} are not those of this BEiT-3 text tower: {error}") from error


class Beit3TextForMaskedLM(PreTrainedModel):
    """The tower and a linear layer that predicts tokens, BEiT-3's head of masked language modelling.

    Args:
        config: sizes of the tower.
    """

    config_class = Beit3TextConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: Beit3TextConfig) -> None:
        super().__init__(config)
        self.model = Beit3TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """What maps hidden states to logits."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)

    def forward(self, *args: Any, **inputs: Any) -> MaskedLMOutput:
        """`logits` (n, num_tokens, vocab_size); arguments as of `Beit3TextModel`."""
        return MaskedLMOutput(logits=self.lm_head(self.model(*args, **inputs).last_hidden_state))


# so that transformers' own ways to read a directory and to find a head know the tower
AutoConfig.register(Beit3TextConfig.model_type, Beit3TextConfig, exist_ok=True)
AutoModel.register(Beit3TextConfig, Beit3TextModel, exist_ok=True)
AutoModelForMaskedLM.register(Beit3TextConfig, Beit3TextForMaskedLM, exist_ok=True)

_NAMES = (
    (r"^beit3\.", ""),
    (r"^text_embed\.", "token_embed."),
    (r"^encoder\.embed_positions\.B\.", "position_embed."),
    (r"^encoder\.layer_norm\.B\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn_layer_norm\.B\.", ".norm1."),
    (r"\.final_layer_norm\.B\.", ".norm2."),
    (r"\.self_attn\.inner_attn_ln\.B\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.B\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.B\.", r".attn.\1."),
    (r"\.ffn\.B\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.B\.", ".mlp."),
)


def from_original(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a `Beit3TextModel` from that of a BEiT-3: branch B, its three projections in one."""
    renamed = {}
    for name, value in saved.items():
        if ".A." in name or "vision_embed" in name or not name.startswith("beit3."):
            continue
        for old, new in _NAMES:
            name = re.sub(old, new, name)
        renamed[name] = value
    found = {name: value for name, value in renamed.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{which}.") for which in "qkv"]
        if all(part in renamed for part in parts):
            found[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed[part] for part in parts])
    return found
