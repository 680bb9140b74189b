"""One row group of requests as numpy arrays, checked: the step between a Parquet file and a batch.

Nothing here loops over rows: a list column is its flat values and the lengths of its rows.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_torchrec.data.errors import DataError, Location, Problems
from mim_torchrec.data.features import NO_FEATURES, Feature, Features, Ids, Numbers
from mim_torchrec.data.request_columns import Coded, Jagged, RequestColumns
from mim_torchrec.data.schema import ORIGINAL, WEIGHT, WEIGHTS, is_list
from mim_torchrec.embeddings.remote.places import Url

SECOND_LABEL = "second_label"
SCALARS = ("request_id", "user_id", "query_id", "ts")
ORIGINALS = {f"{name}{ORIGINAL}": name for name in ("request_id", "user_id", "query_id")}
ORIGINALS_OF_CANDIDATES = {f"candidate_item_ids{ORIGINAL}": "item_id"}
ROLES = {
    "behavior": {"item_id": "behavior_item_ids", "category": "behavior_categories", "ts": "behavior_ts"},
    "candidate": {"item_id": "candidate_item_ids", "category": "candidate_categories", "label": "labels"},
}


def decode(
    table: pa.Table,
    max_behaviors: int,
    on_bad_row: str,
    file: str | Path | Url,
    row_group: int,
    features: Features = NO_FEATURES,
    first_row: int = 0,
    problems: Problems | None = None,
) -> tuple[RequestColumns, int]:
    """Turn a row group, or rows of it that follow one another, into arrays, checking every row.

    A row is bad when a value is null, parallel lists differ in length, there is no candidate, a label is not
    0 or 1, behaviors are not in the order of time, one of them is not strictly before its request, a dense
    feature is NaN or infinite, a weight is not a finite number of at least 0, or the second label of a
    candidate that was not clicked is 1. A history that is null is an
    empty one: nothing is known of a new user.

    Args:
        table: the row group, from `read_row_group`.
        max_behaviors: how many behaviors to keep, the last ones.
        on_bad_row: "fail" or "skip".
        file: for the message.
        row_group: likewise.
        features: further columns, see `data.features`.
        first_row: number of the first row in the row group, for the message.
        problems: where bad rows are skipped, what is wrong with them is added to it.

    Returns:
        The good rows, and how many were bad.

    Raises:
        DataError: a row is bad and `on_bad_row` is "fail".
    """
    bad = _Bad(len(table))
    present = table.column_names
    scalars = {}
    further = (feature.name for feature in features.numbers("request"))
    for name in (*SCALARS, WEIGHT, *further):
        if name in present:
            column = _whole(table[name])
            bad.add_nulls(column, name)
            scalars[name] = _values(name, column, features)
    jagged = {}
    for role, columns in ROLES.items():
        columns = {name: column for name, column in columns.items() if column in present}
        columns |= {
            feature.name: feature.name for feature in features.by_name.values() if feature.role == role
        }
        if role == "candidate" and WEIGHTS in present:
            columns[WEIGHT] = WEIGHTS
        if role == "candidate" and features.label_column is not None:
            columns[SECOND_LABEL] = features.label_column
        jagged[role] = _lists(table, columns, bad, features, may_be_null=role == "behavior")
    _take_originals(table, scalars, jagged["candidate"])
    ids = {
        feature.name: _ids(_whole(table[feature.name]), feature, bad) for feature in features.ids("request")
    }
    _check_dense(scalars, jagged, features, bad)
    _check_labels(jagged["candidate"], features.label_column, bad)
    _check_weights(scalars, jagged["candidate"], bad)
    _check_times(jagged["behavior"], scalars.get("ts"), bad)

    requests = RequestColumns(scalars, jagged["behavior"], jagged["candidate"], ids)
    good = bad.good_rows(on_bad_row, file, row_group, first_row)
    if problems is not None:
        bad.describe(problems, file, row_group, first_row)
    longest = int(requests.behavior.lengths.max(initial=0))
    if good is None and longest <= max_behaviors:
        return requests, 0
    kept = np.arange(len(requests)) if good is None else good
    return requests.take(kept, max_behaviors), len(requests) - len(kept)


class _Bad:
    """What is wrong with rows, each with its column; where nothing is, nothing is computed."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._found: list[tuple[np.ndarray, str, str]] = []

    def add(self, is_bad: np.ndarray, column: str, problem: str) -> None:
        """Note rows (num_rows,) that are bad."""
        if is_bad.any():
            self._found.append((is_bad, column, problem))

    def add_nulls(self, array: pa.Array, column: str) -> None:
        """Note rows that are null."""
        if array.null_count:
            self.add(_nulls(array), column, "is null")

    def add_lists(self, is_bad: np.ndarray, lengths: np.ndarray, column: str, problem: str) -> None:
        """Note rows that have a bad value (sum(lengths),) in their list."""
        if is_bad.any():
            self.add(_any_of(is_bad, lengths), column, problem)

    def good_rows(
        self, on_bad_row: str, file: str | Path | Url, row_group: int, first_row: int
    ) -> np.ndarray | None:
        """Rows that are not bad; None where none is. Raises DataError where one is, and shall fail."""
        if not self._found:
            return None
        is_bad = np.logical_or.reduce([rows for rows, _, _ in self._found])
        if on_bad_row == "fail":
            row = int(np.argmax(is_bad))
            _, column, problem = next(check for check in self._found if check[0][row])
            remedy = "fix the row, or leave such rows out with --on-bad-row skip"
            raise DataError(f"{problem}; {remedy}", file, row_group, first_row + row, column)
        return np.flatnonzero(~is_bad)

    def describe(self, problems: Problems, file: str | Path | Url, row_group: int, first_row: int) -> None:
        """Add what was found."""
        for rows, column, problem in self._found:
            first = Location(file, row_group, first_row + int(np.argmax(rows)), column)
            problems.add(problem, int(rows.sum()), first)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; `combine_chunks` would copy the piece that it has."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lists(
    table: pa.Table, columns: dict[str, str], bad: _Bad, features: Features, may_be_null: bool
) -> Jagged:
    """Parallel list columns; a null is an empty list, and rows whose lengths differ come out empty."""
    arrays = {name: _whole(table[column]) for name, column in columns.items()}
    lengths = {}
    for name, array in arrays.items():
        found = np.diff(array.offsets.to_numpy()).astype(np.int64)
        lengths[name] = np.where(_nulls(array), 0, found) if array.null_count else found
        if not may_be_null:
            bad.add_nulls(array, columns[name])
    common = lengths["item_id"]
    uneven = np.zeros(len(common), bool)
    for name in arrays:
        differs = lengths[name] != common
        bad.add(differs, columns[name], f"its length is not that of {columns['item_id']}")
        uneven |= differs
    is_uneven = uneven.any()
    found = Jagged(np.where(uneven, 0, common) if is_uneven else common, {}, {})
    for name, array in arrays.items():
        flat = array.flatten()  # without the values of null lists
        if flat.null_count:
            bad.add_lists(_nulls(flat), lengths[name], columns[name], "a value in the list is null")
        kept = np.repeat(~uneven, lengths[name]) if is_uneven else slice(None)
        if name == "category" and pa.types.is_dictionary(flat.type):
            found.coded[name] = _coded(flat)[kept]
        else:
            found.values[name] = _values(columns[name], flat, features)[kept]
    return found


