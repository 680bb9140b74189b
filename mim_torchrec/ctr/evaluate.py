"""Predictions of all ranks and what is reported about them: overall, by item age, by category."""

from typing import Any

import numpy as np
import torch
from torch import nn

from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.vocabulary import IdMapper
from mim_torchrec.training import metrics
from mim_torchrec.training.distributed import Ranks

NUM_AGE_SETS = 10


@torch.no_grad()
def predict(model: nn.Module, reader: RequestReader, mapper: IdMapper, ranks: Ranks) -> dict[str, np.ndarray]:
    """Score every candidate that the reader yields, on all ranks.

    Args:
        model: gives logits of a batch; left in evaluation mode's opposite, as the loop expects.
        reader: this rank's share, not shuffled.
        mapper: ids to embedding rows.
        ranks: the process group.

    Returns:
        Arrays of equal length on every rank, ordered by rank and then as read: `request_id`, `user_id`,
        `item_id`, `label` and `score` (a probability).
    """
    was_training = model.training
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    for batch in reader:
        candidates = batch.sparse["candidate_item_id"]
        users = batch.sparse["user_id"].values()
        repeats = candidates.lengths().long()
        logits = model(mapper(batch).to(ranks.device))
        parts.append({
            "request_id": batch.request_ids.repeat_interleave(repeats).numpy(),
            "user_id": users.repeat_interleave(repeats).numpy(),
            "item_id": candidates.values().numpy(),
            "label": batch.labels.numpy(),
            "score": torch.sigmoid(logits.float()).cpu().numpy(),
        })
    model.train(was_training)
    names = ("request_id", "user_id", "item_id", "label", "score")
    mine = {name: np.concatenate([part[name] for part in parts]) for name in names} if parts else None
    everyone = [share for share in ranks.all_gather_objects(mine) if share is not None]
    if not everyone:
        raise ValueError("there is nothing to predict: no rank has read a request")
    return {name: np.concatenate([share[name] for share in everyone]) for name in names}


def summarize(predictions: dict[str, np.ndarray], items: ItemStore) -> dict[str, Any]:
    """Metrics of predictions; one that is undefined is None.

    Returns:
        `auc`, `gauc` (by user), `ne`, `logloss`, `n`, `positives`, `by_age` and `by_category`.
    """
    labels, scores = predictions["label"], predictions["score"]
    return {
        "auc": metrics.auc(labels, scores),
        "gauc": metrics.grouped_auc(labels, scores, predictions["user_id"]),
        "ne": metrics.normalized_entropy(labels, scores),
        "logloss": metrics.log_loss(labels, scores),
        "n": len(labels),
        "positives": int(labels.sum()),
        "by_age": by_age(predictions, items),
        "by_category": by_category(predictions, items),
    }


def by_age(predictions: dict[str, np.ndarray], items: ItemStore) -> list[dict[str, Any]]:
    """AUC of the impressions of ten equal sets of items, S1 the newest (MIM, Figure 6).

    All items of the store are divided by the time they were listed; ties are broken by item id.
    """
    rows = np.arange(len(items))
    newest_first = np.lexsort((items.item_ids, -items.listed_at(rows)))
    age_set = np.empty(len(items), np.int64)
    age_set[newest_first] = rows * NUM_AGE_SETS // max(len(items), 1)
    of_impression = age_set[items.rows_of(predictions["item_id"])]
    return [
        {"set": f"S{k + 1}", **_part(predictions, of_impression == k)} for k in range(NUM_AGE_SETS)
    ]


def by_category(predictions: dict[str, np.ndarray], items: ItemStore) -> dict[str, dict[str, Any]]:
    """AUC of the impressions of each category, by the items' own categories."""
    names = np.asarray(items.categories(items.rows_of(predictions["item_id"])), dtype=object)
    present = sorted({"" if name is None else name for name in names})
    names[names == None] = ""  # noqa: E711  elementwise
    return {name: _part(predictions, names == name) for name in present}


def _part(predictions: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    labels = predictions["label"][mask]
    return {
        "auc": metrics.auc(labels, predictions["score"][mask]),
        "n": int(mask.sum()),
        "positives": int(labels.sum()),
    }
