"""Vocabularies of a limited size over many days, against a loop over every occurrence."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.vocabularies import _vocabulary
from mim_torchrec.data.id_scan import IdCounts
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.errors import OptionError

DAYS, LIMIT = 6, 40


def config(**options) -> CTRConfig:
    return CTRConfig(data=Path("data"), out=Path("out"), mim="off", **options)


def occurrences(day: int) -> list[int]:
    """Ids of a day, most of them new ones; they are negative as well."""
    rng = np.random.default_rng(day)
    return (20 * day - 50 + rng.geometric(0.04, 300)).tolist()


def scan(ids: list[int]) -> IdCounts:
    counts = IdCounts()
    found = Counter(ids)
    every = np.array(list(found))
    counts.add(every, np.array(list(found.values())), 2 * np.array(list(found.values())))
    return counts


def naive_days(decay: float, min_count: int) -> list[dict[int, float]]:
    """By day the ids with rows, and their decayed occurrences."""
    days, known = [], {}
    for day in range(DAYS):
        today = Counter(occurrences(day))
        scores = {i: today[i] + decay * known.get(i, 0.0) for i in today.keys() | known.keys()}
        wanted = [i for i in scores if i in known or today[i] >= min_count]
        wanted.sort(key=lambda i: (-scores[i], i))
        known = {i: scores[i] for i in wanted[:LIMIT]}
        days.append(known)
    return days


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("min_count", [1, 3])
def test_the_most_frequent_ids_have_rows(tmp_path, decay, min_count):
    options = config(max_ids={"item_id": LIMIT}, count_decay=decay, min_count=min_count)
    before, evicted = None, 0
    for day, expected in enumerate(naive_days(decay, min_count)):
        now = _vocabulary("item_id", scan(occurrences(day)), before, options)
        now.save(tmp_path / "v.npz")
        now = Vocabulary.load(tmp_path / "v.npz", counts=True)
        found = dict(zip(now.ids.tolist(), now.occurrences.tolist(), strict=True))
        assert found == pytest.approx(expected) and list(found) == sorted(expected)
        assert now.num_embeddings <= LIMIT + 1
        evicted += 0 if before is None else len(set(before.ids.tolist()) - found.keys())
        before = now
    assert evicted > 10


def test_impressions_of_ids_that_lose_their_rows_are_those_of_row_0():
    options = config(max_ids={"item_id": LIMIT})
    before, total = None, 0
    for day in range(DAYS):
        before = _vocabulary("item_id", scan(occurrences(day)), before, options)
        total += 2 * 300
        assert int(before.impressions.sum()) == total
    assert before.impressions[0] > 0


def test_without_a_limit_every_id_stays():
    first = _vocabulary("item_id", scan(occurrences(0)), None, config())
    second = _vocabulary("item_id", scan(occurrences(1)), first, config())
    assert second.ids.tolist() == sorted({*occurrences(0), *occurrences(1)})


def test_a_run_that_has_not_counted_cannot_be_bounded():
    first = Vocabulary.build(np.arange(30))
    with pytest.raises(OptionError, match="has not counted its ids"):
        _vocabulary("item_id", scan(occurrences(1)), first, config(max_ids={"item_id": LIMIT}))
    kept = _vocabulary("item_id", scan(occurrences(1)), first, config(max_ids={"item_id": 1000}))
    assert set(range(30)) < set(kept.ids.tolist()) and kept.occurrences is None