def _ids(array: pa.Array, feature: Feature, bad: _Bad) -> Jagged:
    """Ids of each request, one or a list; without those that are null."""
    missing = _nulls(array)
    if not is_list(array.type):
        return Jagged((~missing).astype(np.int64), {"id": feature.kind.read(array.drop_null())})
    lengths = np.where(missing, 0, np.diff(array.offsets.to_numpy()).astype(np.int64))
    flat = array.flatten()
    if flat.null_count:
        bad.add_lists(_nulls(flat), lengths, feature.name, "a value in the list is null")
    return Jagged(lengths, {"id": _without_nulls(flat, feature.kind)})


def _check_dense(
    scalars: dict[str, np.ndarray], jagged: dict[str, Jagged], features: Features, bad: _Bad
) -> None:
    for feature in features.numbers("request"):
        bad.add(~np.isfinite(scalars[feature.name]), feature.name, "is NaN, infinite or beyond float32")
    for feature in (*features.numbers("candidate"), *features.numbers("behavior")):
        lists = jagged[feature.role]
        bad.add_lists(~np.isfinite(lists.values[feature.name]), lists.lengths, feature.name,
                      "a value in the list is NaN, infinite or beyond float32")  # fmt: skip


def _check_labels(candidates: Jagged, second: str | None, bad: _Bad) -> None:
    bad.add(candidates.lengths == 0, ROLES["candidate"]["item_id"], "there is no candidate")
    columns = {"label": ROLES["candidate"]["label"]} | ({} if second is None else {SECOND_LABEL: second})
    for name, column in columns.items():
        labels = candidates.values[name]
        wrong = (labels != 0) & (labels != 1)
        bad.add_lists(wrong, candidates.lengths, column, "a label is neither 0 nor 1")
    if second is not None:
        without = candidates.values[SECOND_LABEL] > candidates.values["label"]
        bad.add_lists(
            without, candidates.lengths, second, "is 1 where labels is 0; it counts after a click only"
        )


