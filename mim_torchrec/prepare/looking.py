"""Writes a mapping by looking at files: a first version to check, with a comment at every guess."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.files import create_file
from mim_torchrec.errors import OutputExists
from mim_torchrec.prepare.files import SUFFIXES, find_files

ROWS = 2000
KINDS = {
    "impression": ("impression", "exposure", "expose", "shown", "view", "display"),
    "purchase": ("purchase", "order", "buy", "bought", "transaction", "sale"),
    "click": ("click", "clk", "tap"),
    "image_search": ("image_search", "imagesearch", "search", "query", "visual"),
    "catalog": ("catalog", "item", "product", "sku", "goods"),
}
ROLES = {
    "request": ("request_id", "request", "search_id", "session_id", "impression_id", "query_id", "pvid"),
    "user": ("user_id", "user", "uid", "customer_id", "customer", "member_id", "visitor_id", "buyer_id"),
    "item": ("item_id", "item", "product_id", "product", "sku", "goods_id", "article_id", "iid"),
    "ts": ("ts", "timestamp", "time", "event_time", "created_at", "date", "datetime", "shown_at",
           "clicked_at", "bought_at", "searched_at", "at"),
    "id": ("event_id", "uuid", "log_id"),
    "arrived": ("arrived_at", "arrived", "received_at", "ingested_at", "log_time"),
    "position": ("position", "pos", "rank", "slot"),
    "query": ("query", "query_text", "keyword", "keywords"),
    "image": ("image", "image_path", "image_url", "picture", "photo", "img", "image_bytes", "query_image"),
    "title": ("title", "name", "product_name", "item_name"),
    "category": ("category", "category_id", "cat", "category_name", "department"),
    "listed_at": ("listed_at", "created_at", "list_time", "publish_time", "first_seen"),
    "valid_from": ("valid_from", "effective_from", "updated_at"),
}  # fmt: skip
OF_KIND = {
    "impression": ("request", "user", "item", "ts", "position", "query", "id", "arrived"),
    "click": ("request", "user", "item", "ts", "id", "arrived"),
    "purchase": ("request", "user", "item", "ts", "id", "arrived"),
    "image_search": ("request", "user", "ts", "image", "id", "arrived"),
    "catalog": ("item", "title", "category", "listed_at", "image", "valid_from"),
}
NEEDED = {"impression": ("user", "item", "ts"), "click": ("user", "item", "ts"),
          "purchase": ("user", "item", "ts"), "image_search": ("request", "user", "ts", "image"),
          "catalog": ("item",)}  # fmt: skip
ZONE = re.compile(r"(Z|UTC|[+-]\d{2}:\d{2})\s*$")
EVENT_COLUMNS = ("event", "event_type", "type", "action", "event_name")


@dataclass(frozen=True)
class Seen:
    """One table as it was found: its path in the mapping, some rows, and what selects its kind."""

    path: str
    rows: pa.Table
    where: dict[str, str]


def write_mapping(data: Path, mapping: Path) -> None:
    """Look at the files in a folder and write a mapping of them.

    Args:
        data: the folder; every file or folder in it is a table, named after what it holds.
        mapping: file to write.

    Raises:
        DataError: there is no such folder, or nothing in it that looks like impressions or like a catalogue.
        OutputExists: the mapping exists.
    """
    if not data.is_dir():
        raise DataError("no such directory; name the folder of your logs", file=data)
    found = _tables(data, mapping.absolute().parent)
    for kind in ("impression", "catalog"):
        if kind not in found:
            names = ", ".join(sorted(path.name for path in data.iterdir())) or "nothing"
            problem = f"nothing looks like the {kind}: name files or folders after it; there is {names}"
            raise DataError(problem, file=data)
    text = "\n".join(_text(data.absolute().name, found)) + "\n"
    if not create_file(mapping, text.encode()):
        raise OutputExists(f"{mapping} exists; choose another --mapping or remove it")


def _tables(data: Path, base: Path) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    for entry in sorted(data.iterdir()):
        if entry.name.startswith((".", "_")):
            continue
        if not (entry.is_dir() or entry.name.endswith(tuple(SUFFIXES))):
            continue
        path = entry.absolute()
        try:
            files = find_files("init", str(path), base, [])
        except DataError:
            continue  # a folder of images
        rows = _head(files.paths[0], files.kind)
        shown = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
        event = next((c for c in EVENT_COLUMNS if c in rows.column_names), None)
        kinds = {} if event is None else _kinds_of(pc.unique(rows[event]).to_pylist())
        if event is not None and len(kinds) > 1:
            for kind, value in kinds.items():
                found.setdefault(kind, Seen(shown, rows, {event: value}))
            continue
        name = next((k for k in KINDS if _is_like(entry.name, k)), None)
        if name is not None:
            found.setdefault(name, Seen(shown, rows, {}))
    return found


def _head(path: str, kind: str) -> pa.Table:
    """Some rows; of CSV as text."""
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            names = [f.name for f in file.schema_arrow if not pa.types.is_nested(f.type)]
            return pa.Table.from_batches([next(file.iter_batches(ROWS, columns=names))])
    with pyarrow.csv.open_csv(path) as reader:
        names = reader.schema.names
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    with pyarrow.csv.open_csv(path, convert_options=convert) as reader:
        return pa.Table.from_batches([next(iter(reader))]).slice(0, ROWS)


def _kinds_of(values: Sequence[object]) -> dict[str, str]:
    texts = [value for value in values if isinstance(value, str)]
    kinds: dict[str, str] = {}
    for text in texts:
        kind = next(
            (k for k in ("impression", "purchase", "click", "image_search") if _is_like(text, k)), None
        )
        if kind is not None:
            kinds.setdefault(kind, text)
    return kinds


def _is_like(name: str, kind: str) -> bool:
    return any(word in name.lower() for word in KINDS[kind])


def _text(name: str, found: dict[str, Seen]) -> Iterator[str]:
    yield "# What is where in these logs, for `mim prepare --mapping <this file> --out DATA`."
    yield "# Guessed from names and the first rows: check every line. What is not named is not read."
    yield f"name = {json.dumps(name)}"
    yield ""
    yield "[ids]  # int64: ids stay as they are; text: a stable 64-bit hash of the text"
    for role in ("user", "item", "request", "query"):
        kinds = [_id_kind(seen.rows, column) for kind, seen in found.items() if role in OF_KIND[kind]
                 for column in [_role(role, seen.rows)] if column is not None]  # fmt: skip
        text = "text" in kinds or (role == "request" and _role(role, found["impression"].rows) is None)
        if kinds or role == "request":
            yield f'{role} = "{"text" if text else "int64"}"'
    zones = {kind: _time_kind(seen) for kind, seen in found.items()}
    aware = any(kind in ("zone", "number") for kind in zones.values())
    for kind in ("impression", "click", "purchase", "image_search", "catalog"):
        if kind not in found:
            continue
        seen = found[kind]
        yield ""
        yield f"[{kind if kind == 'catalog' else f'events.{kind}'}]"
        yield f"path = {json.dumps(seen.path)}"
        if seen.where:
            pairs = ", ".join(f"{json.dumps(c)} = {json.dumps(v)}" for c, v in seen.where.items())
            yield f"where = {{ {pairs} }}"
        used = set()
        for role in OF_KIND[kind]:
            column = _role(role, seen.rows)
            if column is not None and column not in used:
                used.add(column)
                yield f"{role} = {json.dumps(column)}"
            elif role in NEEDED[kind]:
                yield f'{role} = "?"  # write the column; there are {", ".join(seen.rows.column_names)}'
        yield from _time_lines(seen, zones[kind], aware)
        others = [c for c in seen.rows.column_names if c not in used and c not in seen.where]
        if others:
            yield f"# not read: {', '.join(others)}"


def _time_lines(seen: Seen, kind: str, aware: bool) -> Iterator[str]:
    if kind == "number":
        column = _role("ts", seen.rows) or _role("listed_at", seen.rows)
        assert column is not None
        yield f'time_unit = "{_unit(seen.rows[column])}"  # since 1970-01-01 UTC, by the size of the numbers'
    elif kind == "wall clock":
        mark = "" if aware else "# "
        yield f'{mark}timezone = "UTC"  # these times have no zone: write theirs, such as "Europe/Berlin"'


def _role(role: str, rows: pa.Table) -> str | None:
    names = {name.lower(): name for name in rows.column_names}
    return next((names[word] for word in ROLES[role] if word in names), None)


def _id_kind(rows: pa.Table, column: str) -> str:
    kind = rows[column].type
    if pa.types.is_integer(kind):
        return "int64"
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return "text"
    known = [text for text in rows[column].to_pylist() if text]
    return "int64" if known and all(_is_integer(text) for text in known) else "text"


def _is_integer(text: str) -> bool:
    """Whether a text is an integer and nothing else: "007" is not, because 7 is another text."""
    return text.lstrip("-").isdigit() and str(int(text)) == text and len(text) < 19


def _time_kind(seen: Seen) -> str:
    column = _role("ts", seen.rows) or _role("listed_at", seen.rows)
    if column is None:
        return "none"
    kind = seen.rows[column].type
    if pa.types.is_timestamp(kind):
        return "zone" if kind.tz else "wall clock"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    known = [text for text in seen.rows[column].cast(pa.string()).to_pylist() if text]
    if known and all(_is_integer(text) for text in known):
        return "number"
    return "zone" if known and all(ZONE.search(text) for text in known) else "wall clock"


def _unit(values: pa.ChunkedArray) -> str:
    largest = max(abs(float(value)) for value in values.to_pylist() if value not in (None, ""))
    return next((unit for unit, limit in (("s", 1e11), ("ms", 1e14), ("us", 1e17)) if largest < limit), "ns")
