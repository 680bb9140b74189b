"""What the page shows of a request: candidates by score, their ranks without content, and the reasons."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.serving.logged import LoggedRequest
from mim_torchrec.serving.messages import Explanation, ScoreRequest, Scores
from mim_torchrec.serving.page.likeness import Likeness
from mim_torchrec.serving.page.new_item import with_new_item
from mim_torchrec.serving.scorer import Scorer

SHOWN = 24
ALIKE = 3
MICROSECONDS = 1e6
Score = Callable[[Scorer, ScoreRequest], Awaitable[Scores]]


@dataclass(frozen=True)
class NewItem:
    """An item that is not there yet: its title, its category, and its vector (dim,)."""

    title: str
    category: str
    vector: Tensor


class Catalog:
    """The items of a data set as the page shows them.

    Args:
        items: of the data set.
    """

    def __init__(self, items: ItemStore) -> None:
        self.items = items

    def about(self, item: int, now: int | None) -> dict[str, Any]:
        """`item_id`, `title`, `known`, `category`, and `age`: seconds from its listing to `now`, or None.

        Args:
            item: its id.
            now: microseconds since 1970; None where the log has no times.
        """
        found: dict[str, Any] = {"item_id": str(item), "title": "unknown item", "known": False,
                                 "category": None, "age": None}  # fmt: skip
        ids = np.array([item], np.int64)
        if not self.items.has(ids)[0]:
            return found
        rows = self.items.rows_of(ids)
        found |= {"title": self.items.titles(rows)[0], "known": True}
        try:
            found["category"] = self.items.categories(rows)[0]
        except DataError:  # the data set has no categories
            pass
        try:
            if now is not None:
                found["age"] = (now - int(self.items.listed_at(rows)[0])) / MICROSECONDS
        except DataError:  # nor times of listing
            pass
        return found

    def image(self, item: int) -> bytes | None:
        """The encoded picture of an item; None where there is none."""
        if abs(item) >= 1 << 63 or not self.items.has(np.array([item]))[0]:
            return None
        try:
            (data,) = self.items.image_bytes(self.items.rows_of(np.array([item])))
        except DataError:
            return None
        return data

    def categories(self, most: int) -> list[str]:
        """Categories of items, the most frequent first; none where the data set has none."""
        try:
            codes = self.items.category_codes()
        except DataError:
            return []
        _, first, counts = np.unique(codes, return_index=True, return_counts=True)
        kept = first[np.argsort(-counts, kind="stable")[:most]]
        return [name for name in self.items.categories(kept) if name]


async def ranked(
    scorer: Scorer,
    logged: LoggedRequest,
    score: Score,
    catalog: Catalog,
    likeness: Likeness | None,
    explain_pairs: int,
    new: NewItem | None = None,
) -> dict[str, Any]:
    """Score a request and say what the page shows of it.

    Args:
        scorer: of the model.
        logged: the request.
        score: scores it.
        catalog: of the items.
        likeness: of the vectors; None of Base.
        explain_pairs: pairs of candidate and behavior that an explanation may take; more is not explained.
        new: an item that is one more candidate.

    Returns:
        `history`, `behaviors` and `used`, their number in the log and of those that the model uses; `count`
        of candidates, and `candidates`, the highest score first. Each has `rank` and `rank_without` content
        from 1, `score` and `without`, its score without content, `alike` (behaviors with the most similar
        vectors), `has_vector`, `interests` and `because` (what the logit loses without an interest, and
        without the behaviors that raise it most), `clicked` and `is_new`.

    Raises:
        BadRequest: see `Scorer.score` and `with_new_item`.
    """
    content = scorer.mm is not None
    asked = logged.asked(scorer, contribution=content, explain=True)
    ids, clicked = logged.candidates.tolist(), logged.clicked
    if new is not None:
        asked = with_new_item(scorer, asked, new.vector, new.category)
        clicked = [*clicked, False]
    if scorer.recent(asked).num_pairs > explain_pairs:
        asked = replace(asked, explain=False)
    found = await score(scorer, asked)
    count, behaviors = asked.num_candidates, logged.behaviors.tolist()
    without = found.scores if found.contribution is None else found.scores - found.contribution
    rank, rank_without = _ranks(found.scores), _ranks(without)
    has_vector = [False] * count
    alike: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in range(count)]
    if likeness is not None:
        has_vector, alike = await asyncio.to_thread(_alike, scorer, asked, likeness)
    now, times = logged.request_ts, logged.behavior_ts
    interests = {} if found.explanation is None else found.explanation.interests

    def about(k: int) -> dict[str, Any]:
        if k == len(ids):
            assert new is not None
            return {"item_id": None, "title": new.title, "category": new.category, "age": 0.0, "known": True}
        return catalog.about(ids[k], now)

    order = found.scores.argsort(descending=True, stable=True).tolist()
    shown = [k for place, k in enumerate(order) if place < SHOWN or k == len(ids)]
    history = list(range(len(behaviors)))[: -SHOWN - 1 : -1]
    return {
        "behaviors": len(behaviors),
        "used": scorer.recent(asked).num_behaviors,
        "content": content,
        "count": count,
        "history": [
            catalog.about(behaviors[k], now)
            | {"ago": None if now is None or times is None else (now - int(times[k])) / MICROSECONDS}
            for k in history
        ],
        "candidates": [
            about(k)
            | {"rank": rank[k], "rank_without": rank_without[k], "score": float(found.scores[k]),
               "without": float(without[k]), "clicked": clicked[k], "is_new": k == len(ids),
               "has_vector": has_vector[k],
               "alike": [catalog.about(behaviors[place], now) | said for place, said in alike[k]],
               "interests": {name: float(lost[k]) for name, lost in interests.items()},
               "because": _because(behaviors, found.explanation, k, catalog)}
            for k in shown
        ],
    }  # fmt: skip


def _ranks(scores: Tensor) -> list[int]:
    """Rank of each score from 1, the highest first; scores that differ by rounding alone share one.

    >>> _ranks(torch.tensor([0.1, 0.3, 0.2, 0.3]))
    [4, 1, 3, 1]
    """
    rounded = scores.double().round(decimals=6)
    above = len(scores) - torch.searchsorted(rounded.sort().values, rounded, right=True)
    ranks: list[int] = (1 + above).tolist()
    return ranks


def _alike(
    scorer: Scorer, asked: ScoreRequest, likeness: Likeness
) -> tuple[list[bool], list[list[tuple[int, dict[str, Any]]]]]:
    """Of each candidate, whether it has a vector, and the places of the behaviors that are most alike."""
    assert scorer.mm is not None
    _, known = scorer.mm.lookup(asked.ids["candidate_item_id"])
    known[list(asked.vectors)] = True
    _, behaviors = scorer.mm.lookup(asked.ids["behavior_item_id"])
    relevance = scorer.relevance(asked).masked_fill(~behaviors[None], -2.0)
    nearest = relevance.topk(min(ALIKE, int(behaviors.sum())), dim=1)
    pairs = zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    return known.tolist(), [
        [(place, likeness.said(cosine)) for place, cosine in zip(*pair, strict=True)] if is_known else []
        for pair, is_known in zip(pairs, known.tolist(), strict=True)
    ]


def _because(
    behaviors: list[int], found: Explanation | None, k: int, catalog: Catalog
) -> list[dict[str, Any]]:
    """The behaviors without which the logit of a candidate would fall most."""
    if found is None:
        return []
    used = behaviors[len(behaviors) - found.behaviors.shape[1] :]
    largest = found.behaviors[k].topk(min(ALIKE, len(used)))
    pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    return [catalog.about(used[place], None) | {"lost": value} for place, value in pairs if value > 0]
