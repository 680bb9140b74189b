"""Predictions of all ranks and what is reported about them: overall, by item age, by category.

Intervals are by resampling users, whose impressions are not independent of one another.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.vocabulary import IdMapper
from mim_torchrec.training import metrics
from mim_torchrec.training.distributed import DistributedContext

log = logging.getLogger(__name__)

BOOTSTRAP_SEED = 0


@torch.no_grad()
def predict(
    model: nn.Module, reader: RequestReader, mapper: IdMapper, context: DistributedContext
) -> dict[str, np.ndarray]:
    """Score every candidate that the reader yields, on all ranks.

    Args:
        model: gives a `Prediction` for a batch; scores in evaluation mode and is left in the mode it had.
        reader: this rank's share, not shuffled.
        mapper: ids to embedding rows.
        context: the process group.

    Returns:
        Arrays of equal length on every rank, ordered by rank and then as read: `request_id`, `user_id`,
        `query_id` (where logged), `item_id`, `label` and `score` (a probability). Ids that are text, UUIDs or
        uint64 in the log are there, too, as `user_id_original` and so on.
    """
    was_training = model.training
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    for batch in reader:
        candidates = batch.sparse["candidate_item_id"]
        users = batch.sparse["user_id"].values()
        repeats = candidates.lengths().long()
        logits = model(mapper(batch).to(context.device)).logits
        queries = {}
        if "query_id" in batch.sparse.keys():  # noqa: SIM118  a KJT is no mapping
            of_request = batch.sparse["query_id"].values()
            queries["query_id"] = of_request.repeat_interleave(repeats).numpy()
        parts.append(
            {
                "request_id": batch.request_ids.repeat_interleave(repeats).numpy(),
                "user_id": users.repeat_interleave(repeats).numpy(),
                **queries,
                **_originals(batch, repeats.numpy()),
                "item_id": candidates.values().numpy(),
                "label": batch.labels.numpy(),
                "score": torch.sigmoid(logits.float()).cpu().numpy(),
            }
        )
    model.train(was_training)
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else None
    everyone = [share for share in context.all_gather_objects(mine) if share is not None]
    if not everyone:
        raise DataError("there is nothing to predict: no rank has read a request; give a split with requests")
    return {name: np.concatenate([share[name] for share in everyone]) for name in everyone[0]}


def _originals(batch: RequestBatch, repeats: np.ndarray) -> dict[str, np.ndarray]:
    """Ids of impressions as people know them, beside those of int64."""
    return {
        f"{name}_original": ids if name == "item_id" else ids.repeat(repeats)
        for name, ids in batch.originals.items()
    }


def summarize(predictions: dict[str, np.ndarray], items: ItemStore, draws: int = 0) -> dict[str, Any]:
    """Metrics of predictions; one that is undefined is None.

    Args:
        predictions: from `predict`.
        items: the items, for their ages and categories.
        draws: bootstrap draws of users for the intervals; 0 gives none.

    Returns:
        `auc`, `gauc` (by user), `gauc_by_query` (None without queries), `ne`, `logloss`, `calibration`, `n`,
        `positives`, and `by_age` (ten equal sets of items, S1 the newest: MIM, Figure 6) and `by_category`
        (MIM, Table 7), which are None, with a line in the log, where the items have no such column. With
        draws also `ci`, 95% intervals by the name of the metric, and `ci` of every age and category.
    """
    labels, scores = predictions["label"], predictions["score"]
    impressions = _Impressions(labels, scores)
    impressions.group("gauc", predictions["user_id"])
    if "query_id" in predictions:
        impressions.group("gauc_by_query", predictions["query_id"])
    parts: dict[str, Any] = {}
    for name, group in (("by_age", _ages), ("by_category", _categories)):
        try:
            codes, names = group(predictions, items)
        except DataError as error:
            log.warning("no results %s: %s", name.replace("_", " "), error)
            parts[name] = None
            continue
        parts[name] = _parts(labels, codes, names)
        impressions.divide(name, codes, len(names))
    found = impressions.metrics(np.ones(len(labels)))
    for name, values in parts.items():
        for place, part in enumerate((values or {}).values()):
            part["auc"] = _defined(found[name][place])
    report: dict[str, Any] = {
        "auc": metrics.auc(labels, scores),
        "gauc": _defined(found["gauc"]),
        "gauc_by_query": _defined(found.get("gauc_by_query", np.nan)),
        "ne": metrics.normalized_entropy(labels, scores),
        "logloss": metrics.log_loss(labels, scores),
        "calibration": metrics.calibration(labels, scores),
        "n": len(labels),
        "positives": int(labels.sum()),
    }
    if draws:
        weightings = metrics.draw_groups(predictions["user_id"], draws, BOOTSTRAP_SEED)
        drawn = [impressions.metrics(weights) for weights in weightings]
        figures = ("auc", "gauc", "gauc_by_query", "ne", "logloss", "calibration_ratio")
        report["ci"] = {
            name: metrics.interval(np.array([draw[name] for draw in drawn]))
            for name in figures if name in found
        }  # fmt: skip
        for name, values in parts.items():
            for place, part in enumerate((values or {}).values()):
                part["ci"] = metrics.interval(np.array([draw[name][place] for draw in drawn]))
    ages = parts["by_age"]
    parts["by_age"] = None if ages is None else [{"set": name, **part} for name, part in ages.items()]
    return report | parts


class _Impressions:
    """Metrics of the impressions of a split, for any weighting of them; what is undefined is NaN."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray) -> None:
        self._label = np.asarray(labels, np.float64)
        self._score = np.clip(np.asarray(scores, np.float64), 1e-7, 1 - 1e-7)
        self._loss = -np.where(self._label > 0, np.log(self._score), np.log1p(-self._score))
        self._auc = metrics.GroupedAUC(labels, scores)
        self._of_groups: dict[str, tuple[metrics.GroupedAUC, np.ndarray]] = {}
        self._of_parts: dict[str, metrics.GroupedAUC] = {}

    def group(self, name: str, ids: np.ndarray) -> None:
        """Have the mean AUC of groups, weighted by their impressions."""
        codes, count = metrics.group_codes(ids)
        self._of_groups[name] = (metrics.GroupedAUC(self._label, self._score, codes, count), codes)

    def divide(self, name: str, codes: np.ndarray, count: int) -> None:
        """Have the AUC of each part."""
        self._of_parts[name] = metrics.GroupedAUC(self._label, self._score, codes, count)

    def metrics(self, weights: np.ndarray) -> dict[str, Any]:
        """All metrics with the i-th impression counted `weights[i]` times."""
        columns = (self._label, self._loss, self._score)
        rate, loss, predicted = (np.average(column, weights=weights) for column in columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            found = {"auc": self._auc(weights)[0], "logloss": loss, "ne": loss / entropy,
                     "calibration_ratio": np.divide(predicted, rate)}  # fmt: skip
        for name, (auc, codes) in self._of_groups.items():
            sizes = np.bincount(codes, weights=weights, minlength=auc.num_groups)
            mean = metrics.mean_of_groups(auc(weights), sizes)
            found[name] = np.nan if mean is None else mean
        return found | {name: auc(weights) for name, auc in self._of_parts.items()}


def _ages(predictions: dict[str, np.ndarray], items: ItemStore) -> tuple[np.ndarray, list[str]]:
    """Set of each impression by the age of its item. Raises DataError if an item has no `listed_at`."""
    codes = age_sets(items)[items.rows_of(predictions["item_id"])]
    return codes, [f"S{k + 1}" for k in range(NUM_AGE_SETS)]


def _categories(predictions: dict[str, np.ndarray], items: ItemStore) -> tuple[np.ndarray, list[str]]:
    """Category of each impression, by the item's own. Raises DataError if the items have none."""
    ids, of_impression = np.unique(predictions["item_id"], return_inverse=True)
    names, category = np.unique(items.categories(items.rows_of(ids)), return_inverse=True)
    return category[of_impression], [str(name) for name in names]


def _parts(labels: np.ndarray, codes: np.ndarray, names: list[str]) -> dict[str, dict[str, Any]]:
    counts = np.bincount(codes, minlength=len(names))
    clicks = np.bincount(codes, weights=labels, minlength=len(names))
    return {
        name: {"auc": None, "n": int(n), "positives": int(c)}
        for name, n, c in zip(names, counts, clicks, strict=True)
    }


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
