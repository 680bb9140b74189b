"""A large raw log, written day by day, so that its size does not matter: input of `make bench-prepare`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400_000_000
START = 20_635 * DAY  # 2026-07-01
SHOWN = 10
COPIES = 0.005

MAPPING = """\
name = "large"
[events.impression]
path = "events"
where = { event = "impression" }
request = "search_id"
user = "user_id"
item = "item_id"
ts = "ts"
[events.click]
path = "events"
where = { event = "click" }
request = "search_id"
user = "user_id"
item = "item_id"
ts = "ts"
[events.purchase]
path = "events"
where = { event = "purchase" }
request = "search_id"
user = "user_id"
item = "item_id"
ts = "ts"
[catalog]
path = "catalog.parquet"
item = "id"
title = "title"
category = "category"
listed_at = "listed_at"
"""


def write_large_log(root: Path, impressions: int, days: int, users: int, items: int) -> int:
    """Write a log: impressions in tens, clicks within minutes, purchases within days, copies of some.

    Users and items are drawn by Zipf's law: some users have thousands of clicks.

    Args:
        root: folder.
        impressions: about so many.
        days: over which they are spread evenly.
        users: how many there may be.
        items: in the catalogue; one impression in a thousand is of another.

    Returns:
        How many events there are.
    """
    rng = np.random.default_rng(0)
    category = rng.integers(0, 40, items)
    root.mkdir(parents=True)
    pq.write_table(pa.table({
        "id": np.arange(items), "title": [f"item {k}" for k in range(items)],
        "category": [f"category {k}" for k in category],
        "listed_at": pa.array(np.full(items, START - 30 * DAY)).cast(pa.timestamp("us")),
    }), root / "catalog.parquet")  # fmt: skip
    (root / "prepare.toml").write_text(MAPPING)
    requests, total, first = impressions // SHOWN // days, 0, 0
    bought_later: list[pa.Table] = []
    for day in range(days):
        user = _zipf(users, requests, rng)
        ts = START + day * DAY + np.sort(rng.integers(0, DAY, requests))
        row = np.repeat(np.arange(requests), SHOWN)
        item = _zipf(items, len(row), rng)
        item = np.where(rng.random(len(row)) < 0.001, items + 1, item)
        clicked = np.flatnonzero(rng.random(len(row)) < 0.03 + 0.1 * (category[item % items] < 8))
        click_ts = ts[row[clicked]] + rng.integers(10**6, 600 * 10**6, len(clicked))
        bought = np.flatnonzero(rng.random(len(clicked)) < 0.1)
        bought_ts = click_ts[bought] + rng.integers(10**9, DAY, len(bought))
        search = first + row
        parts = [
            _events("impression", user[row], item, ts[row], search),
            _events("click", user[row[clicked]], item[clicked], click_ts, search[clicked]),
            *bought_later,
        ]
        of = clicked[bought]
        bought_later = [_events("purchase", user[row[of]], item[of], bought_ts, search[of])]
        events = pa.concat_tables(parts)
        events = pa.concat_tables(
            [events, events.take(pa.array(np.flatnonzero(rng.random(len(events)) < COPIES)))]
        )
        folder = root / "events" / f"dt={np.datetime64((START + day * DAY) // DAY, 'D')}"
        folder.mkdir(parents=True)
        pq.write_table(events, folder / "part-0.parquet", compression="zstd")
        total, first = total + len(events), first + requests
    return total


def _events(name: str, user: np.ndarray, item: np.ndarray, ts: np.ndarray, search: np.ndarray) -> pa.Table:
    return pa.table({
        "event": pa.array([name]).take(pa.array(np.zeros(len(user), np.int8))),
        "user_id": user, "item_id": item, "ts": pa.array(ts).cast(pa.timestamp("us")), "search_id": search,
    })  # fmt: skip


def _zipf(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers below `count` by a law near Zipf's, in mixed order."""
    rank = np.exp(rng.random(size) * np.log(count)).astype(np.int64) - 1
    spread = np.where(rng.random(size) < 0.5, rank, rng.integers(0, count, size))
    return (spread * 7919) % count
