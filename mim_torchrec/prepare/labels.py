"""Which action follows from which request, and what that makes a label.

An action that names its request belongs to that request's impression of its item. Where actions name none,
one belongs to the last time before it that its user was shown the item.
"""

import ibis
from ibis import _
from ibis.expr.types import Table

from mim_torchrec.prepare.events import between, running


def attributed(actions: Table, shown: Table, by_request: bool) -> Table:
    """Actions with the time at which their item was shown.

    Args:
        actions: `item`, `user`, `ts`, and with `by_request` also `request`.
        shown: see `events.shown_items`.
        by_request: whether actions name their request.

    Returns:
        The columns of `actions` and `shown_at`, null where nothing was shown; with `by_request` also
        `shown_to`, the user.
    """
    if by_request:
        places = shown.select("request", "item", shown_at="ts", shown_to="user")
        found = actions.left_join(places, ["request", "item"])
        return found.select(*(found[name] for name in actions.columns), "shown_at", "shown_to")
    return last_before(actions, shown.select("user", "item", "ts"), ["user", "item"])


def last_before(actions: Table, marks: Table, keys: list[str]) -> Table:
    """Actions with the time of the last mark of the same keys, at or before them.

    Args:
        actions: with the keys and `ts`.
        marks: the keys and `ts`.
        keys: columns that must agree.

    Returns:
        The columns of `actions` and `shown_at`, null where there is none.
    """
    others = [name for name in actions.columns if name not in (*keys, "ts")]
    nothing = {name: ibis.null(actions[name].type()) for name in others}
    both = marks.select(*keys, "ts", **nothing, is_action=ibis.literal(0, "int8")).union(
        actions.select(*keys, "ts", *others, is_action=ibis.literal(1, "int8"))
    )
    mark = ibis.ifelse(both.is_action == 0, both.ts, ibis.null("int64"))
    found = both.mutate(shown_at=mark.max().over(running(keys, [both.ts, both.is_action])))
    chosen = found.filter(_.is_action == 1)
    return chosen.select(*(chosen[name] for name in actions.columns), "shown_at")


def not_early(found: Table) -> Table:
    """Attributed actions without those before their own impression, which clocks that differ produce.

    As a behavior such an action would tell a request its own label.
    """
    return found.filter(_.shown_at.isnull() | (_.ts >= _.shown_at))


def hits(shown: Table, found: Table, window: int, by_request: bool) -> Table:
    """Shown items that an action follows within a window, its end included.

    Args:
        shown: see `events.shown_items`.
        found: see :func:`attributed`.
        window: microseconds.
        by_request: as in :func:`attributed`.

    Returns:
        `request`, `item`, `user`, `ts` of the shown items, and `at`, the time of the first such action.
    """
    inside = found.filter(found.shown_at.notnull() & between(found.ts - found.shown_at, 0, window))
    if by_request:
        return inside.group_by("request", "item").agg(
            at=_.ts.min(), user=_.shown_to.min(), ts=_.shown_at.min()
        )
    first = inside.group_by("user", "item", "shown_at").agg(at=_.ts.min())
    joined = shown.inner_join(
        first, [shown.user == first.user, shown.item == first.item, shown.ts == first.shown_at]
    )
    return joined.select("at", **{name: shown[name] for name in ("request", "item", "user", "ts")})


def followed(hit: Table, found: Table, window: int, by_request: bool) -> Table:
    """Hits that an action of another kind follows: not before the first action, and within a window after it.

    Args:
        hit: see :func:`hits`.
        found: actions of the other kind, see :func:`attributed`.
        window: microseconds, the end included.
        by_request: as in :func:`attributed`, of the other kind.

    Returns:
        `request`, `item`.
    """
    if by_request:
        later = found.filter(found.shown_at.notnull()).select("request", "item", then="ts")
        joined = hit.inner_join(later, ["request", "item"])
    else:
        later = found.filter(found.shown_at.notnull()).select("user", "item", "shown_at", then="ts")
        joined = hit.inner_join(
            later, [hit.user == later.user, hit.item == later.item, hit.ts == later.shown_at]
        )
    inside = joined.filter(between(joined.then - joined["at"], 0, window))
    return inside.select(request=inside.request, item=inside["item"]).distinct()


def labelled(shown: Table, hit: Table, name: str) -> Table:
    """Shown items with a column (int8) that is 1 where `request` and `item` are among the hits, each once."""
    marked = hit.select("request", "item", hit=ibis.literal(1, "int8"))
    joined = shown.left_join(marked, ["request", "item"])
    return joined.select(
        *(joined[column] for column in shown.columns), **{name: joined.hit.fill_null(0).cast("int8")}
    )


def gathered(shown: Table) -> Table:
    """Requests of shown items.

    Returns:
        `request`, `user`, `last_user`, `ts` and `last_ts` (of the first and the last item), `candidates`, and
        `query` where shown items have it.
    """
    more = {"query": _.query.min()} if "query" in shown.columns else {}
    return shown.group_by("request").agg(
        user=_.user.min(),
        last_user=_.last_user.max(),
        ts=_.ts.min(),
        last_ts=_.ts.max(),
        candidates=_.count(),
        **more,
    )


def with_one_user(requests: Table) -> Table:
    """Requests without those whose id more than one user has."""
    return requests.filter(_.user == _.last_user)


def old_enough(requests: Table, window: int, end: int) -> Table:
    """Requests whose label was certain when the log ended: at `end`, the window of every item was over."""
    return requests.filter(_.last_ts + window <= end)
