"""What all files of a data set have in common: the unit of integer times, and what compared columns hold.

Two columns that are compared must hold the same kind of thing. A time with a zone is an instant, one without
a zone may be of any place, and a date is a whole day. Comparing one with another would shift the check of the
history by hours, without a message. Likewise 7 and "7" are different ids and different categories. Times with
zones, whichever, and integer times are instants: they are compared in UTC.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.forms import PER_SECOND, holds_text, value_type
from mim_torchrec.data.ids import is_text_id
from mim_torchrec.embeddings.remote.places import Url, place

COMPARED: Mapping[str, str] = {
    "ts": "times", "behavior_ts": "times", "listed_at": "times of listing",
    "user_id": "users", "request_id": "requests", "query_id": "queries",
    "item_id": "items", "hard_negative_item_id": "items", "behavior_item_ids": "items",
    "candidate_item_ids": "items",
    "behavior_categories": "categories", "candidate_categories": "categories",
    "category": "categories of items",
}  # fmt: skip
"""Columns, and with which others each is compared: those of the same name."""
_REMEDIES = {
    "an instant": "write all as times in UTC",
    "a time without a zone": "write all as times in UTC",
    "a date": "write all as times in UTC",
    "text": "write all of one type",
    "integers": "write all of one type",
}


class Conventions:
    """What is known of a data set, and found to be the same in all files that were opened.

    Args:
        time_unit: of times that are integers since 1970 in UTC: "s", "ms", "us" or "ns"; None where times are
            not integers.

    Raises:
        DataError: there is no such unit.
    """

    def __init__(self, time_unit: str | None = None) -> None:
        if time_unit is not None and time_unit not in PER_SECOND:
            raise DataError(
                f"time_unit of dataset.json is {time_unit!r}, expected one of {', '.join(PER_SECOND)}"
            )
        self.time_unit = time_unit
        self._first: dict[str, tuple[str, Path | Url, str]] = {}

    def compare(
        self, schema: pa.Schema, file: str | Path | Url, columns: Mapping[str, str] = COMPARED
    ) -> None:
        """See that columns of a file hold what those hold that they are compared with.

        Args:
            schema: of the file.
            file: its path.
            columns: names of columns, and what each is compared with.

        Raises:
            DataError: they do not; the message names both columns and both files.
        """
        for column, group in columns.items():
            if (at := schema.get_field_index(column)) < 0:
                continue
            if (kind := kind_of(schema.field(at).type)) is None:
                continue
            if kind == "integers" and group.startswith("times"):
                kind = "an instant"  # since 1970 in UTC
            first = self._first.setdefault(group, (kind, place(file), column))
            if first[0] != kind:
                other = f"column {first[2]} of {first[1]}"
                problem = f"holds {kind}, but {other}, with which it is compared, holds {first[0]}"
                raise DataError(f"{problem}; {_REMEDIES[kind]}", file=file, column=column)


def kind_of(found: pa.DataType) -> str | None:
    """What values of a type are when they are compared, None where they say nothing (nulls) or anything.

    >>> kind_of(pa.timestamp("ms", "Asia/Shanghai")), kind_of(pa.list_(pa.uuid())), kind_of(pa.null())
    ('an instant', 'text', None)
    """
    found = value_type(found)
    if pa.types.is_timestamp(found):
        return "a time without a zone" if found.tz is None else "an instant"
    if pa.types.is_date(found):
        return "a date"
    if holds_text(found) or is_text_id(found):
        return "text"
    return "integers" if pa.types.is_integer(found) or pa.types.is_decimal(found) else None
