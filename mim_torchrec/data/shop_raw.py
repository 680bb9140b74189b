"""Raw logs of the synthetic shop, as a real one leaves them, for `mim prepare` (`mim shop --raw`).

    raw/impressions/dt=…/*.parquet    one item a row; times in microseconds since 1970
    raw/clicks/dt=…/*.parquet         times of a wall clock in Shanghai, without a zone
    raw/purchases/*.csv               times of New York with their offset
    raw/searches/*.parquet            image searches, with paths of images
    raw/catalog.parquet               items, with paths of images
    raw/images/                       the images
    raw/prepare.toml                  what is where

Nothing that was logged is lost, so a right preparation finds the requests of the shop again. It has to undo
copies of at-least-once delivery, events that lie in the folder of a later day, rows without a user, and items
that the catalogue does not have. Some images are not there. People who search by image are no users of the
requests: their clicks and purchases are in no history.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mim_torchrec.data.schema import TIME
from mim_torchrec.embeddings.files import atomic_directory, write_text

DAY = 86_400_000_000
HOUR = 3_600_000_000
SHANGHAI, NEW_YORK = 8 * HOUR, -5 * HOUR  # the log lies in winter
COPIES, LATE, NO_USER, UNKNOWN, NO_IMAGE = 0.02, 0.01, 0.002, 0.002, 0.01
FIRST_SEARCH, FIRST_VISITOR = 1_000_000_000, 2_000_000_000

MAPPING = """\
name = "shop"

[events.impression]
path = "impressions"
request = "request"
user = "user"
item = "item"
ts = "shown_at"
time_unit = "us"
position = "position"
query = "category_asked"

[events.click]
path = "clicks"
request = "request"
user = "user"
item = "item"
ts = "clicked_at"
timezone = "Asia/Shanghai"

[events.purchase]
path = "purchases"
request = "request"
user = "user"
item = "item"
ts = "bought_at"

[events.image_search]
path = "searches"
request = "request"
user = "user"
ts = "searched_at"
image = "image"

