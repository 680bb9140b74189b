"""A small raw log with everything that goes wrong in one, and its files."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

SECOND = 1_000_000
START = 1_793_491_200 * SECOND  # 2026-11-01
Rows = list[dict[str, Any]]

TYPES = {
    "request": pa.int64(), "user": pa.int64(), "item": pa.int64(), "ts": pa.int64(), "arrived": pa.int64(),
    "position": pa.int64(), "query": pa.int64(), "title": pa.string(), "category": pa.string(),
    "listed_at": pa.int64(), "valid_from": pa.int64(), "image": pa.string(), "event": pa.string(),
}  # fmt: skip
EVENTS = {"impression": "impressions", "click": "clicks", "purchase": "purchases", "image_search": "searches"}


@dataclass
class Log:
    """Events by kind and the versions of the items, rows as dicts; times in microseconds."""

    events: dict[str, Rows]
    catalog: Rows


def make_log(requests: int = 150, users: int = 12, items: int = 30, seed: int = 0) -> Log:
    """Draw a log: ties, copies, events that arrive late or never in order, clocks that differ, unknown items.

    Times are whole seconds and close together, so that every limit is hit: clicks at the end of the window of
    3,600 seconds and a second later, requests at the moment at which a click becomes known.
    """
    r = random.Random(seed)
    events: dict[str, Rows] = {kind: [] for kind in EVENTS}

    def action(request: int | None, user: int, item: int, ts: int) -> dict[str, Any]:
        return {"request": request, "user": user, "item": item, "ts": ts,
                "arrived": ts + r.choice((0, 0, 0, 5, 30, 4000)) * SECOND}  # fmt: skip

    for request in range(1, requests + 1):
        user, ts = 100 + r.randrange(users), START + r.randrange(40_000) * SECOND
        shown = r.sample(range(items + 2), 5)  # the last two are in no catalogue
        for position, item in enumerate(shown):
            seen = ts + r.choice((0, 0, 1)) * SECOND
            events["impression"].append({
                "request": request, "user": user, "item": item, "ts": seen, "arrived": seen,
                "position": position, "query": request % 7,
            })  # fmt: skip
            if r.random() < 0.35:
                delay = r.choice((-2, 0, 1, 30, 59, 60, 61, 3599, 3600, 3601)) * SECOND
                named = request if r.random() < 0.9 else None
                events["click"].append(action(named, user, item, seen + delay))
                if r.random() < 0.4:
                    bought = seen + delay + r.choice((1, 100, 50_000)) * SECOND
                    events["purchase"].append(action(named, user, item, bought))
        if r.random() < 0.4:
            events["image_search"].append({"request": request, "user": user, "ts": ts, "arrived": ts,
                                           "image": f"{request}.jpg"})  # fmt: skip
    for kind, rows in events.items():
        copies = [dict(row) for row in r.choices(rows, k=max(2, len(rows) // 20))]
        for copy in copies[::2]:
            copy["arrived"] += 7 * SECOND  # a copy that was delivered again
        broken = [dict(row) for row in r.choices(rows, k=3)]
        broken[0]["user"] = broken[1]["ts"] = None
        if kind != "image_search":
            broken[2]["item"] = None
        else:
            broken[2]["request"] = None
        rows += copies + broken
        r.shuffle(rows)
    two_users = dict(next(row for row in events["impression"] if row["request"] == 3 and row["user"]))
    events["impression"].append(two_users | {"user": 999})
    catalog = [
        {"item": item, "title": f"item {item}", "category": f"c{item % 3}" if item % 10 else None,
         "listed_at": START - item * 1000 * SECOND, "valid_from": START - 10**12, "image": f"{item}.jpg"}
        for item in range(items)
    ]  # fmt: skip
    return Log(events, catalog)


def add_versions(log: Log) -> None:
    """Give some items a second category in the middle of the log, and some a first one that begins late."""
    for row in list(log.catalog):
        if row["item"] % 4 == 0:
            middle = START + (10_000 + 500 * row["item"]) * SECOND
            log.catalog.append(row | {"category": "moved", "valid_from": middle})
        if row["item"] % 4 == 1:
            row["valid_from"] = START + 5000 * SECOND


def table(rows: Rows, columns: list[str]) -> pa.Table:
    return pa.table({name: pa.array([row.get(name) for row in rows], TYPES[name]) for name in columns})


def write_log(
    log: Log, folder: Path, *, form: str = "parquet", text: bool = False, leave_out: tuple[str, ...] = (),
    versions: bool = False, images: Path | None = None,
) -> Path:  # fmt: skip
    """Write a log and its mapping.

    Args:
        log: the log.
        folder: to write to.
        form: "parquet" in folders of days, or "csv" with one file a kind.
        text: ids are text, such as "user-100".
        leave_out: columns of events that are not written, such as "arrived".
        versions: the catalogue has valid_from.
        images: folder of the images.

    Returns:
        The mapping.
    """
    kinds = {kind: rows for kind, rows in log.events.items() if rows}
    lines = ['name = "small"', "[ids]"]
    lines += [f'{role} = "{"text" if text else "int64"}"' for role in ("user", "item", "query")]
    lines += [f'request = "{"text" if text or "request" in leave_out else "int64"}"']
    tables = {EVENTS[kind]: (f"events.{kind}", rows) for kind, rows in kinds.items()}
    tables["catalog"] = ("catalog", log.catalog)
    for name, (place, rows) in tables.items():
        columns = [c for c in TYPES if any(c in row for row in rows) and c not in leave_out]
        columns = [c for c in columns if not (place == "events.image_search" and c == "item")]
        if not versions:
            columns = [c for c in columns if c != "valid_from"]
        made = table(rows, columns)
        if text:
            for role in {"user", "item", "request", "query"} & set(columns):
                values = [None if v is None else f"{role}-{v}" for v in made[role].to_pylist()]
                made = made.set_column(columns.index(role), role, pa.array(values, pa.string()))
        path = _write(made, folder, name, form)
        lines += [f"[{place}]", f'path = "{path}"', 'time_unit = "us"']
        lines += [f'{column} = "{column}"' for column in columns if column in _keys(place)]
        if images is not None and "image" in columns:
            lines += [f'images = "{images}"']
    mapping = folder / "prepare.toml"
    mapping.write_text("\n".join(lines))
    return mapping


def _write(made: pa.Table, folder: Path, name: str, form: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "csv":
        pyarrow.csv.write_csv(made, folder / f"{name}.csv")
        return f"{name}.csv"
    if name == "catalog":
        pq.write_table(made, folder / "catalog.parquet")
        return "catalog.parquet"
    for part in range(3):
        place = folder / name / f"dt=2026-11-0{part + 1}"
        place.mkdir(parents=True)
        pq.write_table(made.slice(part * len(made) // 3, (part + 1) * len(made) // 3 - part * len(made) // 3),
                       place / "part-0.parquet")  # fmt: skip
    return name


def _keys(place: str) -> set[str]:
    keys = {"user", "ts", "request", "arrived"}
    return {
        "events.impression": keys | {"item", "position", "query"},
        "events.click": keys | {"item"},
        "events.purchase": keys | {"item"},
        "events.image_search": keys | {"image"},
        "catalog": {"item", "title", "category", "listed_at", "valid_from", "image"},
    }[place]
