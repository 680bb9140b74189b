"""Public data as others publish it, in our schema: H&M, MicroLens, Amazon Reviews 2023 (`mim import public`).

    hm                   transactions_train.csv, articles.csv, images/<first 3 digits>/<article_id>.jpg
    microlens            *_pairs.csv, *_titles.csv, *_covers/<item>.jpg
    amazon-reviews-2023  <Category>.csv of ratings, meta_<Category>.jsonl[.gz], images/<parent_asin>.jpg

Each positive becomes a request among sampled negatives, see `interactions.py`: a purchase, a comment on a
video, a rating of 4 or more. Items without an image take no part. Amazon publishes addresses of images, not
images: download them into `images/` first. Not read: customers, prices, reviews, likes and views.
"""

import gzip
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import tyro

from mim_torchrec import program
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.interactions import (
    Positives,
    Split,
    draw_negatives,
    moments,
    pairs_table,
    parts_of,
    requests_table,
)
from mim_torchrec.data.schema import ITEMS, SPLITS
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.domains import Count, Domain, Natural, check_domains
from mim_torchrec.embeddings.files import sha256
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import LocalPath, Place

log = logging.getLogger("mim_torchrec.data.public")  # also where it runs as __main__

Layout = Literal["hm", "microlens", "amazon-reviews-2023"]
TOGETHER = 500_000
"""Positives whose requests are made at once; their users are drawn at random."""
IMAGES = 1000
"""Items whose images are in memory at once."""
MILLISECOND, DAY = 1000, 86_400_000_000


@dataclass(frozen=True, kw_only=True)
class PublicConfig:
    """Convert a public data set: purchases, comments or good ratings as clicks among sampled negatives."""

    layout: Layout
    """Which data set: H&M's competition, MicroLens, or a category of Amazon Reviews 2023."""
    source: LocalPath
    """Folder with its files under their own names."""
    out: Place
    """Directory to make; must not exist."""
    checksums: LocalPath | None = None
    """File of SHA-256 as `sha256sum` writes it; every table that is read must be in it, and equal. Without it
    the sums are computed and written into dataset.json."""
    split: Split = "global"
    """How positives are divided by time into train, validation and test (80, 10, 10 percent): those of all
    users at two common times, or those of every user."""
    min_rating: Annotated[float, Domain()] = 4.0
    """Lowest rating that is a positive (Amazon Reviews)."""
    negatives: Count = 4
    """Negatives of a request."""
    max_behaviors: Count = 50
    """Longest history of a request."""
    seed: Natural = 0
    """Seed of the negatives."""


@dataclass(frozen=True)
class Source:
    """What a layout holds.

    Attributes:
        files: tables that were read.
        user: (n,) ids of users, text or integers, of each interaction.
        item: (n,) keys of items, text.
        ts: (n,) int64, microseconds since 1970.
        positive: (n,) bool.
        titles: by key of an item.
        categories: likewise; None where the data has none.
        image: where the image of an item is.
    """

    files: tuple[Path, ...]
    user: pa.Array
    item: pa.Array
    ts: np.ndarray
    positive: np.ndarray
    titles: Mapping[str, str]
    categories: Mapping[str, str] | None
    image: Callable[[str], Path]


def read_hm(config: PublicConfig) -> Source:
    """H&M Personalized Fashion Recommendations, as Kaggle unpacks it."""
    sales, about = (config.source / name for name in ("transactions_train.csv", "articles.csv"))
    table = read_csv(sales, {"t_dat": pa.date32(), "customer_id": pa.string(), "article_id": pa.string()})
    named = ("prod_name", "product_type_name", "colour_group_name", "product_group_name")
    articles = read_csv(about, dict.fromkeys(("article_id", *named), pa.string()))
    keys = articles["article_id"].to_pylist()
    parts = [[text or "" for text in articles[name].to_pylist()] for name in named]
    titles = (" ".join(filter(None, words)) for words in zip(*parts[:3], strict=True))
    return Source(
        files=(sales, about),
        user=_whole(table["customer_id"]), item=_whole(table["article_id"]),
        ts=_whole(table["t_dat"]).cast(pa.int32()).to_numpy().astype(np.int64) * DAY,
        positive=np.ones(len(table), bool),
        titles=dict(zip(keys, titles, strict=True)),
        categories=dict(zip(keys, (text or "unknown" for text in parts[3]), strict=True)),
        image=lambda key: config.source / "images" / key[:3] / f"{key}.jpg",
    )  # fmt: skip


