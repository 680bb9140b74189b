"""A simulated online test: what users would have clicked, and brought, had a model ranked their candidates.

Only a shop with known truth allows it: the click probability of every candidate is that of the simulation,
not of a model. Both models rank the same requests; the first few are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_torchrec.data.errors import DataError
from mim_torchrec.training.metrics import draw_groups, interval

MICRO = 1e-6


@dataclass(frozen=True)
class Traffic:
    """Test requests with the truth about them, the candidates of one after the other.

    Attributes:
        request_id: (n,) of each candidate.
        user_id: (n,).
        item_id: (n,).
        probability: (n,) true click probability.
        bid: (n,) what the item's seller offers for a click.
        category: (n,) name.
    """

    request_id: np.ndarray
    user_id: np.ndarray
    item_id: np.ndarray
    probability: np.ndarray
    bid: np.ndarray
    category: np.ndarray

    @classmethod
    def of_shop(cls, data: Path, split: str = "test") -> "Traffic":
        """Read the requests of a synthetic shop, ordered by request and item."""
        requests = pq.read_table(data / "requests" / split)
        truth = pq.read_table(data / "truth" / split)
        if not requests["request_id"].equals(truth["request_id"]):
            raise DataError(f"{data}: requests and truth of {split} are not of the same requests")
        counts = pc.list_value_length(requests["candidate_item_ids"]).to_numpy()
        items = pq.read_table(data / "items", columns=["item_id", "bid", "category"])
        item_id = _flat(requests["candidate_item_ids"])
        row = pc.index_in(pa.array(item_id), items["item_id"].combine_chunks()).to_numpy()
        request_id = np.repeat(requests["request_id"].to_numpy(), counts)
        order = np.lexsort((item_id, request_id))
        columns = (
            request_id,
            np.repeat(requests["user_id"].to_numpy(), counts),
            item_id,
            _flat(truth["click_probability"]).astype(np.float64),
            items["bid"].to_numpy()[row],
            np.asarray(items["category"].to_pylist(), dtype=object)[row],
        )
        return cls(*(column[order] for column in columns))

    def scores(self, run: Path) -> np.ndarray:
        """(n,) predictions of a CTR run for these candidates.

        Raises:
            ValueError: the run has scored other candidates.
        """
        table = pq.read_table(run / "predictions.parquet", columns=["request_id", "item_id", "score"])
        request_id, item_id, score = (column.to_numpy() for column in table.columns)
        order = np.lexsort((item_id, request_id))
        if not (np.array_equal(request_id[order], self.request_id)
                and np.array_equal(item_id[order], self.item_id)):  # fmt: skip
            raise DataError(f"{run} has not scored the candidates of this shop")
        return score[order].astype(np.float64)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_flatten(column).to_numpy()


@dataclass(frozen=True)
class Shown:
    """What a ranking shows, a row an impression; in order of requests, the first slot first.

    Attributes:
        candidate: (m,) its place in the traffic.
        seen: (m,) probability that the user looks at the slot.
        price: (m,) what a click costs the seller.
    """

    candidate: np.ndarray
    seen: np.ndarray
    price: np.ndarray


def rank(
    traffic: Traffic,
    score: np.ndarray,
    by: Literal["ecpm", "ctr"],
    slots: int,
    examination: float,
) -> Shown:
    """Rank the candidates of every request and show the first.

    Args:
        traffic: the requests.
        score: (n,) predicted click probability of each candidate.
        by: "ecpm" ranks by prediction times bid, as an auction does, "ctr" by the prediction alone.
        slots: candidates that are shown.
        examination: probability that a user who has looked at a slot looks at the next; all look at the
            first.

    Returns:
        What is shown. The price is the generalized second price: the least bid with which the item would
        have kept its place, given the predictions; the last candidate pays nothing.
    """
    value = score * traffic.bid if by == "ecpm" else score
    order = np.lexsort((-value, traffic.request_id))
    request = traffic.request_id[order]
    first = np.flatnonzero(np.r_[True, request[1:] != request[:-1]])
    place = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    following = np.r_[np.where(request[1:] == request[:-1], (score * traffic.bid)[order][1:], 0.0), 0.0]
    price = np.minimum(following / np.maximum(score[order], MICRO), traffic.bid[order])
    kept = place < slots
    return Shown(order[kept], examination ** place[kept], price[kept])


@dataclass(frozen=True)
class Outcome:
    """Sums by user of what was shown.

    Attributes:
        impressions: (users,).
        clicks: (users,).
        revenue: (users,).
    """

    impressions: np.ndarray
    clicks: np.ndarray
    revenue: np.ndarray


def outcome(
    traffic: Traffic,
    shown: Shown,
    users: np.ndarray,
    rng: np.random.Generator | None = None,
    kept: np.ndarray | None = None,
) -> Outcome:
    """What users do with what they are shown.

    Args:
        traffic: the requests.
        shown: the ranking.
        users: (n,) number of each candidate's user, from 0.
        rng: draws the clicks; None takes their expectation.
        kept: (n,) bool, the candidates that count, as those of a category; None is all.
    """
    probability = traffic.probability[shown.candidate] * shown.seen
    clicks = probability if rng is None else (rng.random(len(probability)) < probability).astype(np.float64)
    weight = np.ones(len(clicks)) if kept is None else kept[shown.candidate].astype(np.float64)
    user, count = users[shown.candidate], int(users.max()) + 1
    sums = (weight, clicks * weight, clicks * shown.price * weight)
    return Outcome(*(np.bincount(user, weights=column, minlength=count) for column in sums))


def lifts(
    base: Sequence[Outcome], other: Sequence[Outcome], draws: int, seed: int
) -> dict[str, float | list[float] | None]:
    """Lift in click rate and in revenue a thousand impressions, over all runs of both.

    Args:
        base: outcomes of Base, a run each.
        other: outcomes of the other model in the same order.
        draws: bootstrap draws of users, whose requests both models have ranked; 0 gives no intervals.
        seed: of the draws.

    Returns:
        `ctr_lift` and `rpm_lift`, fractions, and their 95% intervals `ctr_lift_ci` and `rpm_lift_ci`; None
        where Base has no click.
    """
    sums = {
        name: [sum(getattr(o, name) for o in side) for side in (base, other)]
        for name in ("impressions", "clicks", "revenue")
    }
    users = np.arange(len(sums["clicks"][0]))
    weightings = [np.ones(len(users)), *draw_groups(users, draws, seed)]
    report: dict[str, float | list[float] | None] = {}
    for lift, gained in (("ctr_lift", "clicks"), ("rpm_lift", "revenue")):
        values = []
        for weights in weightings:
            rate = [
                (weights @ sums[gained][k]) / max(weights @ sums["impressions"][k], MICRO) for k in (0, 1)
            ]
            values.append(rate[1] / rate[0] - 1 if rate[0] > 0 else np.nan)
        report[lift] = None if np.isnan(values[0]) else float(values[0])
        report[f"{lift}_ci"] = interval(np.array(values[1:])) if draws else None
    return report
