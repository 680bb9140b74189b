"""A synthetic shop in the schema of real data, with the true click probability of everything shown.

Users have tastes in style, prefer categories and follow the crowd; new items are listed all the time and get
much of the traffic while they are new, so that late items are known by their content only. With
`--style-weight 0` the very same items are shown to users who do not care for style: whatever content seems to
add there is an artifact.
"""

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import tyro

from mim_torchrec import program
from mim_torchrec.data.histories import histories
from mim_torchrec.data.schema import ITEMS, PAIRS, REQUESTS, SIGNALS, SPLITS, TIME, TRUTH
from mim_torchrec.data.shop_items import (
    NOUNS,
    STYLE_DIM,
    draw_images,
    draw_styles,
    draw_titles,
)
from mim_torchrec.data.shop_log import BROWSED, Crowd, Log, ShopItems, search, simulate
from mim_torchrec.data.shop_raw import RawTables, write_raw
from mim_torchrec.data.writing import DatasetWriter, lists
from mim_torchrec.domains import Count, Domain, Natural, Share, Weight, check_domains
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import Place
from mim_torchrec.errors import OptionError, OutputExists

log = logging.getLogger("mim_torchrec.data.shop")  # also where it runs as __main__

START = int(np.datetime64("2024-01-01", "us").astype(np.int64))
DAY = 86_400_000_000
PHOTO_SEED = 6_000_000


@dataclass(frozen=True, kw_only=True)
class ShopConfig:
    """Write a synthetic shop: items, image searches, requests and the true click probabilities."""

    out: Place | None = None
    """Directory of the data set; must not exist."""
    raw: Path | None = None
    """Directory for raw logs, of which `mim prepare` makes the same data set; must not exist."""
    items: Count = 4000
    """Items, a third of them listed before the first request, the others over the whole time."""
    users: Count = 3000
    """Users."""
    requests: Annotated[int, Domain(least=10)] = 20_000
    """Requests, divided by time into train, validation and test (80, 10, 10 percent)."""
    candidates: Count = 5
    """Items shown in a request."""
    searches: Count = 4000
    """Searches by image in training time, each a pair of a purchase and a pair of a click."""
    browsing: Natural = 60_000
    """Clicks outside the requests, which fill the histories."""
    max_behaviors: Count = 50
    """Longest history of a request."""
    categories: Count = 12
    """Categories of items."""
    days: Count = 60
    """Length of the log."""
    style_weight: Weight = 1.0
    """How much users care for style; 0 is the negative control."""
    image_size: Annotated[int, Domain(least=10)] = 64
    """Height and width of images in pixels."""
    photo_gap: Share = 0.0
    """How far the images of searches are from those of items, from 0 (renderings alike) to 1 (photos):
    perspective, crop, ground, light and blur. Needs the extra [encoders]. All else is the same shop."""
    first_item_id: Annotated[int, Domain(least=-(2**62), most=2**62)] = 1_000_000
    """Smallest item id that may occur; ids lie within 10 times `items` of it."""
    seed: Natural = 0
    """Seed; equal arguments give equal bytes."""


def make_catalog(config: ShopConfig) -> ShopItems:
    """Draw items: style, category, time of listing."""
    rng = np.random.default_rng((config.seed, 1))
    listed = rng.uniform(0, config.days, config.items)
    stock = config.items // 3
    listed[:stock] -= config.days
    category = rng.integers(config.categories, size=config.items)
    centers = 0.6 * rng.normal(size=(config.categories, STYLE_DIM))
    return ShopItems(
        ids=config.first_item_id + rng.permutation(10 * config.items)[: config.items].astype(np.int64),
        category=category,
        centers=centers,
        appeal=rng.normal(size=config.categories),
        style=draw_styles(category, centers, rng),
        quality=rng.normal(size=config.items),
        listed_at=START + (listed * DAY).astype(np.int64),
        bid=rng.lognormal(-0.5, 0.5, config.items).round(2),
    )


def make_crowd(config: ShopConfig) -> Crowd:
    """Draw users: two tastes each, preferred categories, activity."""
    rng = np.random.default_rng((config.seed, 2))
    tastes = rng.normal(size=(config.users, 2, STYLE_DIM))
    activity = rng.lognormal(0.0, 0.8, config.users)
    return Crowd(
        ids=500_000 + rng.permutation(10 * config.users)[: config.users].astype(np.int64),
        tastes=tastes / np.linalg.norm(tastes, axis=2, keepdims=True),
        preference=rng.normal(size=(config.users, config.categories)),
        mood=rng.normal(size=config.users),
        activity=activity / activity.sum(),
    )


def items_table(config: ShopConfig, catalog: ShopItems) -> pa.Table:
    """Render the item table; `bid` is a column beside the schema's."""
    rng = np.random.default_rng((config.seed, 3))
    table = pa.table(
        [
            catalog.ids,
            draw_titles(catalog.style, catalog.category, rng),
            pa.array(draw_images(catalog.style, catalog.category, config.image_size, rng), pa.binary()),
            category_names(config)[catalog.category],
            pa.array(catalog.listed_at).cast(TIME),
        ],
        schema=ITEMS,
    )
    return table.append_column("bid", pa.array(catalog.bid))