def read_microlens(config: PublicConfig) -> Source:
    """MicroLens of any size, such as MicroLens-50k."""
    pairs, names = (only(config.source, f"*_{kind}.csv") for kind in ("pairs", "titles"))
    covers = only(config.source, "*_covers")
    table = read_csv(pairs, {"user": pa.string(), "item": pa.string(), "timestamp": pa.int64()})
    about = read_csv(names, {"item": pa.string(), "title": pa.string()})
    titles = (text or "" for text in about["title"].to_pylist())
    return Source(
        files=(pairs, names), user=_whole(table["user"]), item=_whole(table["item"]),
        ts=table["timestamp"].to_numpy() * MILLISECOND, positive=np.ones(len(table), bool),
        titles=dict(zip(about["item"].to_pylist(), titles, strict=True)), categories=None,
        image=lambda key: covers / f"{key}.jpg",
    )  # fmt: skip


def read_amazon(config: PublicConfig) -> Source:
    """A category of Amazon Reviews 2023: its ratings alone, and the metadata of its items."""
    meta = only(config.source, "meta_*.jsonl*")
    category = meta.name.split(".")[0].removeprefix("meta_")
    ratings = config.source / f"{category}.csv"
    table = read_csv(
        ratings,
        {"user_id": pa.string(), "parent_asin": pa.string(), "rating": pa.float64(), "timestamp": pa.int64()},
    )
    titles, categories = {}, {}
    opened = gzip.open if meta.suffix == ".gz" else open
    with opened(meta, "rt", encoding="utf-8") as lines:
        for row, line in enumerate(lines):
            try:
                about = json.loads(line)
                key = about["parent_asin"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"is no item: {error!r}; download the file again", file=meta, row=row
                ) from None
            titles[key] = about.get("title") or ""
            categories[key] = about.get("main_category") or "unknown"
    return Source(
        files=(ratings, meta), user=_whole(table["user_id"]), item=_whole(table["parent_asin"]),
        ts=table["timestamp"].to_numpy() * MILLISECOND,
        positive=table["rating"].to_numpy() >= config.min_rating, titles=titles, categories=categories,
        image=lambda key: config.source / "images" / f"{key}.jpg",
    )  # fmt: skip


READERS: dict[Layout, Callable[[PublicConfig], Source]] = {
    "hm": read_hm, "microlens": read_microlens, "amazon-reviews-2023": read_amazon,
}  # fmt: skip


def only(folder: Path, pattern: str) -> Path:
    """The one file or folder of a name.

    Raises:
        DataError: there is none, or there are several.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"expected one {pattern}, found {names}; put one data set there", file=folder)
    return found[0]


def read_csv(file: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Columns of a CSV file.

    Raises:
        DataError: the file is missing or empty, lacks a column, or a value has another type or is missing.
    """
    if not file.is_file():
        raise DataError("no such file; --source is the folder of the unpacked data set", file=file)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict(columns),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    try:
        table = pyarrow.csv.read_csv(file, convert_options=convert, parse_options=parse)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable CSV file with columns {', '.join(columns)} ({error})", file=file
        ) from None
    if not len(table):
        raise DataError("the file has no rows; unpack it from the archive again", file=file)
    for name in columns:
        if name in REQUIRED and table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise DataError("is empty; unpack the archive again", file=file, row=row, column=name)
    return table


REQUIRED = ("t_dat", "customer_id", "article_id", "user", "item", "timestamp", "user_id", "parent_asin",
            "rating")  # fmt: skip
"""Columns without which an interaction or an item is none."""


def check_sums(files: tuple[Path, ...], checksums: Path | None) -> dict[str, str]:
    """SHA-256 of the tables by name, compared with those that were expected.

    Raises:
        DataError: a table is another than expected, or none was expected.
    """
    found = {file.name: sha256(file) for file in files}
    if checksums is None:
        return found
    try:
        lines = [line.split(maxsplit=1) for line in checksums.read_text().splitlines() if line.strip()]
        expected = {Path(name.strip().lstrip("*")).name: digest.lower() for digest, name in lines}
    except (OSError, ValueError) as error:
        problem = f"is no list of sums as sha256sum writes it: {error}"
        raise DataError(f"{problem}; each line is a sum and a name", file=checksums) from None
    for file in files:
        if file.name not in expected:
            raise DataError(f"has no sum in {checksums}; add it, or check the folder", file=file)
        if found[file.name] != expected[file.name]:
            wrong = f"its SHA-256 is {found[file.name]}, expected {expected[file.name]}"
            raise DataError(f"{wrong}; download it again", file=file)
    return found


