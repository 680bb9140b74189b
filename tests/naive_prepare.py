"""The rules of `mim prepare` as loops over rows, written from their description."""

from typing import Any

from mim_torchrec.prepare.config import PrepareConfig
from tests.raw_logs import SECOND, Log, Rows

Requests = dict[int, dict[str, Any]]


def complete(rows: Rows, needed: tuple[str, ...]) -> Rows:
    return [row for row in rows if all(row[name] is not None for name in needed)]


def once(rows: Rows, arrived: bool) -> Rows:
    """Copies are equal in everything but the time of arrival; the first to arrive counts."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in sorted(row.items()) if name != "arrived")
        if key not in found or (arrived and row["arrived"] < found[key]["arrived"]):
            found[key] = row
    return list(found.values())


def category_at(log: Log, item: int, ts: int, versions: bool) -> str:
    """Of the last version that had begun; empty before the first."""
    own = [row for row in log.catalog if row["item"] == item]
    if versions:
        own = [row for row in own if row["valid_from"] <= ts]
    if not own:
        return ""
    return max(own, key=lambda row: row["valid_from"])["category"] or ""


def shown_once(log: Log, has_request: bool) -> Rows:
    """Items of each request, from the first time that each was shown."""
    known = {row["item"] for row in log.catalog}
    needed = ("request", "user", "item", "ts") if has_request else ("user", "item", "ts")
    first: dict[tuple, dict[str, Any]] = {}
    for row in complete(log.events["impression"], needed):
        request = row["request"] if has_request else f"{row['user']}@{row['ts']}"
        key = (request, row["item"])
        users = first[key]["users"] if key in first else set()
        if key not in first or row["ts"] < first[key]["ts"]:
            first[key] = row | {"request": request}
        first[key]["users"] = users | {row["user"]}
    return [row for row in first.values() if row["item"] in known]


def actions(log: Log, kind: str, config: PrepareConfig, arrived: bool) -> Rows:
    known = {row["item"] for row in log.catalog}
    rows = once(complete(log.events[kind], ("user", "item", "ts")), arrived)
    lag = config.log_lag * SECOND
    return [
        row | {"kind": kind, "known_at": (max(row["ts"], row["arrived"]) if arrived else row["ts"]) + lag}
        for row in rows if row["item"] in known
    ]  # fmt: skip


def shown_at(action: dict[str, Any], shown: Rows, by_request: bool) -> int | None:
    if by_request:
        found = [s["ts"] for s in shown if (s["request"], s["item"]) == (action["request"], action["item"])]
        return found[0] if found else None
    same = [s["ts"] for s in shown if (s["user"], s["item"]) == (action["user"], action["item"])]
    return max((ts for ts in same if ts <= action["ts"]), default=None)


def naive(
    log: Log, config: PrepareConfig, *, arrived: bool = True, versions: bool = False, has_request: bool = True
) -> Requests:
    """Requests by id, before any split and sampling."""
    shown = shown_once(log, has_request)
    by_kind = {kind: actions(log, kind, config, arrived) for kind in ("click", "purchase")}
    window = config.label_window * SECOND
    for kind, rows in by_kind.items():
        for row in rows:
            row["shown_at"] = None
            if has_request or kind in config.labels():
                row["shown_at"] = shown_at(row, shown, has_request)
        by_kind[kind] = [row for row in rows if row["shown_at"] is None or row["ts"] >= row["shown_at"]]
    end = max(row["ts"] for rows in log.events.values() for row in rows if row["ts"] is not None)
    behaviors = [row for kind in config.behaviors for row in by_kind[kind]]
    found: Requests = {}
    for request in {row["request"] for row in shown}:
        rows = [row for row in shown if row["request"] == request]
        users = set().union(*(row["users"] for row in rows))
        if len(users) > 1 or max(row["ts"] for row in rows) + config.certain_after() > end:
            continue
        ts, user = min(row["ts"] for row in rows), rows[0]["user"]
        rows.sort(key=lambda row: (row.get("position") or 0, row["item"]))
        history = [row for row in behaviors if row["user"] == user and row["known_at"] < ts]
        order = {"click": 0, "purchase": 1}
        history.sort(key=lambda row: (row["known_at"], row["ts"], row["item"], order[row["kind"]]))
        history = history[-config.max_behaviors :]
        history.sort(key=lambda row: row["ts"])
        found[request] = {
            "user_id": user,
            "ts": ts,
            "candidate_item_ids": [row["item"] for row in rows],
            "candidate_categories": [category_at(log, row["item"], row["ts"], versions) for row in rows],
            "labels": [label(row, by_kind[config.label], window, has_request) for row in rows],
            "behavior_item_ids": [row["item"] for row in history],
            "behavior_categories": [category_at(log, row["item"], row["ts"], versions) for row in history],
            "behavior_ts": [row["ts"] for row in history],
            "behavior_kinds": [row["kind"] for row in history],
        }
        if config.second_label is not None:
            found[request][f"labels_{config.second_label}"] = [
                second(row, by_kind, config, has_request) for row in rows
            ]
    return found


def label(shown: dict[str, Any], rows: Rows, window: int, has_request: bool) -> int:
    keys = ("request", "item") if has_request else ("user", "item")
    return int(any(
        row["shown_at"] == shown["ts"] and 0 <= row["ts"] - shown["ts"] <= window
        and all(row[key] == shown[key] for key in keys)
        for row in rows
    ))  # fmt: skip


def second(shown: dict[str, Any], by_kind: dict[str, Rows], config: PrepareConfig, has_request: bool) -> int:
    """Whether the second action follows the first one of the label, whose window is of its own."""
    keys = ("request", "item") if has_request else ("user", "item")
    same = {
        kind: [row["ts"] for row in rows
               if row["shown_at"] == shown["ts"] and all(row[key] == shown[key] for key in keys)]
        for kind, rows in by_kind.items()
    }  # fmt: skip
    first = [ts for ts in same[config.label] if 0 <= ts - shown["ts"] <= config.label_window * SECOND]
    later = [ts - min(first) for ts in same[config.second_label or ""] if first]
    return int(any(0 <= delay <= config.second_window * SECOND for delay in later))


def naive_pairs(log: Log, config: PrepareConfig, before: int) -> dict[tuple[int, int, str], int]:
    """(search, item, signal) → time of the search, for actions that name their search."""
    searches: dict[int, Rows] = {}
    for row in complete(log.events["image_search"], ("request", "user", "ts", "image")):
        searches.setdefault(row["request"], []).append(row)
    found = {}
    for kind in ("click", "purchase"):
        for row in actions(log, kind, config, False):
            same = searches.get(row["request"], [])
            if not same or len({s["user"] for s in same}) > 1 or same[0]["user"] != row["user"]:
                continue
            ts = min(s["ts"] for s in same)
            if row["ts"] < before and 0 <= row["ts"] - ts <= config.pair_window * SECOND:
                found[row["request"], row["item"], kind] = ts
    return found
