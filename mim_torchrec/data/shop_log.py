"""What happens in the synthetic shop: who is shown what, who clicks, who searches by image and buys.

Clicks follow

    logit = bias + style_weight * 3.5 (match - 0.2) + 0.4 crowd + 0.3 quality + 0.3 appeal + 0.25 mood,

where match is the larger cosine of the item's style with the user's two tastes, less 0.2 for the second,
crowd the standardized logarithm of the item's recent clicks, quality the item's own, appeal its category's
and mood the user's. A user's preference for categories decides what is asked for, not what is clicked:
otherwise content, which shows the category, would help by that even where users do not care for style. Users
who browse choose one of 20 items, by twice the logit.
"""

from dataclasses import dataclass

import numpy as np

from mim_torchrec.data.shop_items import STYLE_DIM, normalized
from mim_torchrec.errors import OptionError

BIAS = -1.3
SECOND_TASTE = 0.2
BLOCKS = 120
BROWSED = 20
IN_CATEGORY = 0.6
SEARCHED = 60


@dataclass(frozen=True)
class ShopItems:
    """Items: ids, category, style (n, 8), quality, listed_at (us), bid; of categories centers, appeal."""

    ids: np.ndarray
    category: np.ndarray
    centers: np.ndarray
    appeal: np.ndarray
    style: np.ndarray
    quality: np.ndarray
    listed_at: np.ndarray
    bid: np.ndarray


@dataclass(frozen=True)
class Crowd:
    """Users: ids, unit tastes (n, 2, 8), category preference (n, k), mood, activity (sums to 1)."""

    ids: np.ndarray
    tastes: np.ndarray
    preference: np.ndarray
    mood: np.ndarray
    activity: np.ndarray


@dataclass(frozen=True)
class Log:
    """Requests in order of time: user, ts, category asked for (n,); items, probability, clicked (n, k).

    Users and items are positions, not ids. `clicks` is all clicks, of requests and browsing: user, item, ts.
    `request_of_click` is the position of the request that each belongs to, -1 for browsing.
    """

    user: np.ndarray
    ts: np.ndarray
    category: np.ndarray
    items: np.ndarray
    probability: np.ndarray
    clicked: np.ndarray
    clicks: tuple[np.ndarray, np.ndarray, np.ndarray]
    request_of_click: np.ndarray


@dataclass(frozen=True)
class Searches:
    """Searches by image: style of the image (n, 8), its category, ts, item bought and item clicked (n,)."""

    style: np.ndarray
    category: np.ndarray
    ts: np.ndarray
    bought: np.ndarray
    clicked: np.ndarray


