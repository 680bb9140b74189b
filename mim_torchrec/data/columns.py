"""One row group of requests as numpy arrays, checked: the step between a Parquet file and a batch.

Nothing here loops over rows: a list column is its flat values and the lengths of its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import NO_FEATURES, Feature, Features, Ids, Numbers
from mim_torchrec.data.schema import is_list
from mim_torchrec.embeddings.remote.places import Url

SCALARS = ("request_id", "user_id", "query_id", "ts")
ROLES = {
    "behavior": {"item_id": "behavior_item_ids", "category": "behavior_categories", "ts": "behavior_ts"},
    "candidate": {"item_id": "candidate_item_ids", "category": "candidate_categories", "label": "labels"},
}


@dataclass(frozen=True)
class Jagged:
    """Parallel lists: `lengths` (num_requests,) and, by name, flat values (sum(lengths),)."""

    lengths: np.ndarray
    values: dict[str, np.ndarray]

    def take(self, rows: np.ndarray, last: int | None = None) -> "Jagged":
        """The lists of some rows, of each only the `last` values where given."""
        lengths = self.lengths[rows]
        stops = np.cumsum(self.lengths)[rows]
        if last is not None:
            lengths = np.minimum(lengths, last)
        index = np.repeat(stops - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
        return Jagged(lengths, {name: values[index] for name, values in self.values.items()})


@dataclass(frozen=True)
class RequestColumns:
    """Some requests: scalars by name (num_requests,), behaviors, candidates, and further lists of ids."""

    scalars: dict[str, np.ndarray]
    behavior: Jagged
    candidate: Jagged
    ids: dict[str, Jagged] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scalars["request_id"])

    def take(self, rows: np.ndarray, max_behaviors: int | None = None) -> "RequestColumns":
        """Some rows in the order given, each with its last `max_behaviors` behaviors."""
        scalars = {name: values[rows] for name, values in self.scalars.items()}
        ids = {name: jagged.take(rows) for name, jagged in self.ids.items()}
        return RequestColumns(
            scalars, self.behavior.take(rows, max_behaviors), self.candidate.take(rows), ids
        )


def concatenate(parts: Sequence[RequestColumns]) -> RequestColumns:
    """Join requests that have the same columns."""
    if len(parts) == 1:
        return parts[0]

    def joined(jagged: Sequence[Jagged]) -> Jagged:
        values = {name: np.concatenate([j.values[name] for j in jagged]) for name in jagged[0].values}
        return Jagged(np.concatenate([j.lengths for j in jagged]), values)

    names = parts[0].scalars
    scalars = {name: np.concatenate([part.scalars[name] for part in parts]) for name in names}
    ids = {name: joined([part.ids[name] for part in parts]) for name in parts[0].ids}
    behavior, candidate = ([getattr(part, role) for part in parts] for role in ROLES)
    return RequestColumns(scalars, joined(behavior), joined(candidate), ids)


def decode(
    table: pa.Table,
    max_behaviors: int,
    on_bad_row: str,
    file: str | Path | Url,
    row_group: int,
    features: Features = NO_FEATURES,
) -> tuple[RequestColumns, int]:
    """Turn a row group into arrays, checking every row of it.

    A row is bad when a value is null, parallel lists differ in length, there is no candidate, a label is not
    0 or 1, behaviors are not in the order of time, one of them is not strictly before its request, or a
    dense feature is NaN or infinite.

    Args:
        table: the row group.
        max_behaviors: how many behaviors to keep, the last ones.
        on_bad_row: "fail" or "skip".
        file: for the message.
        row_group: likewise.
        features: further columns, see `data.features`.

    Returns:
        The good rows, and how many were bad.

    Raises:
        DataError: a row is bad and `on_bad_row` is "fail".
    """
    bad: list[tuple[np.ndarray, str, str]] = []
    present = table.column_names
    scalars = {}
    for name in (*SCALARS, *(feature.name for feature in features.numbers(of_candidates=False))):
        if name in present:
            column = table[name].combine_chunks()
            bad.append((_nulls(column), name, "is null"))
            scalars[name] = _values(name, column, features)
    jagged = {}
    for role, columns in ROLES.items():
        columns = {name: column for name, column in columns.items() if column in present}
        if role == "candidate":
            columns |= {name: name for name, feature in features.by_name.items() if feature.of_candidates}
        jagged[role] = _lists(table, columns, bad, features)
    ids = {
        feature.name: _ids(table[feature.name].combine_chunks(), feature, bad)
        for feature in features.ids(of_candidates=False)
    }
    _check_dense(scalars, jagged["candidate"], features, bad)
    _check_labels(jagged["candidate"], bad)
    _check_times(jagged["behavior"], scalars.get("ts"), bad)

    is_bad = np.logical_or.reduce([mask for mask, _, _ in bad])
    if on_bad_row == "fail" and is_bad.any():
        row = int(np.argmax(is_bad))
        _, column, problem = next(check for check in bad if check[0][row])
        remedy = "fix the row, or leave such rows out with --on-bad-row skip"
        raise DataError(f"{problem}; {remedy}", file, row_group, row, column)
    requests = RequestColumns(scalars, jagged["behavior"], jagged["candidate"], ids)
    return requests.take(np.flatnonzero(~is_bad), max_behaviors), int(is_bad.sum())


def _lists(
    table: pa.Table,
    columns: dict[str, str],
    bad: list[tuple[np.ndarray, str, str]],
    features: Features,
) -> Jagged:
    """Parallel list columns; those of rows whose lengths differ come out empty."""
    arrays = {name: table[column].combine_chunks() for name, column in columns.items()}
    lengths = {}
    for name, array in arrays.items():
        found = np.diff(array.offsets.to_numpy()).astype(np.int64)
        lengths[name] = np.where(_nulls(array), 0, found)
        bad.append((_nulls(array), columns[name], "is null"))
    common = lengths["item_id"]
    uneven = np.zeros(len(common), bool)
    for name in arrays:
        differs = lengths[name] != common
        bad.append((differs, columns[name], f"its length is not that of {columns['item_id']}"))
        uneven |= differs
    values = {}
    for name, array in arrays.items():
        flat = array.flatten()  # without the values of null lists
        missing = _nulls(flat)
        if missing.any():
            rows = np.repeat(np.arange(len(common)), lengths[name])[missing]
            bad.append((np.isin(np.arange(len(common)), rows), columns[name], "a value in the list is null"))
        own = _values(columns[name], flat, features)
        values[name] = own[np.repeat(~uneven, lengths[name])] if uneven.any() else own
    return Jagged(np.where(uneven, 0, common), values)


def _ids(array: pa.Array, feature: Feature, bad: list[tuple[np.ndarray, str, str]]) -> Jagged:
    """Ids of each request, one or a list; without those that are null."""
    missing = _nulls(array)
    if not is_list(array.type):
        return Jagged((~missing).astype(np.int64), {"id": feature.kind.read(array.drop_null())})
    lengths = np.where(missing, 0, np.diff(array.offsets.to_numpy()).astype(np.int64))
    flat = array.flatten()
    bad.append((_any_of(_nulls(flat), lengths), feature.name, "a value in the list is null"))
    return Jagged(lengths, {"id": _without_nulls(flat, feature.kind)})


def _check_dense(
    scalars: dict[str, np.ndarray],
    candidates: Jagged,
    features: Features,
    bad: list[tuple[np.ndarray, str, str]],
) -> None:
    for feature in features.numbers(of_candidates=False):
        problem = "is NaN, infinite or beyond float32"
        bad.append((~np.isfinite(scalars[feature.name]), feature.name, problem))
    for feature in features.numbers(of_candidates=True):
        wrong = _any_of(~np.isfinite(candidates.values[feature.name]), candidates.lengths)
        bad.append((wrong, feature.name, "a value in the list is NaN, infinite or beyond float32"))


def _check_labels(candidates: Jagged, bad: list[tuple[np.ndarray, str, str]]) -> None:
    bad.append((candidates.lengths == 0, ROLES["candidate"]["item_id"], "there is no candidate"))
    labels = candidates.values["label"]
    wrong = _any_of((labels != 0) & (labels != 1), candidates.lengths)
    bad.append((wrong, ROLES["candidate"]["label"], "a label is neither 0 nor 1"))


def _check_times(
    behaviors: Jagged, request_ts: np.ndarray | None, bad: list[tuple[np.ndarray, str, str]]
) -> None:
    if "ts" not in behaviors.values:
        return
    times, lengths, column = behaviors.values["ts"], behaviors.lengths, ROLES["behavior"]["ts"]
    if request_ts is not None:
        late = times >= np.repeat(request_ts, lengths)
        bad.append((_any_of(late, lengths), column, "a behavior is not before its request (column ts)"))
    request = np.repeat(np.arange(len(lengths)), lengths)
    back = np.zeros(len(times), bool)
    back[1:] = (times[1:] < times[:-1]) & (request[1:] == request[:-1])
    bad.append((_any_of(back, lengths), column, "the behaviors are not in the order of time"))


def _any_of(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(num_requests,): whether any value of the row's list is flagged."""
    total = np.concatenate([[0], np.cumsum(flags)])
    stops = np.cumsum(lengths)
    return total[stops] > total[stops - lengths]


def _nulls(array: pa.Array) -> np.ndarray:
    if not array.null_count:
        return np.zeros(len(array), bool)
    return array.is_null().to_numpy(zero_copy_only=False)


class _Integers(Ids):
    """Columns that all requests have: integers, times in microseconds."""

    def read(self, values: pa.Array) -> np.ndarray:
        if pa.types.is_timestamp(values.type):
            values = values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(pa.int64())
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False)


def _values(column: str, array: pa.Array, features: Features) -> np.ndarray:
    """Values of a column by its kind."""
    if column in features.by_name:
        return _without_nulls(array, features.by_name[column].kind)
    if column == "labels":
        return _without_nulls(array, Numbers())
    return _without_nulls(array, Ids() if column.endswith("categories") else _Integers())


def _without_nulls(array: pa.Array, kind: Ids | Numbers) -> np.ndarray:
    """Values; nulls become something, their rows are bad anyway."""
    if array.null_count:
        known = array.drop_null()
        if not len(known):
            return np.zeros(len(array), kind.dtype)
        array = array.fill_null(known[0])
    return kind.read(array)
