"""The behaviors of a user before a request, cut out of a log of all behaviors."""

import numpy as np


def histories(
    user: np.ndarray,
    item: np.ndarray,
    ts: np.ndarray,
    of_user: np.ndarray,
    before: np.ndarray,
    max_behaviors: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last behaviors of each request's user strictly before it.

    Behaviors of one user at the same time keep the order in which they are given.

    Args:
        user: (num_behaviors,) whose behavior it is, not negative.
        item: (num_behaviors,) what it was with.
        ts: (num_behaviors,) when it was.
        of_user: (num_requests,) whose request it is.
        before: (num_requests,) when the request was, in the unit of `ts`.
        max_behaviors: the most that a request gets.

    Returns:
        lengths (num_requests,), and flat over all requests, in order of time, items and times.

    >>> histories(*map(np.array, ([1, 1, 2], [7, 8, 9], [10, 20, 10], [1, 2], [20, 10])), 5)
    (array([1, 0]), array([7]), array([10]))
    """
    order = np.lexsort((ts, user))
    user, item, ts = user[order], item[order], ts[order]
    moments = np.unique(ts)
    span = len(moments) + 1
    key = user.astype(np.int64) * span + np.searchsorted(moments, ts)
    stops = np.searchsorted(key, of_user.astype(np.int64) * span + np.searchsorted(moments, before))
    starts = np.maximum(np.searchsorted(user, of_user), stops - max_behaviors)
    lengths = stops - starts
    index = np.repeat(stops - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
    return lengths, item[index], ts[index]
