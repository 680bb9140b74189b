"""Requests of a split: every row, and what it says of the model that will be trained on it."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mim_torchrec.data.errors import Problems
from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import IdCounts
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.request_columns import RequestColumns
from mim_torchrec.data.request_files import RequestFiles
from mim_torchrec.data.schema import Dataset
from mim_torchrec.validate.items import LEFT_OUT
from mim_torchrec.validate.report import Report, sampled

SMALL_ROW_GROUP, GOOD_ROW_GROUP = 1000, 20_000
"""Rows below which a row group costs more to open than to read, and of one that is read fast."""


@dataclass
class Seen:
    """What the rows of a split hold together; ids are those of this process, int64."""

    rows: int = 0
    skipped: int = 0
    candidates: int = 0
    positives: int = 0
    behaviors: int = 0
    longest: int = 0
    empty: int = 0
    unknown_candidates: int = 0
    unknown_behaviors: int = 0
    first: int | None = None
    last: int | None = None
    requests: IdCounts = field(default_factory=IdCounts)
    users: IdCounts = field(default_factory=IdCounts)
    items: IdCounts = field(default_factory=IdCounts)

    def add(self, found: RequestColumns, items: ItemStore | None) -> None:
        """Count good rows."""
        if not len(found):
            return
        self.rows += len(found)
        candidates, behaviors = found.candidate.values["item_id"], found.behavior.values["item_id"]
        self.candidates += len(candidates)
        self.positives += int(found.candidate.values["label"].sum())
        self.behaviors += len(behaviors)
        self.longest = max(self.longest, int(found.behavior.lengths.max()))
        self.empty += int((found.behavior.lengths == 0).sum())
        if items is not None:
            self.unknown_candidates += int((~items.has(candidates)).sum())
            self.unknown_behaviors += int((~items.has(behaviors)).sum())
        if "ts" in found.scalars:
            first, last = int(found.scalars["ts"].min()), int(found.scalars["ts"].max())
            self.first = first if self.first is None else min(self.first, first)
            self.last = last if self.last is None else max(self.last, last)
        for name, counts in (("request_id", self.requests), ("user_id", self.users)):
            counts.add(found.scalars[name], np.ones(len(found), np.int64))
        self.items.add(candidates, np.ones(len(candidates), np.int64))


def check_requests(
    dataset: Dataset, split: str, features: Features, share: float, items: ItemStore | None, report: Report
) -> Seen | None:
    """Check the requests of a split.

    Args:
        dataset: the data set.
        split: "train", "validation" or "test".
        features: further columns.
        share: of the row groups that are read, spread evenly.
        items: of the data set; None where they cannot be read.
        report: gets what is found.

    Returns:
        What there is, None where nothing can be read.
    """
    part, seen, problems = f"requests/{split}", Seen(), Problems()
    files: RequestFiles | None = None
    with report.collecting():
        files = RequestFiles(dataset.requests(split), 1 << 30, "fail", features, None, dataset.conventions)
    if files is None:
        return None
    units = files.units
    for unit in sampled(units, share):
        with report.collecting():
            for found, bad in files.checked(unit, problems):
                seen.skipped += bad
                seen.add(found, items)
    report.add(part, problems, LEFT_OUT)
    report.facts[part] = _facts(seen, len(units), items is not None)
    _warn(part, seen, report)
    if len(units) > 1 and (mean := sum(unit.rows for unit in units) / len(units)) < SMALL_ROW_GROUP:
        report.warn(part, f"row groups have {mean:,.0f} rows on average; write about {GOOD_ROW_GROUP:,}")
    return seen


def compare_splits(seen: dict[str, Seen], report: Report) -> None:
    """What splits of a data set should not share, and how much of one is new to the model of another."""
    splits = [(name, one) for name, one in seen.items() if one.rows]
    for k, (name, one) in enumerate(splits):
        for earlier, other in splits[:k]:
            part = f"requests/{name}"
            both = np.intersect1d(one.requests.ids, other.requests.ids, assume_unique=True)
            if len(both):
                report.warn(part, f"{len(both):,} request ids are in requests/{earlier} as well")
            if one.first is not None and other.last is not None and one.first <= other.last:
                report.warn(part, f"begins {_time(one.first)}, before requests/{earlier} ends "
                                  f"({_time(other.last)}): the model knows what came later")  # fmt: skip
    if "train" not in seen:
        return
    for name, one in splits:
        if name != "train":
            for what in ("users", "items"):
                own, known = getattr(one, what), getattr(seen["train"], what).ids
                new = ~np.isin(own.ids, known)
                share = float(own.counts[new].sum() / max(own.counts.sum(), 1))
                report.facts[f"requests/{name}"][f"of new {what}"] = share


def _facts(seen: Seen, row_groups: int, knows_items: bool) -> dict[str, object]:
    facts: dict[str, object] = {
        "rows": seen.rows + seen.skipped,
        "row groups": row_groups,
        "candidates": seen.candidates,
        "positive": seen.positives / max(seen.candidates, 1),
        "users": len(seen.users.ids),
        "behaviors a request": seen.behaviors / max(seen.rows, 1),
        "at most": seen.longest,
        "without history": seen.empty / max(seen.rows, 1),
    }
    if seen.first is not None and seen.last is not None:
        facts |= {"from": _time(seen.first), "to": _time(seen.last)}
    if knows_items:
        facts |= {"candidates without item": seen.unknown_candidates / max(seen.candidates, 1),
                  "behaviors without item": seen.unknown_behaviors / max(seen.behaviors, 1)}  # fmt: skip
    return facts


def _warn(part: str, seen: Seen, report: Report) -> None:
    if not seen.rows:
        report.errors.append(f"{part}: no good row")
        return
    if seen.positives in (0, seen.candidates):
        only = "clicked" if seen.positives else "not clicked"
        report.errors.append(
            f"{part}: every candidate is {only}; no AUC can be computed, write requests with both labels"
        )
    if seen.unknown_candidates:
        report.warn(part, f"{seen.unknown_candidates:,} candidates are not in the item table")
    if repeated := seen.rows - len(seen.requests.ids):
        report.warn(part, f"{repeated:,} rows repeat a request id")
    if seen.empty == seen.rows:
        report.warn(part, "no request has a history")


def _time(microseconds: int) -> str:
    return str(pa.scalar(microseconds, pa.timestamp("us")))[:19]
