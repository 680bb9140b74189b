"""Downstream data adaptation of the text tower (§3.2): masked language modelling, causal for GPT-2.

transformers' collator masks, and transformers' model class for the purpose gives the head, whose decoder
shares the tower's token embeddings. The head sees the positions that count only: with a vocabulary of 30,000
its logits of every position would take more time and memory than the tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from mim_torchrec.encoders.pixels import PixelInputs, Tokens, send_tokens
from mim_torchrec.encoders.text import TextEncoder
from mim_torchrec.errors import OptionError
from mim_torchrec.pretraining.config import TextAdaptionConfig
from mim_torchrec.pretraining.objective import PretrainingObjective, generator

IGNORED = -100
"""What transformers' collators put where nothing is to be predicted."""


@dataclass
class TokenBatch:
    """Tokens as the tower takes them, labels (n, num_tokens), `IGNORED` where there is nothing to say, and
    places (k,) of the others, see `predicted`: the host would wait for a GPU to count them."""

    tokens: Tokens
    labels: Tensor
    places: Tensor


def predicted(labels: Tensor, objective: Literal["mlm", "causal"]) -> Tensor:
    """Places (k,) in the flattened labels (n, num_tokens) at which a token is predicted.

    >>> labels = torch.tensor([[5, IGNORED, 6]])
    >>> predicted(labels, "mlm").tolist(), predicted(labels, "causal").tolist()
    ([0, 2], [2])
    """
    wanted = labels != IGNORED
    if objective == "causal":  # nothing is before the first token
        wanted[:, :1] = False
    return wanted.flatten().nonzero().flatten()


class LanguageModel(PretrainingObjective):
    """Predicts masked or next tokens.

    Args:
        text: the tower.
        inputs: tokens by item row.
        config: what is predicted.

    Raises:
        OptionError: the tower was not made for the objective, or has no head in transformers.
    """

    def __init__(self, text: TextEncoder, inputs: PixelInputs, config: TextAdaptionConfig) -> None:
        super().__init__(fix_batch_norm=False)
        self.objective = objective_of(text, config.objective)
        if not 0 < config.mask_ratio < 1:
            raise OptionError(f"--dda-text.mask-ratio is {config.mask_ratio}; it must be in (0, 1)")
        self.text = text
        self.head = LanguageHead(text.model, self.objective)
        self._collate = DataCollatorForLanguageModeling(
            text.tokenizer, mlm=self.objective == "mlm", mlm_probability=config.mask_ratio
        )
        self._inputs = inputs

    def batch(self, rows: np.ndarray, key: Sequence[int]) -> TokenBatch:
        """Titles of items, with tokens masked again for every key."""
        tokens, upload = self._inputs.tokens(rows), self._inputs.new_upload()
        if not tokens["input_ids"].shape[1]:  # no title has a token, not even a special one
            nothing = tokens["input_ids"].new_zeros(len(rows), 1)
            kept = {"input_ids": nothing, "attention_mask": nothing}
            labels = torch.full_like(nothing, IGNORED)
        else:
            # its own `seed` would go on from batch to batch, and works in main processes only
            self._collate.generator = generator(key)
            examples = zip(tokens["input_ids"].tolist(), tokens["attention_mask"].tolist(), strict=True)
            batch = self._collate([{"input_ids": ids, "attention_mask": mask} for ids, mask in examples])
            kept, labels = {name: batch[name] for name in tokens}, batch["labels"]
        sent, there = send_tokens(kept, upload), upload.add(labels)
        places = upload.add(predicted(labels, self.objective))
        upload.send()
        return TokenBatch(sent(), there(), places())

    def sums(self, batch: TokenBatch) -> Tensor:
        """Sum of cross-entropies, right predictions, and their number."""
        hidden = self.text.hidden_states(batch.tokens).flatten(0, 1)
        labels = batch.labels.flatten().index_select(0, batch.places)
        seen = batch.places - 1 if self.objective == "causal" else batch.places
        logits = self.head(hidden.index_select(0, seen)).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.detach().argmax(1) == labels).sum()
        return torch.stack([loss, right.to(loss), loss.new_full((), len(labels))])

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """`loss` and `accuracy` per predicted token."""
        return {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2]}


class LanguageHead(nn.Module):
    """The head of transformers' masked or causal language model for a tower, on given hidden states.

    Its decoder is tied to the tower's token embeddings, as transformers ties them. The other weights start at
    random: towers do not come with them.

    Args:
        tower: whose class and sizes decide.
        objective: `mlm` or `causal`.
    """

    def __init__(self, tower: PreTrainedModel, objective: Literal["mlm", "causal"]) -> None:
        super().__init__()
        kind = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
        model = kind.from_config(tower.config)
        decoder: Any = model.get_output_embeddings()
        embeddings: Any = tower.get_input_embeddings()
        if decoder.weight.shape != embeddings.weight.shape:
            raise OptionError(
                f"the head of {type(model).__name__} predicts {decoder.weight.shape[0]} tokens from "
                f"{decoder.weight.shape[1]} numbers, the tower embeds {tuple(embeddings.weight.shape)}"
            )
        decoder.weight = embeddings.weight
        setattr(model, model.base_model_prefix, _GivenStates())
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) of hidden states (n, hidden_size)."""
        return self.model(inputs_embeds=hidden[None]).logits[0]


class _GivenStates(nn.Module):
    """In the place of the encoder inside a language model: its output is what it is given."""

    def forward(
        self, input_ids: None = None, *, inputs_embeds: Tensor, **_: object
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def objective_of(text: TextEncoder, wanted: Literal["auto", "mlm", "causal"]) -> Literal["mlm", "causal"]:
    """What a tower was made for: masked language modelling wherever transformers has it.

    Raises:
        OptionError: the tower was made for the other, or for neither.
    """
    kind = type(text.model.config)
    masked, causal = kind in MODEL_FOR_MASKED_LM_MAPPING, kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if not masked and not causal:
        raise OptionError(f"transformers has no language model of {kind.__name__}: leave out dda-text")
    if wanted == "mlm" and (not masked or text.tokenizer.mask_token is None):
        raise OptionError(
            f"--dda-text.objective mlm: {kind.__name__} has no masked language model or its tokenizer no "
            "mask token; take causal"
        )
    if wanted == "causal" and masked:
        raise OptionError(f"--dda-text.objective causal: {kind.__name__} sees the tokens to come; take mlm")
    return "mlm" if masked else "causal"
