"""Point-in-time histories: the last N behaviors of a user that were known at each request.

How many behaviors were known is a running count over behaviors and requests in one order: no join of ranges.
The last N of them are a slice of the user's behaviors in that order, which `behaviors.py` cuts out.
"""

import ibis
from ibis import _
from ibis.expr.types import Table

from mim_torchrec.prepare.events import running


def numbered(behaviors: Table, requests: Table) -> Table:
    """Behaviors and requests in the order in which the serving system learns of them.

    At one moment requests come first: what is known is strictly earlier.

    Args:
        behaviors: `user`, `item`, `ts`, `known_at`, `category`, `kind` (int8).
        requests: `request`, `user`, `ts`.

    Returns:
        Of both, `is_behavior` (int8) and `count` (int64): of a behavior its number among those of its user,
        from 1, of a request how many were known.
    """
    item, request = behaviors.item.type(), requests.request.type()
    one = behaviors.select(
        "user", "item", "ts", "category", "kind", at="known_at", request=ibis.null(request),
        is_behavior=ibis.literal(1, "int8"),
    )  # fmt: skip
    other = requests.select(
        "user", item=ibis.null(item), ts="ts", category=ibis.null("int32"), kind=ibis.null("int8"), at="ts",
        request="request", is_behavior=ibis.literal(0, "int8"),
    )  # fmt: skip
    both = one.union(other)
    order = [both.at, both.is_behavior, both.ts, both.item, both.kind]
    return both.mutate(count=both.kind.count().over(running("user", order)))  # kind is null in requests


def known_counts(both: Table) -> Table:
    """`request` and `known`: how many behaviors of its user were known."""
    return both.filter(_.is_behavior == 0).select("request", known="count")


def in_order(both: Table) -> Table:
    """Behaviors, those of a user one after the other in the order in which they became known."""
    behaviors = both.filter(_.is_behavior == 1).order_by(_.user, _["count"])
    return behaviors.select("user", "item", "ts", "category", "kind")
