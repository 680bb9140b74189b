"""Rows that the engine has joined, as requests in the schema of the readers: lists, ids, sampled negatives.

Nothing here loops over rows.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import TIME
from mim_torchrec.data.writing import lists
from mim_torchrec.prepare.config import Action

KINDS: tuple[Action, ...] = ("click", "purchase")
WEIGHTS = "candidate_weights"


@dataclass(frozen=True, kw_only=True)
class RequestSchema:
    """What requests have beside what all have.

    Args:
        categories: (n,) names, by the number that the engine has; None where items have none.
        has_query: whether there is a `query_id`.
        has_kinds: whether histories say of each behavior what it was.
        by_time: histories are to be sorted by time again, because events arrived in another order.
        has_weights: whether candidates have weights.
        second: name of the second label; None for none.
    """

    categories: pa.Array | None
    has_query: bool
    has_kinds: bool
    by_time: bool
    has_weights: bool
    second: str | None = None


@dataclass
class Lists:
    """A list column of structs: lengths (num_rows,) and, by name, flat values (sum(lengths),)."""

    lengths: np.ndarray
    values: dict[str, pa.Array] = field(default_factory=dict)

    def take(self, index: np.ndarray, lengths: np.ndarray) -> "Lists":
        """Values at places, in lists of new lengths."""
        places = pa.array(index)
        return Lists(lengths, {name: values.take(places) for name, values in self.values.items()})

    def rows(self) -> np.ndarray:
        """(sum(lengths),) the row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def to_requests(table: pa.Table, shown: Lists, events: Lists, schema: RequestSchema) -> pa.Table:
    """Requests in the columns of `data.schema.REQUESTS`; texts in lists are numbers of a dictionary.

    Args:
        table: `request`, `user`, `ts`, and with a query `query`.
        shown: `item`, `category`, `label`, and with a second label `second`.
        events: `item`, `ts`, `category`, `kind`.
        schema: what they have.
    """
    if schema.by_time:
        ts = events.values["ts"].to_numpy(zero_copy_only=False)
        events = events.take(np.lexsort((ts, events.rows())), events.lengths)
    columns: dict[str, pa.Array] = {
        "request_id": stable_ids(table["request"]), "user_id": stable_ids(table["user"]),
    }  # fmt: skip
    if schema.has_query:
        columns["query_id"] = stable_ids(table["query"]).fill_null(0)
    columns["ts"] = table["ts"].combine_chunks().cast(TIME)
    columns["behavior_item_ids"] = lists(stable_ids(events.values["item"]), events.lengths, pa.int64())
    if schema.categories is not None:
        columns["behavior_categories"] = _named(events, schema.categories)
    columns["behavior_ts"] = lists(events.values["ts"], events.lengths, TIME)
    if schema.has_kinds:
        kinds = events.values["kind"].to_numpy(zero_copy_only=False)
        columns["behavior_kinds"] = _texts(kinds, pa.array(KINDS), events.lengths)
    columns["candidate_item_ids"] = lists(stable_ids(shown.values["item"]), shown.lengths, pa.int64())
    if schema.categories is not None:
        columns["candidate_categories"] = _named(shown, schema.categories)
    columns["labels"] = lists(shown.values["label"], shown.lengths, pa.int8())
    if schema.second is not None:
        columns[f"labels_{schema.second}"] = lists(shown.values["second"], shown.lengths, pa.int8())
    if schema.has_weights:
        columns[WEIGHTS] = lists(np.ones(int(shown.lengths.sum()), np.float32), shown.lengths, pa.float32())
    return pa.table(columns)


def sample_negatives(requests: pa.Table, rate: float, seed: int) -> tuple[pa.Table, int, int]:
    """Keep every candidate with label 1 and a fraction of the others, which get the weight 1 / rate.

    Sums over weighted candidates estimate sums over all, so a model that is trained with the weights predicts
    calibrated probabilities. Whether a candidate stays depends on the seed, its request and its item only.

    Args:
        requests: see :func:`to_requests`, with weights.
        rate: of the negatives that stay.
        seed: of the draw.

    Returns:
        The requests that have a candidate left; negatives that are left out; requests that are.
    """
    lengths = pc.list_value_length(requests["labels"]).to_numpy().astype(np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    flat = {name: requests[name].combine_chunks().flatten() for name in requests.column_names
            if name.startswith(("candidate_", "labels"))}  # fmt: skip
    label = flat["labels"].to_numpy()
    item = flat["candidate_item_ids"].to_numpy()
    request = requests["request_id"].to_numpy()[row]
    keep = (label == 1) | (uniform(request, item, seed) < rate)
    flat[WEIGHTS] = pa.array(np.where(label == 1, 1.0, 1.0 / rate).astype(np.float32))
    places = pa.array(np.flatnonzero(keep))
    left = np.bincount(row[keep], minlength=len(lengths))
    for name, values in flat.items():
        column = lists(values.take(places), left, values.type)
        requests = requests.set_column(requests.column_names.index(name), name, column)
    some = left > 0
    return requests.filter(pa.array(some)), int((~keep).sum()), int((~some).sum())


def uniform(request: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on two ids (n,) and a seed only (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = _mixed(request.astype(np.int64).view(np.uint64) + np.uint64(seed))
        mixed = _mixed(mixed ^ item.astype(np.int64).view(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _named(column: Lists, names: pa.Array) -> pa.ListArray:
    """Categories by name; -1, the category before an item's first version, is empty."""
    empty = pc.index(names, "").as_py()
    if empty < 0:  # names are different, as a dictionary of Parquet needs them
        empty, names = len(names), pa.concat_arrays([names, pa.array([""], names.type)])
    numbers = column.values["category"].to_numpy(zero_copy_only=False)
    return _texts(np.where(numbers < 0, empty, numbers), names, column.lengths)


def _texts(numbers: np.ndarray, names: pa.Array, lengths: np.ndarray) -> pa.ListArray:
    """Lists of texts as numbers of a dictionary, which Parquet writes as they are."""
    values = pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), names)
    return lists(values, lengths, values.type)