class _Shelf:
    """What is listed in a block of time, drawn with more weight for the new and the popular."""

    def __init__(self, catalog: ShopItems, recent_clicks: np.ndarray, now: int, span: int) -> None:
        self.order = np.argsort(catalog.category, kind="stable")
        self.order = self.order[catalog.listed_at[self.order] < now]
        age = (now - catalog.listed_at[self.order]) / span
        weight = (1 + 12 * np.exp(-age / 0.05)) * (1 + 0.5 * np.log1p(recent_clicks[self.order]))
        self._cumulative = np.concatenate([[0.0], np.cumsum(weight)])
        categories = np.arange(len(catalog.centers) + 1)
        self._bounds = self._cumulative[np.searchsorted(catalog.category[self.order], categories)]
        logs = np.log1p(recent_clicks)
        listed = logs[self.order]
        self.crowd = (logs - listed.mean()) / (listed.std() + 0.1)

    def draw(self, category: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Items (n, count), distinct in a row, often of the category (n,) asked for."""
        wanted = np.repeat(category[:, None], count, axis=1)
        items = self._draw(np.where(rng.random(wanted.shape) < IN_CATEGORY, wanted, -1), rng)
        while True:
            ordered = np.argsort(items, axis=1, kind="stable")
            in_order = np.take_along_axis(items, ordered, axis=1)
            again = np.zeros(items.shape, bool)
            np.put_along_axis(again, ordered[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
            if not again.any():
                return items
            items[again] = self._draw(np.full(int(again.sum()), -1), rng)

    def _draw(self, category: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        any_item = (category < 0) | (self._bounds[category + 1] <= self._bounds[category])
        low = np.where(any_item, 0.0, self._bounds[category])
        high = np.where(any_item, self._cumulative[-1], self._bounds[category + 1])
        point = low + rng.random(category.shape) * (high - low)
        position = np.searchsorted(self._cumulative, point, side="right") - 1
        return self.order[position.clip(0, len(self.order) - 1)]


def simulate(
    catalog: ShopItems,
    crowd: Crowd,
    *,
    requests: int,
    candidates: int,
    browsing: int,
    start: int,
    stop: int,
    style_weight: float,
    rng: np.random.Generator,
) -> Log:
    """Run the shop from `start` to `stop` (microseconds) in blocks of time; the crowd moves between blocks.

    Raises:
        OptionError: fewer than twice `candidates` items are listed before the first request.
    """
    if (stock := int((catalog.listed_at < start).sum())) < 2 * max(candidates, BROWSED):
        raise OptionError(f"{stock} items in stock at the start are too few for {candidates} candidates")
    edges = np.linspace(start, stop, BLOCKS + 1).astype(np.int64)
    recent = np.zeros(len(catalog.ids))
    shown: list[tuple[np.ndarray, ...]] = []
    clicks: list[tuple[np.ndarray, ...]] = []
    request_of_click: list[np.ndarray] = []
    for block in range(BLOCKS):
        shelf = _Shelf(catalog, recent, edges[block] + 1, stop - start)
        sizes = [total * (block + 1) // BLOCKS - total * block // BLOCKS for total in (requests, browsing)]

        def visit(
            count: int, items_each: int, begin: int = edges[block], end: int = edges[block + 1],
            shelf: _Shelf = shelf,
        ) -> tuple[np.ndarray, ...]:  # fmt: skip
            user = rng.choice(len(crowd.ids), count, p=crowd.activity)
            ts = np.sort(rng.integers(begin + 1, end, count))
            gumbel = rng.gumbel(size=(count, crowd.preference.shape[1]))
            category = np.argmax(crowd.preference[user] + gumbel, axis=1)
            items = shelf.draw(category, items_each, rng)
            return user, ts, category, items, _logits(catalog, crowd, shelf, user, items, style_weight)

        user, ts, category, items, logits = visit(sizes[0], candidates)
        probability = 1 / (1 + np.exp(-logits))
        clicked = rng.random(logits.shape) < probability
        row, column = np.nonzero(clicked)
        request_of_click.append(sum([len(part[0]) for part in shown]) + row)
        shown.append((user, ts, category, items, probability, clicked))
        delay = rng.integers(1_000_000, 60_000_000, len(row))
        clicks.append((user[row], items[row, column], ts[row] + delay))
        user, ts, _, items, logits = visit(sizes[1], BROWSED)
        best = np.argmax(2 * logits + rng.gumbel(size=logits.shape), axis=1)
        clicks.append((user, items[np.arange(len(user)), best], ts))
        request_of_click.append(np.full(len(user), -1))
        recent = 0.97 * recent + sum(np.bincount(c[1], minlength=len(recent)) for c in clicks[-2:])
    user, ts, category, items, probability, clicked = (np.concatenate(p) for p in zip(*shown, strict=True))
    user_of_click, item_of_click, ts_of_click = (np.concatenate(p) for p in zip(*clicks, strict=True))
    return Log(
        user, ts, category, items, probability, clicked, (user_of_click, item_of_click, ts_of_click),
        np.concatenate(request_of_click),
    )  # fmt: skip


def _logits(
    catalog: ShopItems, crowd: Crowd, shelf: _Shelf, user: np.ndarray, items: np.ndarray, style_weight: float
) -> np.ndarray:
    """(n, items each)."""
    style = catalog.style[items] / np.sqrt(STYLE_DIM)
    cosine = np.einsum("nkd,nid->nik", crowd.tastes[user], style)
    match = np.maximum(cosine[..., 0], cosine[..., 1] - SECOND_TASTE)
    others = 0.4 * shelf.crowd[items] + 0.3 * catalog.quality[items]
    others += 0.3 * catalog.appeal[catalog.category[items]] + 0.25 * crowd.mood[user, None]
    return BIAS + style_weight * 3.5 * (match - 0.2) + others


def search(
    catalog: ShopItems, crowd: Crowd, *, searches: int, start: int, stop: int, rng: np.random.Generator
) -> Searches:
    """Users search with a image near a taste of theirs, buy the listed item most like it, click another."""
    user = rng.choice(len(crowd.ids), searches, p=crowd.activity)
    ts = np.sort(rng.integers(start, stop, searches))
    taste = crowd.tastes[user, rng.integers(2, size=searches)] * np.sqrt(STYLE_DIM)
    preference = crowd.preference[user]
    category = np.argmax(preference + rng.gumbel(size=preference.shape), axis=1)
    style = normalized(taste + 0.5 * catalog.centers[category] + 0.5 * rng.normal(size=taste.shape))

    by_listing = np.argsort(catalog.listed_at, kind="stable")
    listed = np.searchsorted(catalog.listed_at[by_listing], ts)
    found = by_listing[(rng.random((searches, SEARCHED)) * listed[:, None]).astype(np.int64)]
    likeness = np.einsum("nd,nkd->nk", style, catalog.style[found]) / STYLE_DIM
    likeness += 0.3 * (catalog.category[found] == category[:, None])
    likeness += rng.gumbel(scale=0.05, size=likeness.shape)
    bought = found[np.arange(searches), np.argmax(likeness, axis=1)]
    likeness[found == bought[:, None]] = -np.inf
    return Searches(style, category, ts, bought, found[np.arange(searches), np.argmax(likeness, axis=1)])
