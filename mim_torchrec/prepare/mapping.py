"""Which file and column holds what: the mapping file of `mim prepare`, in TOML.

name = "my-shop"

[ids]                          # "int64": kept as they are; "text": numbers by a stable hash
user = "text"

[events.impression]
path = "impressions"           # a file, a folder, a pattern, a URL, or a list; relative to this file
request = "search_id"
user = "user_id"
item = "item_id"
ts = "shown_at"

[events.click]
...

[catalog]
path = "catalog.csv"
item = "id"
"""

import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mim_torchrec.errors import OptionError
from mim_torchrec.toml_files import Place, Strict, explained, read_toml

IdKind = Literal["int64", "text"]
Unit = Literal["s", "ms", "us", "ns"]
Value = str | int | bool
ACTIONS = ("click", "purchase")


class MappingError(OptionError):
    """A mapping file is wrong; the message names the file and the place."""


class Ids(Strict):
    """How ids are kept: "int64" as they are, "text" by a stable 64-bit hash of their text."""

    user: IdKind = "int64"
    item: IdKind = "int64"
    request: IdKind = "int64"
    query: IdKind = "int64"


class Source(Strict):
    """Files of one table.

    Args:
        path: a file, a folder with files at any depth, a pattern, a URL, or a list of them.
        where: only rows whose columns have these values, such as `{ event = "click" }`.
        timezone: zone of times that have none, such as "Europe/Berlin".
        time_unit: of times that are integers since 1970-01-01 UTC.
    """

    path: str | list[str]
    where: dict[str, Value] = Field(default_factory=dict)
    timezone: str | None = None
    time_unit: Unit | None = None

    @field_validator("timezone")
    @classmethod
    def _is_a_zone(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                zoneinfo.ZoneInfo(name)
            except (zoneinfo.ZoneInfoNotFoundError, ValueError):
                raise ValueError(f'{name!r} is no time zone; write one such as "Europe/Berlin"') from None
        return name


class Events(Source):
    """Events of one kind; every other value is the name of a column.

    Args:
        user: who.
        ts: when it happened.
        request: the request or search that it belongs to.
        id: of the event; copies that were delivered more than once share it, and an event without one is
            incomplete. Where none is mapped, copies are equal in all mapped columns but `arrived`.
        arrived: when the log got the event; before that it was not known to anyone.
    """

    user: str
    ts: str
    request: str | None = None
    id: str | None = None
    arrived: str | None = None


class Actions(Events):
    """Clicks or purchases: events of an item."""

    item: str


class Impressions(Actions):
    """Items that were shown, one a row.

    Args:
        position: of the item in the request; candidates stand in this order, without it in that of item ids.
        query: what was asked for; becomes `query_id`, 0 where there is none.
    """

    position: str | None = None
    query: str | None = None


class ImageSearches(Events):
    """Searches with an image, each with an id.

    Args:
        request: id of the search; purchases and clicks out of it have the same.
        image: the image as bytes, as a path, or as a URL.
        images: folder or URL that paths are relative to; by default the folder of the mapping.
    """

    request: str
    image: str
    images: str | None = None


class EventTables(Strict):
    """The kinds of events."""

    impression: Impressions
    click: Actions | None = None
    purchase: Actions | None = None
    image_search: ImageSearches | None = None


class Catalog(Source):
    """The items.

    Args:
        item: id.
        title: text of the item.
        category: name or number.
        listed_at: when it was first offered.
        image: the image as bytes, as a path, or as a URL.
        images: folder or URL that paths are relative to; by default the folder of the mapping.
        valid_from: when a version of an item began; an event sees the version of its time.
    """

    item: str
    title: str | None = None
    category: str | None = None
    listed_at: str | None = None
    image: str | None = None
    images: str | None = None
    valid_from: str | None = None


class Mapping(Strict):
    """All of a mapping file."""

    name: str
    ids: Ids = Field(default_factory=Ids)
    events: EventTables
    catalog: Catalog

    @model_validator(mode="after")
    def _can_be_joined(self) -> Self:
        impression, search = self.events.impression, self.events.image_search
        if impression.request is None and self.ids.request != "text":
            raise ValueError('events.impression has no request; then ids.request must be "text"')
        for kind in ACTIONS:
            actions = self.actions(kind)
            if actions is None:
                continue
            if actions.request is not None and impression.request is None and search is None:
                raise ValueError(f"events.{kind}.request: nothing else has a request")
        return self

    def actions(self, kind: str) -> Actions | None:
        """Clicks or purchases, None where the log has none."""
        return self.events.click if kind == "click" else self.events.purchase

    def tables(self) -> Iterator[tuple[str, Source]]:
        """Every table with its place in the file."""
        for kind in EventTables.model_fields:
            source = getattr(self.events, kind)
            if source is not None:
                yield f"events.{kind}", source
        yield "catalog", self.catalog


def load_mapping(file: str | Path) -> Mapping:
    """Read and check a mapping file.

    Raises:
        MappingError: it is not TOML, a key is missing or unknown, or a value has the wrong type; the message
            names the file and the place.
    """
    path = Path(file)
    if not path.is_file():
        raise MappingError(f"{path}: no such file; `mim prepare --init DATA --mapping {path}` writes one")
    content = read_toml(path, MappingError)
    try:
        return Mapping.model_validate(content)
    except ValidationError as error:
        raise MappingError(f"{path}: {explained(error, _keys)}") from None


def columns_of(source: Source) -> dict[str, str]:
    """Columns that a table names, by the place of each in the mapping."""
    roles = source.model_fields_set - Source.model_fields.keys() - {"images"}
    named = {role: getattr(source, role) for role in sorted(roles)}
    return {role: column for role, column in named.items() if column is not None}


def _keys(place: Place) -> list[str]:
    """Keys that may stand where an unknown one does."""
    models: dict[str, type[Strict]] = {
        "impression": Impressions, "click": Actions, "purchase": Actions, "image_search": ImageSearches,
        "catalog": Catalog, "ids": Ids, "events": EventTables,
    }  # fmt: skip
    above = next((str(part) for part in reversed(place[:-1]) if str(part) in models), None)
    return list((models[above] if above else Mapping).model_fields)