def pairs_table(config: ShopConfig, catalog: ShopItems, crowd: Crowd) -> pa.Table:
    """Render the image searches of training time: a purchase and a click each, in this order."""
    rng = np.random.default_rng((config.seed, 4))
    stop = START + int(0.8 * config.days * DAY)
    found = search(catalog, crowd, searches=config.searches, start=START, stop=stop, rng=rng)
    drawn = draw_images(
        found.style, found.category, config.image_size, rng, config.photo_gap, PHOTO_SEED + config.seed
    )
    images = pa.array(drawn, pa.binary())
    twice = np.repeat(np.arange(config.searches), 2)
    items = np.stack([found.bought, found.clicked], axis=1).reshape(-1)
    return pa.table(
        [
            images.take(pa.array(twice)),
            1 + twice,
            catalog.ids[items],
            pa.nulls(len(twice), pa.int64()),
            np.tile(np.array(SIGNALS), config.searches),
            pa.array(found.ts[twice]).cast(TIME),
        ],
        schema=PAIRS,
    )


def run_shop(config: ShopConfig, catalog: ShopItems, crowd: Crowd) -> Log:
    """Simulate the log."""
    return simulate(
        catalog, crowd, requests=config.requests, candidates=config.candidates, browsing=config.browsing,
        start=START, stop=START + config.days * DAY, style_weight=config.style_weight,
        rng=np.random.default_rng((config.seed, 5)),
    )  # fmt: skip


def requests_table(
    config: ShopConfig, catalog: ShopItems, crowd: Crowd, run: Log
) -> tuple[pa.Table, pa.Table]:
    """The requests of a log in order of time, and the truth about them."""
    names = category_names(config)
    lengths, behaviors, behavior_ts = histories(*run.clicks, run.user, run.ts, config.max_behaviors)
    candidates, shown = run.items.reshape(-1), np.full(config.requests, config.candidates)
    ids = pa.array(np.arange(1, config.requests + 1))
    table = pa.table(
        [
            ids,
            crowd.ids[run.user],
            1 + run.category,
            pa.array(run.ts).cast(TIME),
            lists(catalog.ids[behaviors], lengths, pa.int64()),
            lists(names[catalog.category[behaviors]], lengths, pa.string()),
            lists(behavior_ts, lengths, TIME),
            lists(catalog.ids[candidates], shown, pa.int64()),
            lists(names[catalog.category[candidates]], shown, pa.string()),
            lists(run.clicked.reshape(-1).astype(np.int8), shown, pa.int8()),
        ],
        schema=REQUESTS,
    )
    probability = run.probability.reshape(-1).astype(np.float32)
    return table, pa.table([ids, lists(probability, shown, pa.float32())], schema=TRUTH)


def clicks_table(catalog: ShopItems, crowd: Crowd, run: Log) -> pa.Table:
    """All clicks: `request` (null outside of requests), `user`, `item`, `ts` (us)."""
    user, item, ts = run.clicks
    browsing = run.request_of_click < 0
    return pa.table({
        "request": pa.array(1 + run.request_of_click, mask=browsing),
        "user": crowd.ids[user], "item": catalog.ids[item], "ts": ts,
    })  # fmt: skip


def category_names(config: ShopConfig) -> np.ndarray:
    """(num_categories,) names, a noun each and a number where nouns repeat."""
    names = [NOUNS[k % len(NOUNS)] + (f" {k // len(NOUNS) + 1}" if k >= len(NOUNS) else "")
             for k in range(config.categories)]  # fmt: skip
    return np.array(names, dtype=object)


def make_shop(config: ShopConfig) -> None:
    """Write the data set, or raw logs, or both.

    Raises:
        OutputExists: `out` or `raw` exists.
        OptionError: the sizes do not make a shop, or neither `out` nor `raw` is given.
    """
    if config.out is None and config.raw is None:
        raise OptionError("give --out for a data set, --raw for raw logs, or both")
    check_domains(config)
    stock = 2 * max(config.candidates, BROWSED)
    if config.items // 3 < stock:
        raise OptionError(
            f"--items {config.items} is too few for --candidates {config.candidates}: a third of them are in "
            f"stock at the start, and {stock} are needed"
        )
    source = {"command": "mim shop", **asdict(config)}
    source.pop("out")
    source.pop("raw")
    if config.raw is not None and config.raw.exists():
        raise OutputExists(f"{config.raw} exists; choose another directory or remove it")
    with ExitStack() as stack:
        writer = None
        if config.out is not None:
            out = stack.enter_context(written(config.out))
            writer = stack.enter_context(DatasetWriter(out, name="shop", source=source))
        catalog, crowd = make_catalog(config), make_crowd(config)
        run = run_shop(config, catalog, crowd)
        requests, truth = requests_table(config, catalog, crowd, run)
        items, pairs = items_table(config, catalog), pairs_table(config, catalog, crowd)
        if config.raw is not None:
            clicks = clicks_table(catalog, crowd, run)
            write_raw(RawTables(items, pairs, requests, clicks, config.seed), config.raw)
        if writer is not None:
            count = config.requests
            bounds = [0, count * 8 // 10, count * 9 // 10, count]
            for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
                writer.write(f"requests/{split}", requests.slice(start, stop - start))
                writer.write(f"truth/{split}", truth.slice(start, stop - start))
            writer.write("items", items)
            writer.write("pairs", pairs)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim shop`."""
    config = tyro.cli(ShopConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    started = time.time()
    make_shop(config)
    log.info("%s: %d items, %d requests, %d image searches in %.1f s", config.out or config.raw, config.items,
             config.requests, config.searches, time.time() - started)  # fmt: skip


if __name__ == "__main__":
    program.run(main)
