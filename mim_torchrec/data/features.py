"""Further columns of requests that a CTR model reads: sparse ids and dense numbers, by name.

A column whose name begins with `candidate_` says something of every candidate and is a list parallel to
`candidate_item_ids`. Any other says something of the request: a number, or for ids a number or a list, of
which the embeddings are averaged. A request without an id, null or an empty list, gets zeros; any other null
makes it malformed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import REQUESTS, is_list
from mim_torchrec.errors import OptionError

OF_CANDIDATES = "candidate_"
RESERVED = {
    *REQUESTS.names, "item_id", "category", "mm",
    *(f"{role}_{name}" for role in ("candidate", "behavior") for name in ("item_id", "category", "mm")),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Features:
    """Names of further columns.

    Args:
        sparse: of ids, integers or strings, each with a vocabulary and a table of its own.
        dense: of finite numbers, which models get as sign(x) · log(1 + |x|).

    Raises:
        OptionError: a name is there twice, or a column of every request has it.

    >>> features = Features(sparse=("city", "candidate_brand"), dense=("candidate_price",))
    >>> features.of_requests(features.sparse), features.of_candidates(features.sparse)
    (('city',), ('candidate_brand',))
    """

    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise OptionError(f"features named more than once: {', '.join(repeated)}")
        if reserved := sorted(RESERVED.intersection(names)):
            raise OptionError(f"{', '.join(reserved)}: requests have it anyway, it is no further feature")

    @property
    def names(self) -> tuple[str, ...]:
        return self.sparse + self.dense

    @staticmethod
    def of_requests(names: Sequence[str]) -> tuple[str, ...]:
        """Those of the names that say something of a request."""
        return tuple(name for name in names if not name.startswith(OF_CANDIDATES))

    @staticmethod
    def of_candidates(names: Sequence[str]) -> tuple[str, ...]:
        """Those of the names that say something of each candidate."""
        return tuple(name for name in names if name.startswith(OF_CANDIDATES))

    def check(self, parquet: pq.ParquetFile, file: str | Path) -> None:
        """See that a file of requests has the columns, with types that can be read.

        Raises:
            DataError: a column is missing or of another type.
        """
        schema = parquet.schema_arrow
        for name in self.names:
            if schema.get_field_index(name) < 0:
                there = ", ".join(schema.names)
                problem = f"the column is missing; add it, or name columns that are there: {there}"
                raise DataError(problem, file=file, column=name)
            found = schema.field(name).type
            is_dense, of_candidates = name in self.dense, name.startswith(OF_CANDIDATES)
            form_fits = is_list(found) == of_candidates or not (of_candidates or is_dense)
            value = found.value_type if is_list(found) else found
            if not form_fits or not (_is_dense(value) if is_dense else _is_sparse(value)):
                expected = "numbers" if is_dense else "integers or strings"
                form = "one a request" if is_dense else "or lists of them"
                form = "one a candidate" if of_candidates else form
                remedy = "convert the column, or use the other of --sparse-features and --dense-features"
                problem = f"expected {expected}, {form}; found {found}; {remedy}"
                raise DataError(problem, file=file, column=name)


NO_FEATURES = Features()


def _is_sparse(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return text or (pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _is_dense(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