[catalog]
path = "catalog.parquet"
item = "id"
title = "title"
category = "category"
listed_at = "listed_at"
image = "image"
"""


@dataclass(frozen=True)
class RawTables:
    """What the shop knows of itself.

    Args:
        items: the item table.
        pairs: the pair table, a purchase and a click a search.
        requests: the requests in order of time.
        clicks: all clicks: `request` (null outside of requests), `user`, `item`, `ts` (us).
        seed: of the damage.
    """

    items: pa.Table
    pairs: pa.Table
    requests: pa.Table
    clicks: pa.Table
    seed: int


def write_raw(raw: RawTables, out: Path) -> None:
    """Write the logs. Raises DiskFull where there is no room."""
    rng = np.random.default_rng((raw.seed, 6))
    with atomic_directory(out) as root:
        impressions = _impressions(raw.requests)
        unknown = impressions.take(pa.array(_some(len(impressions), UNKNOWN, rng)))
        unknown = unknown.set_column(2, "item", pa.array(np.full(len(unknown), 7)))
        impressions = _damaged(pa.concat_tables([impressions, unknown]), rng)
        _write_days(impressions, "shown_at", root / "impressions", rng, impressions["shown_at"])

        searches, out_of = _searches(raw.pairs)
        purchases = out_of.filter(pc.equal(out_of["signal"], "purchase"))
        clicked = out_of.filter(pc.equal(out_of["signal"], "click"))
        names = ["request", "user", "item", "ts"]
        clicks = _damaged(pa.concat_tables([raw.clicks.select(names), clicked.select(names)]), rng)
        utc = clicks["ts"]
        wall = pa.array(utc.to_numpy() + SHANGHAI).cast(TIME)
        clicks = clicks.drop_columns("ts").append_column("clicked_at", wall)
        _write_days(clicks, "clicked_at", root / "clicks", rng, utc)

        bought = _damaged(purchases.select(names), rng)
        texts = np.datetime_as_string((bought["ts"].to_numpy() + NEW_YORK).astype("datetime64[us]"))
        bought = bought.drop_columns("ts").append_column(
            "bought_at", pa.array(np.char.add(texts, "-05:00").tolist())
        )
        (root / "purchases").mkdir()
        pyarrow.csv.write_csv(bought, root / "purchases" / "part-0.csv")

        _write_images(root, "images/searches", searches["request"], searches["image"], 0.0, rng)
        places = [f"images/searches/{request}.jpg" for request in searches["request"].to_pylist()]
        (root / "searches").mkdir()
        named = searches.drop_columns("image").append_column("image", pa.array(places))
        pq.write_table(_damaged(named, rng), root / "searches" / "part-0.parquet")

        _write_images(root, "images/items", raw.items["item_id"], raw.items["image"], NO_IMAGE, rng)
        places = [f"images/items/{item}.jpg" for item in raw.items["item_id"].to_pylist()]
        catalog = raw.items.select(["item_id", "title", "category", "listed_at"])
        catalog = catalog.rename_columns(["id", "title", "category", "listed_at"])
        zoned = catalog["listed_at"].cast(pa.timestamp("us", "UTC"))
        catalog = catalog.set_column(3, "listed_at", zoned).append_column("image", pa.array(places))
        pq.write_table(catalog, root / "catalog.parquet")
        write_text(root / "prepare.toml", MAPPING)


def _impressions(requests: pa.Table) -> pa.Table:
    """One candidate a row."""
    shown = requests["candidate_item_ids"].combine_chunks()
    lengths = np.diff(shown.offsets.to_numpy())
    row = pa.array(np.repeat(np.arange(len(requests)), lengths))
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return pa.table({
        "request": requests["request_id"].take(row),
        "user": requests["user_id"].take(row),
        "item": shown.flatten(),
        "shown_at": requests["ts"].cast(pa.int64()).take(row),
        "position": position,
        "category_asked": requests["query_id"].take(row),
    })  # fmt: skip


def _searches(pairs: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Searches with their images, and what was bought and clicked out of them a minute later."""
    ts = pairs["ts"].cast(pa.int64()).to_numpy()
    query = pairs["query_id"].to_numpy()
    table = pa.table({
        "request": FIRST_SEARCH + query,
        "user": FIRST_VISITOR + query % max(1, len(query) // 4),
        "item": pairs["item_id"],
        "ts": ts + 60_000_000,
        "signal": pairs["signal"],
    })  # fmt: skip
    _, first = np.unique(query, return_index=True)
    searches = table.select(["request", "user"]).take(pa.array(first))
    searched_at = pa.array(ts[first]).cast(pa.timestamp("us", "UTC"))
    searches = searches.append_column("searched_at", searched_at)
    return searches.append_column("image", pairs["query_image"].take(pa.array(first))), table


def _damaged(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    """The rows, some of them twice, and copies of some without a user."""
    twice = table.take(pa.array(_some(len(table), COPIES, rng)))
    nobody = table.take(pa.array(_some(len(table), NO_USER, rng)))
    place = table.column_names.index("user")
    nobody = nobody.set_column(place, table.schema.field(place), pa.nulls(len(nobody), table["user"].type))
    return pa.concat_tables([table, twice, nobody])


def _some(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.flatnonzero(rng.random(count) < share)


def _write_days(
    table: pa.Table, time: str, root: Path, rng: np.random.Generator, utc: pa.ChunkedArray
) -> None:
    """A folder a day; some events lie in that of the next day, as those do that arrive late."""
    day = utc.to_numpy() // DAY + (rng.random(len(table)) < LATE)
    for one in np.unique(day):
        folder = root / f"dt={np.datetime64(int(one), 'D')}"
        folder.mkdir(parents=True)
        rows = table.take(pa.array(rng.permutation(np.flatnonzero(day == one))))
        pq.write_table(rows, folder / "part-0.parquet", compression="zstd")


def _write_images(
    root: Path,
    folder: str,
    names: Sequence[pa.Scalar] | pa.ChunkedArray,
    images: pa.ChunkedArray,
    missing: float,
    rng: np.random.Generator,
) -> None:
    (root / folder).mkdir(parents=True)
    left_out = rng.random(len(images)) < missing
    for name, image, gone in zip(names, images, left_out, strict=True):
        if not gone:
            (root / folder / f"{name}.jpg").write_bytes(image.as_py())
