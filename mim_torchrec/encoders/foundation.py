"""The foundation models of Figure 5: timm's names of vision models, and text models by names of their own.

A vision model is any of timm's; the paper's are listed here for those who compare them. A text model that is
named here can be built with random weights where no hub can be reached, because its sizes are known.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import BertConfig, GPT2Config, PretrainedConfig

from mim_torchrec.encoders.beit3 import Beit3TextConfig

VISION = {
    "ResNet50": "resnet50d",
    "Swin Transformer": "swin_base_patch4_window7_224",
    "ConvNeXt v1": "convnext_base",
    "ConvNeXt V2": "convnextv2_base",
    "ConvNeXt V2 large": "convnextv2_large",
    "EVA-02": "eva02_base_patch14_224",
    "BEiT-3 base": "beit3_base_patch16_224",
    "BEiT-3 large": "beit3_large_patch16_224",
}
"""The paper's vision models, and what timm calls them."""

SHORT = {
    "swin": VISION["Swin Transformer"],
    "convnext": VISION["ConvNeXt v1"],
    "convnextv2": VISION["ConvNeXt V2"],
    "eva02": VISION["EVA-02"],
    "beit3_base": VISION["BEiT-3 base"],
    "beit3_large": VISION["BEiT-3 large"],
}
"""Shorter names of them. None is another model of timm, whose `resnet50` is not the `resnet50d` here."""


@dataclass(frozen=True)
class TextModel:
    """A text model of the paper: where its weights are, its sizes, and how its tokens make one vector."""

    title: str
    hub: str | None
    """Its name on the hub of transformers; None where only a file of weights is published."""
    config: Callable[[], PretrainedConfig]
    pooling: str = "mean"


def _bert_large() -> BertConfig:
    return BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def _beit3_large() -> Beit3TextConfig:
    return Beit3TextConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )


TEXT = {
    "bert": TextModel("BERT", "google-bert/bert-base-uncased", BertConfig),
    "gpt2": TextModel("GPT-2", "openai-community/gpt2", GPT2Config, "last"),
    "bge_base": TextModel("BGE base", "BAAI/bge-base-en-v1.5", BertConfig, "cls"),
    "bge_large": TextModel("BGE large", "BAAI/bge-large-en-v1.5", _bert_large, "cls"),
    "beit3_base": TextModel("BEiT-3 base", None, Beit3TextConfig),
    "beit3_large": TextModel("BEiT-3 large", None, _beit3_large),
}
"""The paper's text models by our names."""
