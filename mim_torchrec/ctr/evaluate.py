"""Predictions of all ranks and what is reported about them: overall, by item age, by category."""

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.vocabulary import IdMapper
from mim_torchrec.training import metrics
from mim_torchrec.training.distributed import Ranks

log = logging.getLogger(__name__)


@torch.no_grad()
def predict(model: nn.Module, reader: RequestReader, mapper: IdMapper, ranks: Ranks) -> dict[str, np.ndarray]:
    """Score every candidate that the reader yields, on all ranks.

    Args:
        model: gives a `Prediction` for a batch; scores in evaluation mode and is left in the mode it had.
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
        logits = model(mapper(batch).to(ranks.device)).logits
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
        `auc`, `gauc` (by user), `ne`, `logloss`, `n`, `positives`, and `by_age` and `by_category`, which are
        None, with a line in the log, where the items have no such column.
    """
    parts: dict[str, Any] = {}
    for breakdown in (by_age, by_category):
        try:
            parts[breakdown.__name__] = breakdown(predictions, items)
        except DataError as error:
            log.warning("no results %s: %s", breakdown.__name__.replace("_", " "), error)
            parts[breakdown.__name__] = None
    labels, scores = predictions["label"], predictions["score"]
    return {
        "auc": metrics.auc(labels, scores),
        "gauc": metrics.grouped_auc(labels, scores, predictions["user_id"]),
        "ne": metrics.normalized_entropy(labels, scores),
        "logloss": metrics.log_loss(labels, scores),
        "n": len(labels),
        "positives": int(labels.sum()),
        **parts,
    }


def by_age(predictions: dict[str, np.ndarray], items: ItemStore) -> list[dict[str, Any]]:
    """AUC of the impressions of ten equal sets of items, S1 the newest (MIM, Figure 6).

    Raises:
        DataError: an item has no `listed_at`.
    """
    of_impression = age_sets(items)[items.rows_of(predictions["item_id"])]
    return [{"set": f"S{k + 1}", **_part(predictions, of_impression == k)} for k in range(NUM_AGE_SETS)]


def by_category(predictions: dict[str, np.ndarray], items: ItemStore) -> dict[str, dict[str, Any]]:
    """AUC of the impressions of each category, by the items' own categories.

    Raises:
        DataError: the item table has no categories.
    """
    ids, of_impression = np.unique(predictions["item_id"], return_inverse=True)
    names, category = np.unique(items.categories(items.rows_of(ids)), return_inverse=True)
    return {str(name): _part(predictions, category[of_impression] == k) for k, name in enumerate(names)}


def _part(predictions: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    labels = predictions["label"][mask]
    return {
        "auc": metrics.auc(labels, predictions["score"][mask]),
        "n": int(mask.sum()),
        "positives": int(labels.sum()),
    }
