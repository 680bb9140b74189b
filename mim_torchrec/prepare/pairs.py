"""Pairs <image query, item> (§3.3): what was bought, or clicked, out of a search with an image."""

import ibis
from ibis import _
from ibis.expr.types import Table

from mim_torchrec.prepare.events import between
from mim_torchrec.prepare.labels import last_before


def distinct_searches(searches: Table) -> Table:
    """Searches, one row an id, from its first copy; without those whose id two users have."""
    one = searches.group_by("request").agg(
        user=_.user.min(), last_user=_.user.max(), ts=_.ts.min(), image=_.image.min()
    )
    return one.filter(_.user == _.last_user).drop("last_user")


def pairs(
    searches: Table, actions: Table, *, window: int, before: int, by_request: bool, signal: str
) -> Table:
    """Pairs of a search and the item of an action out of it.

    Args:
        searches: see :func:`distinct_searches`.
        actions: `item`, `user`, `ts`, `category`, and with `by_request` also `request`.
        window: microseconds after the search, the end included.
        before: an action at or after this time is left out.
        by_request: actions name their search; otherwise one belongs to the last search of its user.
        signal: of the pairs, "purchase" or "click".

    Returns:
        `request` of the search, `item`, `ts` of the search, `image`, `category`, `signal`; one row a search
        and item.
    """
    early = actions.filter(actions.ts < before)
    if by_request:
        found = early.inner_join(
            searches.select("request", "image", search_user="user", searched_at="ts"), "request"
        )
        found = found.filter(found.user == found.search_user)
    else:
        marked = last_before(early.drop("request") if "request" in early.columns else early,
                             searches.select("user", "ts"), ["user"])  # fmt: skip
        places = searches.group_by("user", "ts").agg(request=_.request.min(), image=_.image.min())
        found = marked.inner_join(
            places.select("request", "image", "user", searched_at="ts"),
            [marked.user == places.user, marked.shown_at == places.ts],
        )
    inside = found.filter(between(found.ts - found.searched_at, 0, window))
    one = inside.group_by("request", "item").agg(
        ts=_.searched_at.min(), image=_.image.min(), category=_.category.min()
    )
    return one.mutate(signal=ibis.literal(signal))
