"""Positives of users, such as purchases, as requests: sampled negatives, histories, and pairs for C-SFT.

What importers of public data share. Such data says what users took, and not what they were shown. Each
positive becomes a request: it stands among items that the user never took, drawn by how often others took
them in the training part.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from mim_torchrec.data.histories import histories
from mim_torchrec.data.schema import PAIRS, REQUESTS, TIME
from mim_torchrec.data.writing import lists
from mim_torchrec.errors import OptionError

MOST_DRAWS = 1000
Split = Literal["user", "global"]


@dataclass(frozen=True)
class Positives:
    """Positives in order of time: places of user and item among ids, ts (us), part (0, 1, 2), each (n,)."""

    user: np.ndarray
    item: np.ndarray
    ts: np.ndarray
    part: np.ndarray

    def take(self, rows: np.ndarray) -> "Positives":
        """Some of them, in their order."""
        return Positives(self.user[rows], self.item[rows], self.ts[rows], self.part[rows])


def parts_of(user: np.ndarray, ts: np.ndarray, split: Split) -> np.ndarray:
    """Training, validation or test (0, 1, 2) of positives in order of time: 80, 10 and 10 percent.

    Args:
        user: (n,) from 0.
        ts: (n,) ascending.
        split: "user" divides those of every user, "global" those of all at two common times.
    """
    if split == "user":
        count = np.bincount(user)
        by_user = np.argsort(user, kind="stable")
        place = np.empty(len(user), np.int64)
        place[by_user] = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
        of = count[user]
    else:
        place = np.searchsorted(ts, ts)  # those of one moment stay together
        of = np.full(len(ts), len(ts))
    found: np.ndarray = (place >= of * 8 // 10).astype(np.int64) + (place >= of * 9 // 10)
    return found


def draw_negatives(
    positives: Positives,
    seen: np.ndarray,
    users: np.ndarray,
    popularity: np.ndarray,
    count: int,
    rng: np.random.Generator,
    took: str = "taken",
) -> np.ndarray:
    """Items that the user of each positive has never taken, by how often they were taken in training.

    Args:
        positives: n positives.
        seen: (num_seen,) user * num_items + item of all that users have taken, or know.
        users: ids of the users, for the message.
        popularity: (num_items,) training positives of each item.
        count: how many, all different.
        rng: source of the draws.
        took: what users did with items, for the message.

    Returns:
        (n, count).

    Raises:
        OptionError: a user has taken too many items to leave that many.
    """
    cumulative = np.cumsum(popularity)
    seen = np.unique(seen)
    drawn = np.full((len(positives.user), count), -1)
    todo = np.ones(drawn.shape, bool)
    for _ in range(MOST_DRAWS):
        point = rng.integers(cumulative[-1], size=int(todo.sum()))
        drawn[todo] = np.searchsorted(cumulative, point, side="right")
        key = positives.user[:, None] * len(popularity) + drawn
        position = np.searchsorted(seen, key).clip(max=len(seen) - 1)
        todo = seen[position] == key
        for k in range(1, count):
            todo[:, k] |= (drawn[:, :k] == drawn[:, k : k + 1]).any(axis=1)
        if not todo.any():
            return drawn
    user = users[positives.user[np.flatnonzero(todo.any(axis=1))[0]]]
    raise OptionError(
        f"user {user} has {took} nearly all items that were {took} at all: {count} negatives are not left; "
        "lower --negatives"
    )


def requests_table(
    positives: Positives,
    negatives: np.ndarray,
    users: np.ndarray,
    items: np.ndarray,
    categories: np.ndarray | None,
    max_behaviors: int,
    rng: np.random.Generator,
    first_id: int = 1,
) -> pa.Table:
    """One request a positive, in order of time; the positive is at a random place among the candidates.

    Args:
        positives: n positives, all of the users that they are of.
        negatives: (n, count) from `draw_negatives`.
        users: ids of users.
        items: ids of items.
        categories: of items; None where there are none.
        max_behaviors: longest history.
        rng: source of the places.
        first_id: of the requests, which are numbered.
    """
    count, shown = len(positives.user), negatives.shape[1] + 1
    place = rng.permuted(np.tile(np.arange(shown), (count, 1)), axis=1)
    candidates = np.take_along_axis(np.column_stack([positives.item, negatives]), place, axis=1).reshape(-1)
    lengths, behaviors, behavior_ts = histories(
        positives.user, positives.item, positives.ts, positives.user, positives.ts, max_behaviors
    )
    of_request = np.full(count, shown)
    columns = {
        "request_id": pa.array(np.arange(first_id, first_id + count)),
        "user_id": users[positives.user],
        "ts": moments(positives.ts),
        "behavior_item_ids": lists(items[behaviors], lengths, pa.int64()),
        "behavior_ts": lists(moments(behavior_ts), lengths, TIME),
        "candidate_item_ids": lists(items[candidates], of_request, pa.int64()),
        "labels": lists((place == 0).reshape(-1).astype(np.int8), of_request, pa.int8()),
    }
    if categories is not None:
        columns["behavior_categories"] = lists(categories[behaviors], lengths, pa.string())
        columns["candidate_categories"] = lists(categories[candidates], of_request, pa.string())
    names = [name for name in REQUESTS.names if name in columns]
    return pa.table([columns[name] for name in names], schema=pa.schema([REQUESTS.field(n) for n in names]))


def pairs_table(positives: Positives, items: np.ndarray) -> pa.Table:
    """Each training positive but a user's first, with the one before it as the query."""
    train = np.flatnonzero(positives.part == 0)
    by_user = train[np.argsort(positives.user[train], kind="stable")]
    same = positives.user[by_user[1:]] == positives.user[by_user[:-1]]
    bought = by_user[1:][same]
    order = np.argsort(bought, kind="stable")  # positives are in order of time
    bought, query = bought[order], by_user[:-1][same][order]
    return pa.table(
        [
            pa.nulls(len(bought), pa.binary()),
            items[positives.item[query]],
            items[positives.item[bought]],
            pa.nulls(len(bought), pa.int64()),
            pa.array(["purchase"] * len(bought)),
            moments(positives.ts[bought]),
        ],
        schema=PAIRS,
    )


def moments(microseconds: np.ndarray) -> pa.Array:
    """Times of the schema."""
    return pa.array(microseconds).cast(TIME)
