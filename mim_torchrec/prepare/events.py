"""Rules for events: what is incomplete, which copies are one event, and which item they are of.

All tables here and in the modules beside are relational expressions of Ibis. DuckDB and Spark run the same.
Times are microseconds since 1970 (UTC).
"""

from collections.abc import Sequence

import ibis
from ibis import _
from ibis.expr.types import BooleanValue, Table

NO_CATEGORY = -1


def complete(raw: Table, needed: Sequence[str]) -> Table:
    """Events that have everything that is needed."""
    return raw.filter([raw[name].notnull() for name in needed])


def once(events: Table, by_id: bool) -> Table:
    """One row of each event, known as early as its first copy was.

    Args:
        events: at least `known_at`, `ts`, `user`; with `by_id` also `id`.
        by_id: copies share an `id`, and the first one to be known counts; otherwise they are equal in all
            columns but `known_at`.
    """
    if not by_id:
        keys = [name for name in events.columns if name != "known_at"]
        return events.group_by(keys).agg(known_at=_.known_at.min())
    order = dict.fromkeys(("known_at", "ts", *events.columns))
    by = [events[name] for name in order if name != "id"]
    copy = ibis.row_number().over(ibis.window(group_by="id", order_by=by))
    return events.mutate(copy=copy).filter(_.copy == 0).drop("copy", "id")


def shown_items(impressions: Table) -> Table:
    """Items of each request: one row a request and item, from the first time that it was shown.

    Returns:
        `request`, `item`, `user`, `last_user` (another one where a request has two), `ts`, and `position` and
        `query` where impressions have them.
    """
    more = {name: _[name].min() for name in ("position", "query") if name in impressions.columns}
    return impressions.group_by("request", "item").agg(
        user=_.user.min(), last_user=_.user.max(), ts=_.ts.min(), **more
    )


def of_known_items(events: Table, catalog: Table, versions: bool) -> Table:
    """Events whose item is in the catalogue, with the category that it had at the time.

    Args:
        events: with `item` and `ts`.
        catalog: `item`, `category`, and with `versions` also `valid_from` and `version` (1, 2, … of an item
            in order of time).
        versions: whether an item has several. An event before the first one has the category -1.
    """
    if not versions:
        return events.inner_join(catalog.select("item", "category"), "item")
    known = events.semi_join(catalog, "item")
    numbered = as_of(known, catalog.select("item", at="valid_from"))
    found = numbered.left_join(
        catalog.select("item", "version", "category"),
        [numbered.item == catalog.item, numbered.version == catalog.version],
    )
    category = found.category.fill_null(NO_CATEGORY).cast("int32")
    return found.select(*(found[name] for name in events.columns), category=category)


def with_categories(events: Table, catalog: Table, versions: bool) -> Table:
    """Events with the category that their item had at the time, null where the catalogue has no such item.

    Args:
        events: see :func:`of_known_items`.
        catalog: likewise.
        versions: likewise.
    """
    if versions:
        known = of_known_items(events, catalog, versions)
        return known.union(events.anti_join(catalog, "item").mutate(category=ibis.null("int32")))
    found = events.left_join(catalog.select("item", "category"), "item")
    return found.select(*(found[name] for name in events.columns), "category")


def as_of(events: Table, versions: Table) -> Table:
    """Events with the number of versions of their item that had begun.

    A running count over versions and events in one order: no join of ranges is needed.

    Args:
        events: with `item` and `ts`.
        versions: `item`, `at`.

    Returns:
        The columns of `events` and `version` (int64), 0 before the first.
    """
    others = [name for name in events.columns if name not in ("item", "ts")]
    nothing = {name: ibis.null(events[name].type()) for name in others}
    marks = versions.select("item", ts="at", **nothing, is_event=ibis.literal(0, "int8"))
    both = marks.union(events.select("item", "ts", *others, is_event=ibis.literal(1, "int8")))
    mark = both.is_event.nullif(1)
    counted = both.mutate(version=mark.count().over(running("item", [both.ts, both.is_event])))
    return counted.filter(_.is_event == 1).drop("is_event")


def running(group: str | list[str], order: Sequence[ibis.Value]) -> ibis.expr.builders.WindowBuilder:
    """From the first row of a group to this one."""
    return ibis.window(group_by=group, order_by=list(order), preceding=None, following=0)


def between(value: ibis.Value, first: int, last: int) -> BooleanValue:
    """Whether an integer lies between two, both included."""
    return (value >= first) & (value <= last)
