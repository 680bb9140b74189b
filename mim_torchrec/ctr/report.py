"""What is reported about the predictions of all ranks: overall, by item age, by category.

Rank 0 has what it takes to know of the items. Intervals are by resampling users, whose impressions are not
independent of one another.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mim_torchrec.data.ages import NUM_AGE_SETS, age_sets
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.training import metrics
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.impressions import Impressions

log = logging.getLogger(__name__)

BOOTSTRAP_SEED = 0
SECOND = ("second_label", "second_score", "second_score_given_click")
COLUMNS = ("user_id", "query_id", "item_id", "label", "score", "weight", *SECOND)
"""Columns of predictions that `summarize` takes."""
ITEM_COLUMNS = ("item_id", "category", "listed_at")
"""Columns of items that are reported by."""
EPOCH_COLUMNS = ("user_id", "label", "score", "weight", *SECOND)
"""Columns of predictions that `epoch_metrics` takes."""
GROUPS = {"gauc": "user_id", "gauc_by_query": "query_id"}


def read_items(dataset: Dataset, context: DistributedContext) -> ItemStore | None:
    """What is reported by of the items, on rank 0; every rank calls it.

    Raises:
        DataError: there are no items, or a file of them is malformed; on all ranks.
    """
    return on_all_ranks(lambda: ItemStore.read(dataset, ITEM_COLUMNS) if context.is_main else None)


def epoch_metrics(predictions: dict[str, np.ndarray], context: DistributedContext) -> dict[str, float]:
    """`auc`, `gauc` and `ne` of the predictions of all ranks; one that is undefined is left out.

    Of a second label also `second_auc` and `second_auc_given_click`, see `summarize`.

    Args:
        predictions: of this rank, the columns of `EPOCH_COLUMNS`.
        context: the process group; every rank calls it.
    """
    impressions = Impressions(predictions["label"], predictions["score"], context, parts={},
                              groups={"gauc": predictions["user_id"]},
                              weights=predictions.get("weight"))  # fmt: skip
    found = impressions.compute()
    known = {name: float(found[name]) for name in ("auc", "gauc", "ne") if not np.isnan(found[name])}
    second = summarize_second(predictions, context)
    if second is not None:
        aucs = {f"second_{name}": second[name] for name in ("auc", "auc_given_click")}
        known |= {name: value for name, value in aucs.items() if value is not None}
    return known


def summarize(
    predictions: dict[str, np.ndarray], items: ItemStore | None, context: DistributedContext, draws: int = 0
) -> dict[str, Any]:
    """Metrics of predictions; one that is undefined is None.

    Args:
        predictions: of this rank, the columns of `COLUMNS` that there are.
        items: the items, for their ages and categories; rank 0 has them.
        context: the process group; every rank calls it.
        draws: bootstrap draws of users for the intervals; 0 gives none.

    Returns:
        `auc`, `gauc` (by user), `gauc_by_query` (None without queries), `ne`, `logloss`, `calibration`, `n`,
        `positives`, and `by_age` (ten equal sets of items, S1 the newest: MIM, Figure 6) and `by_category`
        (MIM, Table 7), which are None, with a line in the log, where the items have no such column. With
        draws also `ci`, 95% intervals by the name of the metric, and `ci` of every age and category. Of a
        second label also `second`, see `summarize_second`. It is the same on every rank.
    """
    labels = predictions["label"]
    known = {
        name: _codes_of_items(predictions["item_id"], name, of_items, items, context)
        for name, of_items in (("by_age", _ages), ("by_category", _categories))
    }
    codes = {name: found for name, found in known.items() if found is not None}
    impressions = Impressions(
        labels, predictions["score"], context,
        parts={name: (of_impression, len(names)) for name, (of_impression, names) in codes.items()},
        groups={name: predictions[column] for name, column in GROUPS.items() if column in predictions},
        drawn=predictions["user_id"] if draws else None, weights=predictions.get("weight"),
    )  # fmt: skip
    found = impressions.compute()
    parts: dict[str, Any] = dict.fromkeys(known)
    for name, (of_impression, names) in codes.items():
        parts[name] = _parts(labels, of_impression, names, context)
        for place, part in enumerate(parts[name].values()):
            part["auc"] = _defined(found[name][place])
    report: dict[str, Any] = {
        **{name: _defined(found.get(name, np.nan)) for name in ("auc", *GROUPS, "ne", "logloss")},
        "calibration": impressions.calibration(),
        "n": sum(context.all_gather_objects(len(labels))),
        "positives": sum(context.all_gather_objects(int(labels.sum()))),
    }
    if draws:
        counts = metrics.draw_counts(impressions.num_drawn, draws, BOOTSTRAP_SEED)
        drawn = impressions.compute_draws(counts)
        figures = ("auc", *GROUPS, "ne", "logloss", "calibration_ratio")
        report["ci"] = {
            name: metrics.interval(np.array([draw[name] for draw in drawn]))
            for name in figures if name in found
        }  # fmt: skip
        for name, values in parts.items():
            for place, part in enumerate((values or {}).values()):
                part["ci"] = metrics.interval(np.array([draw[name][place] for draw in drawn]))
    ages = parts["by_age"]
    parts["by_age"] = None if ages is None else [{"set": name, **part} for name, part in ages.items()]
    second = summarize_second(predictions, context, draws)
    return report | parts | ({} if second is None else {"second": second})


def summarize_second(
    predictions: dict[str, np.ndarray], context: DistributedContext, draws: int = 0
) -> dict[str, Any] | None:
    """Metrics of a second label; one that is undefined is None. None where there is no second label.

    Args:
        predictions: see `summarize`.
        context: likewise.
        draws: likewise.

    Returns:
        Of pCTCVR over all impressions `auc`, `gauc`, `ne`, `logloss`, `calibration` and `positives`; of pCVR
        over the clicked ones `auc_given_click`. With draws also `ci` of the first four.
    """
    if SECOND[0] not in predictions:
        return None
    label, both, given_click = (predictions[name] for name in SECOND)
    clicked, weights, users = predictions["label"] == 1, predictions.get("weight"), predictions["user_id"]
    whole = Impressions(label, both, context, parts={}, groups={"gauc": users},
                        drawn=users if draws else None, weights=weights)  # fmt: skip
    after = Impressions(label[clicked], given_click[clicked], context, parts={}, groups={},
                        weights=None if weights is None else weights[clicked])  # fmt: skip
    found, names = whole.compute(), ("auc", "gauc", "ne", "logloss")
    report = {name: _defined(found[name]) for name in names} | {
        "calibration": whole.calibration(),
        "positives": sum(context.all_gather_objects(int(label.sum()))),
        "auc_given_click": _defined(after.compute()["auc"]),
    }
    if draws:
        drawn = whole.compute_draws(metrics.draw_counts(whole.num_drawn, draws, BOOTSTRAP_SEED))
        report["ci"] = {name: metrics.interval(np.array([draw[name] for draw in drawn])) for name in names}
    return report


Codes = tuple[np.ndarray, list[str]]


def _codes_of_items(
    item_ids: np.ndarray,
    name: str,
    of_items: Callable[[np.ndarray, ItemStore], Codes],
    items: ItemStore | None,
    context: DistributedContext,
) -> Codes | None:
    """Code of each impression (n,) of this rank by its item, which rank 0 knows, and the names of the codes.

    None, with a line in the log, where the items lack what it takes.
    """
    ids, of_impression = np.unique(item_ids, return_inverse=True)
    known = np.unique(np.concatenate(context.all_gather_objects(ids)))

    def look() -> Codes | None:
        if items is None:
            return None
        try:
            return of_items(known, items)
        except DataError as error:
            log.warning("no results %s: %s", name.replace("_", " "), error)
            return None

    found = context.broadcast_object(on_all_ranks(look))
    if found is None:
        return None
    codes, names = found
    return codes[np.searchsorted(known, ids)][of_impression], names


def _ages(ids: np.ndarray, items: ItemStore) -> Codes:
    """Set of each item by its age. Raises DataError if an item has no `listed_at`."""
    return age_sets(items)[items.rows_of(ids)], [f"S{k + 1}" for k in range(NUM_AGE_SETS)]


def _categories(ids: np.ndarray, items: ItemStore) -> Codes:
    """Category of each item. Raises DataError if the items have none."""
    names, codes = np.unique(items.categories(items.rows_of(ids)), return_inverse=True)
    return codes, [str(name) for name in names]


def _parts(
    labels: np.ndarray, codes: np.ndarray, names: list[str], context: DistributedContext
) -> dict[str, dict[str, Any]]:
    mine = [np.bincount(codes, weights=w, minlength=len(names)) for w in (np.ones(len(labels)), labels)]
    counts, clicks = np.sum(context.all_gather_objects(mine), axis=0)
    return {
        name: {"auc": None, "n": int(n), "positives": int(c)}
        for name, n, c in zip(names, counts, clicks, strict=True)
    }


def in_words(report: dict[str, Any]) -> str:
    """The figures of a summary in one line.

    >>> in_words({"auc": 0.75, "gauc": None, "ne": 0.98765, "n": 40, "ci": {"auc": [0.7, 0.8]}})
    'auc 0.7500 [0.7000, 0.8000], gauc -, ne 0.9877, 40 impressions'
    """
    named = {name: "-" if report[name] is None else f"{report[name]:.4f}" for name in ("auc", "gauc", "ne")}
    if (interval := report.get("ci", {}).get("auc")) is not None:
        named["auc"] += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return ", ".join(f"{name} {value}" for name, value in named.items()) + f", {report['n']} impressions"


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
