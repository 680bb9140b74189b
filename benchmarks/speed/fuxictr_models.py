"""Models of FuxiCTR 2.3.10, a well-kept library of CTR models, on the very requests that ours are trained on.

Its own classes and its own training step (`train_step`: forward, loss, backward, gradient clipping, dense
Adam over all parameters, embedding tables included). One row a candidate, histories padded to the longest
of the batch, as its loader for long histories makes them.
"""

from typing import Any, Protocol

import numpy as np
import torch
from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DIEN.DIEN import DIEN
from model_zoo.LongCTR.DIN.DIN import DIN
from model_zoo.LongCTR.SIM.SIM import SIM
from model_zoo.LongCTR.TWIN.TWIN import TWIN
from torch import Tensor

from mim_torchrec.data.batch import RequestBatch

FuxiBatch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
PRE, POST = "pre", "post"
PADDING = {"din": PRE, "dien": POST, "sim": PRE, "twin": PRE}
"""On which side histories are padded: DIEN's recurrence starts at the first position."""


class Trainable(Protocol):
    """What is called of a model of FuxiCTR, which has no types."""

    def train_step(self, batch: FuxiBatch) -> Tensor:
        """Take a step on a batch; returns its loss."""
        ...


def build(
    name: str,
    rows: dict[str, int],
    dim: int,
    *,
    attention: int,
    top_k: int,
    heads: int,
    tower: tuple[int, ...],
    device: torch.device,
) -> Trainable:
    """A model, ready to train.

    Args:
        name: "din", "dien", "sim" or "twin".
        rows: of the tables `user_id`, `item_id` and `category`.
        dim: of an embedding; an item is the concatenation of two.
        attention: width of DIN's hidden layer.
        top_k: behaviors that SIM and TWIN keep.
        heads: of SIM and TWIN.
        tower: widths of the hidden layers.
        device: that it computes on.
    """
    features = FeatureMap("requests", ".")
    features.labels = ["label"]
    features.default_emb_dim = dim
    for feature, source in (("user_id", "user"), ("item_id", "item"), ("category", "item")):
        spec: dict[str, Any] = {"type": "categorical", "source": source, "vocab_size": rows[feature]}
        if source == "item":
            spec["padding_idx"] = 0
        features.features[feature] = spec
    features.num_fields = len(features.features)
    common: dict[str, Any] = {
        "gpu": -1 if device.type == "cpu" else device.index,
        "dnn_hidden_units": list(tower), "batch_norm": True, "embedding_dim": dim,
        "learning_rate": 1e-3, "optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"],
        "model_root": ".", "verbose": 0,
    }  # fmt: skip
    search = {"attention_dim": 2 * dim, "num_heads": heads, "topk": top_k}
    match name:
        case "din":
            model = DIN(features, attention_hidden_units=[attention], **common)
        case "dien":
            model = DIEN(features, **common)
        case "sim":
            model = SIM(features, **search, **common)
        case "twin":
            model = TWIN(features, **search, **common)
        case _:
            raise ValueError(f"no model of that name is compared: {name!r}")
    model._max_gradient_norm, model._batch_index = 10.0, 0  # what its `fit` sets
    return model.train()


def to_batch(batch: RequestBatch, name: str) -> FuxiBatch:
    """The same samples as its loader gives them: a row a candidate, its history padded, the target last."""
    sparse = batch.sparse
    lengths = sparse["behavior_item_id"].lengths().numpy()
    repeats = sparse["candidate_item_id"].lengths().numpy()
    starts = sparse["behavior_item_id"].offsets().numpy()
    request = np.repeat(np.arange(len(repeats)), repeats)
    width = int(lengths.max())
    place = np.arange(width)[None, :]
    length = lengths[request][:, None]
    shift = width - length if PADDING[name] == PRE else np.zeros_like(length)
    exists = (place >= shift) & (place < shift + length)
    source = np.where(exists, starts[request][:, None] + place - shift, 0)
    items = {}
    for column in ("item_id", "category"):
        history = np.where(exists, sparse[f"behavior_{column}"].values().numpy()[source], 0)
        target = sparse[f"candidate_{column}"].values().numpy()[:, None]
        items[column] = torch.from_numpy(np.concatenate([history, target], axis=1).reshape(-1))
    users = {"user_id": sparse["user_id"].values()[torch.from_numpy(request)], "label": batch.labels}
    return users, items, torch.from_numpy(exists).float()
