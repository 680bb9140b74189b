"""Point-in-time histories: the last N behaviors of a user that were known at each request.

The engine puts the behaviors in the order in which the serving system learned of them. What a request knows
are the first ones of its user; `behaviors.py` finds how many.
"""

from ibis.expr.types import Table


def in_order(behaviors: Table) -> Table:
    """Behaviors, those of a user one after the other in the order in which they became known.

    Args:
        behaviors: `user`, `item`, `ts`, `known_at`, `category`, `kind` (int8).
    """
    return behaviors.order_by("user", "known_at", "ts", "item", "kind")
