"""Point-in-time histories: the last N behaviors of a user that were known at each request.

How many behaviors were known is a running count over behaviors and requests in one order: no join of ranges.
The last N of them come from blocks. Block b of a user holds behaviors b N to (b + 2) N, so any N in a row lie
in one block, a request reads at most 2 N behaviors, and the work is linear however long a history is.
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


def ranked(both: Table) -> Table:
    """Behaviors with `rank`, their number from 0 among those of their user."""
    behaviors = both.filter(_.is_behavior == 1)
    return behaviors.select("user", "item", "ts", "category", "kind", rank=behaviors["count"] - 1)


def block_of(known: ibis.Value, length: int) -> ibis.Value:
    """The block that holds the last `length` of the first `known` behaviors."""
    return ibis.greatest(known - length, 0) // length


def blocks(behaviors: Table, wanted: Table, length: int) -> Table:
    """Blocks of behaviors as lists.

    Args:
        behaviors: see :func:`ranked`.
        wanted: `user`, `block` of the requests; other blocks are not made.
        length: of a history.

    Returns:
        `user`, `block`, `events`: structs of rank, item, ts, category, kind, in order of rank.
    """
    own = behaviors.mutate(block=behaviors["rank"] // length)
    before = own.filter(_.block > 0).mutate(block=_.block - 1)
    inside = own.union(before).semi_join(wanted, ["user", "block"])
    event = ibis.struct({name: inside[name] for name in ("rank", "item", "ts", "category", "kind")})
    return inside.group_by("user", "block").agg(events=event.collect().sort())


def with_histories(requests: Table, behaviors: Table, length: int) -> Table:
    """Requests with `events`, the last `length` known behaviors as a list of structs; null for none.

    Args:
        requests: with `user` and `known`.
        behaviors: see :func:`ranked`.
        length: of a history.
    """
    asked = requests.mutate(block=block_of(requests.known, length))
    wanted = asked.filter(_.known > 0).select("user", "block").distinct()
    made = blocks(behaviors, wanted, length)
    found = asked.left_join(made, ["user", "block"])
    first = found.block * length
    kept = found.events[ibis.greatest(found.known - length, 0) - first : found.known - first]
    events = ibis.ifelse(found.known > 0, kept, ibis.null(found.events.type()))
    return found.select(*(found[name] for name in requests.columns), events=events)