def convert(config: PublicConfig) -> dict[str, int]:
    """Write the data set; returns the counts of its folders.

    Raises:
        DataError: a file is missing, malformed or not the one expected, or there is nothing to convert.
        OutputExists: `out` exists.
        OptionError: an option is impossible.
    """
    check_domains(config)
    options = {k: v for k, v in asdict(config).items() if k not in ("source", "out", "checksums")}
    described = {"command": "mim import public", **options}
    with written(config.out) as out, DatasetWriter(out, name=config.layout, source=described) as writer:
        source = READERS[config.layout](config)
        described["sha256"] = check_sums(source.files, config.checksums)
        keys, item = _numbered(source.item)
        complete = np.array([key in source.titles and source.image(key).is_file() for key in keys], bool)
        if not complete.any():
            where = source.image(keys[0])
            raise DataError(f"no item has a title and an image such as {where}", file=config.source)
        places = np.cumsum(complete) - 1
        kept = complete[item]
        user_keys, user = _numbered(source.user.filter(pa.array(kept)))
        item, ts, positive = places[item[kept]], source.ts[kept], source.positive[kept]
        known = [key for key, there in zip(keys, complete, strict=True) if there]
        users, items = (stable_ids(pa.array(ids)).to_numpy() for ids in (user_keys, known))
        categories = source.categories
        names = None if categories is None else np.array([categories[key] for key in known], dtype=object)
        first = np.full(len(known), np.iinfo(np.int64).max)
        np.minimum.at(first, item, ts)

        order = np.flatnonzero(positive)
        order = order[np.lexsort((item[order], user[order], ts[order]))]
        part = parts_of(user[order], ts[order], config.split)
        positives = Positives(user[order], item[order], ts[order], part)
        _write_requests(writer, config, positives, user * len(items) + item, users, items, names)
        writer.write("pairs", pairs_table(positives, items))
        _write_items(writer, source, known, items, names, first)
        writer.description["items_without_title_or_image"] = int((~complete).sum())
        writer.description["interactions_of_kept_items"] = float(kept.mean())
    return dict(writer.description["counts"])


def _write_requests(
    writer: DatasetWriter,
    config: PublicConfig,
    positives: Positives,
    seen: np.ndarray,
    users: np.ndarray,
    items: np.ndarray,
    categories: np.ndarray | None,
) -> None:
    """Requests of some users after another, so that memory holds those of few."""
    missing = sorted(set(range(len(SPLITS))) - set(np.unique(positives.part).tolist()))
    if missing:
        problem = f"too few positives ({len(positives.part)}): none for {SPLITS[missing[0]]}"
        raise DataError(problem, file=config.source)
    popularity = np.bincount(positives.item[positives.part == 0], minlength=len(items))
    blocks = -(-len(positives.user) // TOGETHER)
    block_of = np.random.default_rng((config.seed, 0)).integers(blocks, size=len(users))
    seen_block, first_id = block_of[seen // len(items)], 1
    for block in range(blocks):
        own = positives.take(np.flatnonzero(block_of[positives.user] == block))
        draws, places = (np.random.default_rng((config.seed, k, block)) for k in (1, 2))
        negatives = draw_negatives(own, seen[seen_block == block], users, popularity, config.negatives, draws)
        table = requests_table(
            own, negatives, users, items, categories, config.max_behaviors, places, first_id
        )
        first_id += len(table)
        for part, name in enumerate(SPLITS):
            writer.append(f"requests/{name}", table.filter(pa.array(own.part == part)))


def _write_items(
    writer: DatasetWriter,
    source: Source,
    keys: list[str],
    items: np.ndarray,
    categories: np.ndarray | None,
    first: np.ndarray,
) -> None:
    names = [name for name in ITEMS.names if name != "category" or categories is not None]
    schema = pa.schema([ITEMS.field(name) for name in names])
    for start in range(0, len(keys), IMAGES):
        part = keys[start : start + IMAGES]
        columns = {
            "item_id": items[start : start + IMAGES],
            "title": [source.titles[key] for key in part],
            "image": pa.array([source.image(key).read_bytes() for key in part], pa.binary()),
            "listed_at": moments(first[start : start + IMAGES]),
        }
        if categories is not None:
            columns["category"] = categories[start : start + IMAGES]
        writer.append("items", pa.table([columns[name] for name in names], schema=schema))


def _numbered(keys: pa.Array) -> tuple[list[str], np.ndarray]:
    """Distinct keys in order, and the number of each."""
    found = pc.dictionary_encode(keys)
    order = np.argsort(np.array(found.dictionary.to_pylist(), dtype=object), kind="stable")
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    names = found.dictionary.to_pylist()
    return [names[k] for k in order], number[found.indices.to_numpy()]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim import public`."""
    config = tyro.cli(PublicConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    counts = convert(config)
    log.info("%s: %s", config.out, ", ".join(f"{count} in {folder}" for folder, count in counts.items()))


if __name__ == "__main__":
    program.run(main)