def _take_originals(table: pa.Table, scalars: dict[str, np.ndarray], candidates: Jagged) -> None:
    """Add ids as people know them, where the table has them; rows with a null or an uneven list are bad."""
    for column in ORIGINALS.keys() & set(table.column_names):
        scalars[column] = _as_known(_whole(table[column]))
    for column, name in ORIGINALS_OF_CANDIDATES.items():
        if column in table.column_names:
            array = _whole(table[column])
            lengths = np.where(_nulls(array), 0, np.diff(array.offsets.to_numpy()))
            values = _as_known(array.flatten())
            candidates.values[name + ORIGINAL] = values[np.repeat(candidates.lengths == lengths, lengths)]


def _as_known(ids: pa.Array) -> np.ndarray:
    """Texts as objects, or integers, which NumPy would make floats of where one is null."""
    ids = ids.fill_null(0) if pa.types.is_integer(ids.type) else ids
    return ids.to_numpy(zero_copy_only=False)


def _check_weights(scalars: dict[str, np.ndarray], candidates: Jagged, bad: _Bad) -> None:
    """Give the weight of a request to all its candidates, and check those of candidates."""
    column = WEIGHT if WEIGHT in scalars else WEIGHTS
    if WEIGHT in scalars:
        candidates.values[WEIGHT] = np.repeat(scalars.pop(WEIGHT), candidates.lengths)
    if WEIGHT in candidates.values:
        weights = candidates.values[WEIGHT]
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        bad.add_lists(wrong, candidates.lengths, column, "a weight is no finite number of at least 0")


def _check_times(behaviors: Jagged, request_ts: np.ndarray | None, bad: _Bad) -> None:
    if "ts" not in behaviors.values:
        return
    times, lengths, column = behaviors.values["ts"], behaviors.lengths, ROLES["behavior"]["ts"]
    stops, some = behaviors.stops, lengths > 0
    back = np.flatnonzero(times[1:] < times[:-1]) + 1  # most often where the list of another request begins
    back = back[stops[np.searchsorted(stops, back)] != back]
    if request_ts is not None:
        late = "a behavior is not before its request (column ts)"
        if len(back):
            bad.add_lists(times >= np.repeat(request_ts, lengths), lengths, column, late)
        else:  # the last behavior is the latest
            is_late = np.zeros(len(lengths), bool)
            is_late[some] = times[stops[some] - 1] >= request_ts[some]
            bad.add(is_late, column, late)
    if len(back):
        wrong = np.zeros(len(times), bool)
        wrong[back] = True
        bad.add_lists(wrong, lengths, column, "the behaviors are not in the order of time")


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
    if column in ("labels", WEIGHT, WEIGHTS, features.label_column):
        return _without_nulls(array, Numbers())
    return _without_nulls(array, Ids() if column.endswith("categories") else _Integers())


def _coded(array: pa.DictionaryArray) -> Coded:
    """Categories by the dictionary of the file, which is all that is hashed; nulls become something."""
    indices = array.indices.fill_null(0) if array.null_count else array.indices
    codes = indices.cast(pa.int32()).to_numpy(zero_copy_only=False)
    return Coded(
        codes, _without_nulls(array.dictionary, Ids()) if len(array.dictionary) else np.zeros(1, int)
    )


def _without_nulls(array: pa.Array, kind: Ids | Numbers) -> np.ndarray:
    """Values; nulls become something, their rows are bad anyway."""
    if array.null_count:
        known = array.drop_null()
        if not len(known):
            return np.zeros(len(array), kind.dtype)
        array = array.fill_null(known[0])
    return kind.read(array)
