"""The catalogue: items with their versions and the numbers of their categories."""

from dataclasses import dataclass
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from ibis.expr.types import Table

from mim_torchrec.data.errors import DataError
from mim_torchrec.prepare.engines import Engine
from mim_torchrec.prepare.files import Files
from mim_torchrec.prepare.reading import Raw


@dataclass
class Items:
    """The items of a shop.

    Args:
        versions: `item`, `category` (int32), and with several versions `valid_from` and `version` from 1.
        newest: the last version of each item: `item`, `title`, `category` (text), `listed_at`, `image`, as
            far as the catalogue has them, and `number` (int32) of the category.
        categories: (n,) names in order; the number of a category is its place. None where there are none.
        has_versions: whether an item may have several.
        files: of the catalogue.
        has_image_bytes: images are bytes in the files.
        counts: of the rules.
    """

    versions: Table
    newest: Table
    categories: pa.Array | None
    has_versions: bool
    files: Files
    has_image_bytes: bool
    counts: dict[str, int]


def make_items(raw: Raw, engine: Engine, scratch: Path) -> Items:
    """Read the catalogue by its rules.

    Raises:
        DataError: an item, or a version of one, is there twice with different values; no row has an id.
    """
    table = raw.table
    has_versions = "valid_from" in table.columns
    if has_versions and raw.has_image_bytes:
        problem = "versions of items and images as bytes do not go together; name images by path"
        raise DataError(f"catalog.valid_from: {problem}", file=raw.files.paths[0])
    key = ["item", "valid_from"] if has_versions else ["item"]
    whole = table.filter([table[name].notnull() for name in key])
    once = engine.keep(whole.distinct(), "catalog-rows")
    rows, distinct = (engine.count(t) for t in (whole, once))
    if not distinct:
        raise DataError("catalog: no row has an item id", file=raw.files.paths[0])
    _refuse_repeated(engine, once, key, raw.files)
    names: pa.Array | None = None
    if "category" in table.columns:
        found = engine.fetch(once.select(category=_.category.fill_null("")).distinct())["category"]
        names = found.combine_chunks().sort()
        path = scratch / "category-numbers.parquet"
        numbers = pa.table({"category_name": names, "number": pa.array(range(len(names)), pa.int32())})
        pq.write_table(numbers, path)
        numbered = engine.read(Files("categories", [str(path)], "parquet", numbers.schema))
        joined = once.mutate(category=_.category.fill_null("")).inner_join(
            numbered, [("category", "category_name")]
        )
        once = joined.drop("category_name")
    else:
        once = once.mutate(number=ibis.literal(0, "int32"))
    if has_versions:
        order = ibis.window(group_by="item", order_by=once.valid_from)
        back = ibis.window(group_by="item", order_by=once.valid_from.desc())
        once = once.mutate(
            version=(ibis.row_number().over(order) + 1).cast("int64"),
            age=ibis.row_number().over(back).cast("int64"),
        )
    kept = engine.keep(once, "catalog")
    columns = {"item": kept["item"], "category": kept["number"]}
    if has_versions:
        columns |= {"valid_from": kept.valid_from, "version": kept.version}
        newest = kept.filter(_.age == 0).drop("age", "version", "valid_from")
    else:
        newest = kept
    items = engine.count(newest)
    counts = {
        **raw.counts, "duplicates": rows - distinct, "items": items, "versions": distinct,
        "categories": 0 if names is None else len(names),
    }  # fmt: skip
    return Items(kept.select(**columns), newest, names, has_versions, raw.files, raw.has_image_bytes, counts)


def _refuse_repeated(engine: Engine, table: Table, key: list[str], files: Files) -> None:
    repeated = table.group_by(key).agg(times=_.count()).filter(_.times > 1).order_by(key).limit(1)
    for row in engine.fetch(repeated).to_pylist():
        what = f"item {row['item']!r} is there {row['times']} times with different values"
        remedy = (
            "name the column of the time from which each is valid as catalog.valid_from, or keep one"
            if key == ["item"]
            else "two versions begin at one time; keep one"
        )
        raise DataError(f"catalog: {what}; {remedy}", file=files.paths[0])
