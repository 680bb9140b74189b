"""Further columns of requests that a CTR model reads: by name, each of a kind that is described once.

A column whose name begins with `candidate_` says something of every candidate and is a list parallel to
`candidate_item_ids`; one whose name begins with `behavior_` says something of every behavior (its action, its
price) and is parallel to `behavior_item_ids`. Any other says something of the request: a number, or for ids a
number or a list, of which the embeddings are averaged. A request without an id, null or an empty list, gets
zeros; any other null makes it malformed, but that of an empty history.

A kind is a class with `Ids` or `Numbers` as its base. Reader, vocabularies, model and server ask it for what
they need, and ask nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.forms import holds_text, value_type
from mim_torchrec.data.ids import holds_ids, stable_ids
from mim_torchrec.data.schema import REQUESTS, WEIGHT, WEIGHTS, TableFile, category_ids, is_list
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.errors import OptionError
from mim_torchrec.extensions import load_class

Role = Literal["request", "candidate", "behavior"]
"""What a column says something of."""
ROLES: tuple[Role, ...] = ("request", "candidate", "behavior")
RESERVED = {
    *REQUESTS.names, WEIGHT, WEIGHTS, "item_id", "category", "mm",
    *(f"{role}_{name}" for role in ("candidate", "behavior") for name in ("item_id", "category", "mm")),
}  # fmt: skip


class Ids:
    """Ids, integers or strings; each column has a vocabulary and an embedding table of its own.

    Attributes:
        expected: the values that are read, for messages.
    """

    expected: ClassVar[str] = "integers or strings"
    dtype: ClassVar[type] = np.int64

    def accepts(self, value: pa.DataType) -> bool:
        """Whether columns, or tensors of a request to the server, may hold values of a type."""
        if pa.types.is_dictionary(value):
            value = value.value_type
        return holds_text(value) or pa.types.is_integer(value)

    def read(self, values: pa.Array) -> np.ndarray:
        """Ids (n,) int64 of values (n,) of an accepted type without nulls."""
        return category_ids(values)


class StableIds(Ids):
    """Ids of users, items, requests and queries: integers, text or UUIDs, see `stable_ids`."""

    def accepts(self, value: pa.DataType) -> bool:
        return holds_ids(value)

    def read(self, values: pa.Array) -> np.ndarray:
        return stable_ids(values).to_numpy(zero_copy_only=False)


class Buckets(Ids):
    """Numbers in ranges; each range has an embedding, and so has NaN.

    Args:
        boundaries: finite and ascending. The first range ends before the first boundary, the last begins at
            the last one.

    >>> Buckets((0.0, 10.0)).read(pa.array([-1.0, 0.0, 9.5, 10.0, float("nan")])).tolist()
    [0, 1, 1, 2, 3]
    """

    expected: ClassVar[str] = "numbers"

    def __init__(self, boundaries: tuple[float, ...]) -> None:
        self.boundaries = boundaries

    @classmethod
    def parse(cls, text: str) -> "Buckets":
        """Read `0,10,100`.

        Raises:
            OptionError: it is no list of finite, ascending numbers.
        """
        try:
            boundaries = tuple(float(word) for word in text.split(","))
        except ValueError:
            boundaries = ()
        steps = np.diff(boundaries)
        if not boundaries or not np.isfinite(boundaries).all() or (steps <= 0).any():
            raise OptionError(f"--bucket-features: {text!r} is no list of ascending numbers such as 0,10,100")
        return cls(boundaries)

    def accepts(self, value: pa.DataType) -> bool:
        return Numbers().accepts(value)

    def read(self, values: pa.Array) -> np.ndarray:
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        found = np.searchsorted(np.array(self.boundaries), numbers, side="right")
        return np.where(np.isnan(numbers), len(self.boundaries) + 1, found).astype(np.int64)


class Numbers:
    """Finite numbers, which the model gets as sign(x) · log(1 + |x|).

    Attributes:
        expected: the values that are read, for messages.
        width: numbers that the model gets for each value.
    """

    expected: ClassVar[str] = "numbers"
    dtype: ClassVar[type] = np.float32
    width: ClassVar[int] = 1

    def accepts(self, value: pa.DataType) -> bool:
        """Whether columns, or tensors of a request to the server, may hold values of a type."""
        whole = pa.types.is_integer(value) or pa.types.is_boolean(value)
        return whole or pa.types.is_floating(value) or pa.types.is_decimal(value)

    def read(self, values: pa.Array) -> np.ndarray:
        """Numbers (n,) float32 of values (n,) of an accepted type without nulls."""
        return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)

    def transform(self, numbers: Tensor) -> Tensor:
        """What the model gets of numbers (n,): (n, width) float32."""
        return (numbers.sign() * numbers.abs().log1p())[:, None]


@dataclass(frozen=True)
class Feature:
    """A further column.

    Args:
        name: of the column.
        kind: what it holds.
    """

    name: str
    kind: Ids | Numbers

    @property
    def role(self) -> Role:
        """What it says something of: each candidate, each behavior, or the request."""
        parallel: tuple[Role, ...] = ("candidate", "behavior")
        return next((role for role in parallel if self.name.startswith(f"{role}_")), "request")


@dataclass(frozen=True, kw_only=True)
class Features:
    """Further columns.

    Args:
        sparse: names of columns of `Ids`.
        dense: names of columns of `Numbers`.
        buckets: names of columns of `Buckets`, with their boundaries, as "0,10,100".
        other: names of columns of any other kind, with `package.module:ClassName` of the kind.
        second_label: name of a second label, whose column is `labels_<name>`; None for none.

    Raises:
        OptionError: a name is there twice, a column of every request has it, or there is no such kind.

    >>> features = Features(sparse=("city", "candidate_brand"), dense=("candidate_price",))
    >>> [feature.name for feature in features.ids("request")]
    ['city']
    """

    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    buckets: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    second_label: str | None = None

    def __post_init__(self) -> None:
        names = (*self.sparse, *self.dense, *self.buckets, *self.other)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise OptionError(f"features named more than once: {', '.join(repeated)}")
        if reserved := sorted({*RESERVED, self.label_column}.intersection(names)):
            raise OptionError(f"{', '.join(reserved)}: requests have it anyway, it is no further feature")
        for boundaries in self.buckets.values():
            Buckets.parse(boundaries)
        for name, kind in self.other.items():
            if not issubclass(load_class(kind), Ids | Numbers):
                raise OptionError(
                    f"{kind!r} of the feature {name} is neither Ids nor Numbers of data.features"
                )

    @cached_property
    def by_name(self) -> dict[str, Feature]:
        """All of them."""
        kinds = (dict.fromkeys(self.sparse, Ids()) | dict.fromkeys(self.dense, Numbers())
                 | {name: Buckets.parse(text) for name, text in self.buckets.items()}
                 | {name: load_class(kind)() for name, kind in self.other.items()})  # fmt: skip
        return {name: Feature(name, kind) for name, kind in kinds.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)

    @property
    def label_column(self) -> str | None:
        """The column of the second label."""
        return None if self.second_label is None else f"labels_{self.second_label}"

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return self.names if self.label_column is None else (*self.names, self.label_column)

    def ids(self, role: Role) -> tuple[Feature, ...]:
        """Those of requests, candidates or behaviors that have a vocabulary and an embedding table."""
        return self._select(Ids, role)

    def numbers(self, role: Role) -> tuple[Feature, ...]:
        """Those of requests, candidates or behaviors whose numbers the model gets."""
        return self._select(Numbers, role)

    def of(self, role: Role) -> tuple[Feature, ...]:
        """Those of requests, candidates or behaviors."""
        return tuple(feature for feature in self.by_name.values() if feature.role == role)

    def _select(self, kind: type, role: Role) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.of(role) if isinstance(feature.kind, kind))

    def width(self, *roles: Role) -> int:
        """Numbers that the model gets for a request, a candidate or a behavior, or for several of them."""
        numbers = (feature.kind for role in roles for feature in self.numbers(role))
        return sum(kind.width for kind in numbers if isinstance(kind, Numbers))

    def check(self, parquet: TableFile, file: str | Path | Url) -> None:
        """See that a file of requests has the columns, and numbers if it has weights or a second label.

        Raises:
            DataError: a column is missing or of another type, or holds something else than that of another
                file of the data set.
        """
        schema = parquet.schema_arrow
        _check_weights(schema, file)
        if self.label_column is not None:
            _check_present(self.label_column, schema, file)
            _check_lists(self.label_column, schema, file)
        for name, feature in self.by_name.items():
            _check_present(name, schema, file)
            found = schema.field(name).type
            if pa.types.is_null(found):
                continue
            parallel = feature.role != "request"
            one_a_request = isinstance(feature.kind, Numbers) and not parallel
            form_fits = not (parallel or one_a_request) or is_list(found) == parallel
            if not form_fits or not feature.kind.accepts(value_type(found)):
                form = "one a request" if one_a_request else "or lists of them"
                form = f"one a {feature.role}" if parallel else form
                remedy = "convert the column, or use the other of --sparse-features and --dense-features"
                problem = f"expected {feature.kind.expected}, {form}; found {found}; {remedy}"
                raise DataError(problem, file=file, column=name)
        ids = {name: name for name, feature in self.by_name.items() if isinstance(feature.kind, Ids)}
        parquet.conventions.compare(schema, file, ids)


def _check_weights(schema: pa.Schema, file: str | Path | Url) -> None:
    both = [name for name in (WEIGHT, WEIGHTS) if schema.get_field_index(name) >= 0]
    if len(both) > 1:
        raise DataError(f"is there beside {WEIGHT}; drop one of the two", file=file, column=WEIGHTS)
    for name in both:
        _check_lists(name, schema, file)


def _check_present(name: str, schema: pa.Schema, file: str | Path | Url) -> None:
    if schema.get_field_index(name) < 0:
        there = ", ".join(schema.names)
        problem = f"the column is missing; add it, or name columns that are there: {there}"
        raise DataError(problem, file=file, column=name)


def _check_lists(name: str, schema: pa.Schema, file: str | Path | Url) -> None:
    """See that a column has a number for each candidate, that of weights of requests one for each request."""
    found = schema.field(name).type
    fits = is_list(found) == (name != WEIGHT) and Numbers().accepts(value_type(found))
    if not (fits or pa.types.is_null(found)):
        form = "one number a request" if name == WEIGHT else "a list of numbers, one a candidate"
        raise DataError(f"expected {form}; found {found}; convert the column", file=file, column=name)


NO_FEATURES = Features()


def model_numbers(features: Sequence[Feature], values: Mapping[str, Tensor]) -> Tensor | None:
    """What the model gets of features of numbers, side by side.

    Args:
        features: from `Features.numbers`.
        values: (n,) numbers as read, by name.

    Returns:
        (n, sum of the widths) float32, None without features.
    """
    if not features:
        return None
    return torch.cat(
        [f.kind.transform(values[f.name]) for f in features if isinstance(f.kind, Numbers)], dim=1
    )
