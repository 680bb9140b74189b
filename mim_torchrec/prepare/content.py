"""Items and pairs with their images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis import _
from ibis.expr.types import Table

from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import ITEMS, TIME
from mim_torchrec.prepare import events, pairs
from mim_torchrec.prepare.assembly import KINDS, uniform
from mim_torchrec.prepare.catalog import Items
from mim_torchrec.prepare.config import SECOND, Action, PrepareConfig
from mim_torchrec.prepare.engines import Engine
from mim_torchrec.prepare.files import resolve
from mim_torchrec.prepare.images import ImageReader, attach, stream_images, with_images
from mim_torchrec.prepare.mapping import Mapping
from mim_torchrec.prepare.reading import Raw
from mim_torchrec.prepare.writing import IMAGE_ROWS, FolderWriter

Counts = dict[str, int | str]


def item_rows(engine: Engine, items: Items) -> pa.Table:
    """Items in the columns of `data.schema.ITEMS`, in order of id, without images that are bytes.

    Raises:
        IdCollision: two items have one number.
    """
    found = engine.fetch(items.newest)
    ids = found["item"].combine_chunks()
    columns: dict[str, pa.Array] = {"item_id": stable_ids(ids)}
    if "title" in found.column_names:
        columns["title"] = found["title"].combine_chunks()
    if "image" in found.column_names:
        columns["image"] = found["image"].combine_chunks()
    if items.categories is not None:
        columns["category"] = found["category"].combine_chunks()
    if "listed_at" in found.column_names:
        columns["listed_at"] = found["listed_at"].combine_chunks().cast(TIME)
    if pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type):
        columns["original_id"] = ids
    return pa.table(columns).sort_by("item_id")


def write_items(
    config: PrepareConfig, mapping: Mapping, base: Path, engine: Engine, items: Items, files: FolderWriter
) -> Counts:
    """Write `items/`; returns how many there are and how many images are missing or empty."""
    catalog = mapping.catalog
    rows = item_rows(engine, items)
    counts: Counts = {"items": len(rows)}
    parts: Iterator[pa.Table] = iter([rows])
    with ImageReader(resolve(catalog.images or "", base), config.image_threads) as reader:
        if items.has_image_bytes:
            assert catalog.image is not None
            streamed = stream_images(items.files, catalog.item, catalog.image, mapping.ids.item == "text")
            parts = attach(rows, "item_id", streamed)
        elif "image" in rows.column_names:
            parts = with_images(rows, reader)
        without = empties = 0
        for part in parts:
            columns = [name for name in (*ITEMS.names, "original_id") if name in part.column_names]
            part = part.select(columns)
            if "image" in columns:
                part, empty = without_empty_images(part, "image")
                without, empties = without + part["image"].null_count, empties + empty
            files.write("items", part, IMAGE_ROWS if "image" in columns else None)
        files.finish()
    if catalog.image is not None:
        counts |= {"without_image": without, "empty_images": empties + reader.empty}
    return counts


def without_empty_images(rows: pa.Table, name: str) -> tuple[pa.Table, int]:
    """Rows with null in the place of images without bytes, and how many there were."""
    images = rows[name]
    if not pa.types.is_binary(images.type):
        return rows, 0
    empty = pc.fill_null(pc.equal(pc.binary_length(images), 0), False)
    kept = pc.if_else(empty, pa.scalar(None, images.type), images)
    return rows.set_column(rows.column_names.index(name), name, kept), pc.sum(empty).as_py() or 0


def write_pairs(
    config: PrepareConfig,
    mapping: Mapping,
    base: Path,
    engine: Engine,
    raw: Raw,
    actions: dict[Action, Table],
    items: Items,
    before: int,
    files: FolderWriter,
) -> Counts:
    """Write `pairs/` of searches and the actions out of them before a time; returns counts."""
    source = mapping.events.image_search
    assert source is not None
    table = raw.table
    if raw.has_image_bytes:
        table = table.mutate(image=table.request.cast("string"))  # a mark, which is not read
    whole = events.complete(table, ("request", "user", "ts", "image"))
    searches = engine.keep(pairs.distinct_searches(whole), "searches")
    made = [
        pairs.pairs(
            searches, found, window=config.pair_window * SECOND, before=before,
            by_request="request" in found.columns, signal=kind,
        )
        for kind, found in actions.items()
    ]  # fmt: skip
    both = made[0].union(*made[1:]) if len(made) > 1 else made[0]
    ordered = both.order_by(_.ts, _.request, _.signal.desc(), _.item)
    rows = engine.fetch(ordered)
    counts: Counts = {"searches": engine.count(searches)}
    if not len(rows):
        return counts | {"pairs": 0}
    shaped = pa.table({
        "query_id": stable_ids(rows["request"]),
        "item_id": stable_ids(rows["item"]),
        "hard_negative_item_id": hard_negatives(engine, rows, items, config),
        "signal": rows["signal"].combine_chunks(),
        "ts": rows["ts"].combine_chunks().cast(TIME),
        "image": rows["image"].combine_chunks(),
    })  # fmt: skip
    with ImageReader(resolve(source.images or "", base), config.image_threads) as reader:
        if raw.has_image_bytes:
            by_query = shaped.drop_columns("image").sort_by("query_id")
            streamed = stream_images(raw.files, source.request, source.image, mapping.ids.request == "text")
            parts = attach(by_query, "query_id", streamed)
        else:
            parts = with_images(shaped, reader)
        written = 0
        by_signal: dict[str, int] = dict.fromkeys(KINDS, 0)
        for part in parts:
            part, _empty = without_empty_images(part, "image")
            part = part.filter(part["image"].is_valid())
            part = part.rename_columns(
                ["query_image" if name == "image" else name for name in part.column_names]
            )
            for kind in KINDS:
                by_signal[kind] += pc.sum(pc.equal(part["signal"], kind)).as_py() or 0
            if len(part):
                files.write("pairs", part, IMAGE_ROWS)
            written += len(part)
        files.finish()
    return counts | {
        "pairs": written, **by_signal, "without_image": len(shaped) - written,
        "hard_negatives": config.hard_negatives,
    }  # fmt: skip


def hard_negatives(engine: Engine, rows: pa.Table, items: Items, config: PrepareConfig) -> pa.Array:
    """Hard negatives of pairs, null where the reader draws them.

    Of all items of the positive's category that were listed before the search, one is drawn by the seed, the
    search and the positive; null where there is no other.

    Args:
        engine: that has the items.
        rows: `request`, `item`, `ts`, `category` (the number) of the pairs.
        items: all items.
        config: options.
    """
    if config.hard_negatives == "sold":
        return pa.nulls(len(rows), pa.int64())
    found = engine.fetch(items.newest)
    item, category = stable_ids(found["item"]).to_numpy(), found["number"].to_numpy()
    listed = np.full(len(item), np.iinfo(np.int64).min)
    if "listed_at" in found.column_names:
        times = found["listed_at"].combine_chunks()
        known = times.is_valid().to_numpy(zero_copy_only=False)
        listed[known] = times.drop_null().to_numpy()
    order = np.lexsort((item, listed, category))
    item, category, listed = item[order], category[order], listed[order]
    query, positive = (stable_ids(rows[name]).to_numpy() for name in ("request", "item"))
    ts, of = rows["ts"].to_numpy(), rows["category"].to_numpy()
    draw = uniform(query, positive, config.seed + 1)
    chosen, has = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for number in np.unique(of):
        members = slice(*np.searchsorted(category, [number, number + 1]))
        those = np.flatnonzero(of == number)
        ids = item[members]
        offered = np.searchsorted(listed[members], ts[those])
        by_id = np.argsort(ids)
        place = by_id[np.searchsorted(ids, positive[those], sorter=by_id).clip(max=max(len(ids) - 1, 0))] \
            if len(ids) else np.zeros(len(those), np.int64)  # fmt: skip
        inside = (offered > 0) & (place < offered)
        inside &= ids[place] == positive[those] if len(ids) else False
        count = offered - inside
        drawn = (draw[those] * count).astype(np.int64)
        drawn += inside & (drawn >= place)
        some = count > 0
        chosen[those[some]], has[those[some]] = ids[drawn[some]], True
    return pa.array(chosen, mask=~has)
