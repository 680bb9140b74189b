"""The behaviors that requests of `mim prepare` know, against a naive loop."""

import numpy as np
import pyarrow as pa
import pytest

from mim_torchrec.prepare.behaviors import Behaviors

COLUMNS = {"user": pa.int64(), "item": pa.int64(), "ts": pa.int64(), "known_at": pa.int64(),
           "category": pa.int32(), "kind": pa.int8()}  # fmt: skip


def rows(rng: np.random.Generator, count: int, moments: int) -> list[tuple[int, ...]]:
    """Behaviors (user, item, ts, known_at, category, kind) in order; a few users have most."""
    user = rng.integers(0, 3, count) * rng.integers(0, 4, count) * 5
    known_at = rng.integers(0, moments, count)
    found = zip(user.tolist(), range(count), (known_at - 1).tolist(), known_at.tolist(), strict=True)
    return [(*one, one[1] % 7, one[1] % 2) for one in sorted(found, key=lambda one: (one[0], one[3], one[1]))]


def stored(own: list[tuple[int, ...]], batch: int, folder) -> Behaviors:
    table = pa.table([pa.array([row[k] for row in own], kind) for k, kind in enumerate(COLUMNS.values())],
                     names=list(COLUMNS))  # fmt: skip
    batches = (table.slice(start, batch) for start in range(0, max(len(own), 1), batch))
    return Behaviors(batches, folder)


@pytest.mark.parametrize("moments", [3, 10_000], ids=["with ties", "mostly without ties"])
@pytest.mark.parametrize("count", [0, 1, 400])
@pytest.mark.parametrize("length", [1, 5, 1000])
def test_requests_know_the_last_behaviors_before_them(tmp_path, count, moments, length):
    rng = np.random.default_rng(count + moments)
    own = rows(rng, count, moments)
    users, ts = rng.integers(-1, 40, 300), rng.integers(-1, moments + 2, 300)
    behaviors = stored(own, 37, tmp_path / "behaviors")
    found = behaviors.last(users, ts, length)
    known = [[row for row in own if row[0] == user and row[3] < at]
             for user, at in zip(users.tolist(), ts.tolist(), strict=True)]  # fmt: skip
    expected = [row for every in known for row in every[-length:]]
    assert found.lengths.tolist() == [len(every[-length:]) for every in known]
    for name, place in (("item", 1), ("ts", 2), ("category", 4), ("kind", 5)):
        assert found.values[name].to_pylist() == [row[place] for row in expected]
    assert behaviors.counts == {
        "behaviors": count, "requests_without": sum(not every for every in known),
        "requests_cut_to_the_last": sum(len(every) > length for every in known),
    }  # fmt: skip


def test_the_counts_add_up_over_batches_of_requests(tmp_path):
    behaviors = stored([(1, 5, 0, 1, 0, 0), (1, 6, 1, 2, 0, 0)], 10, tmp_path / "behaviors")
    for ts in (1, 2, 3):
        behaviors.last(np.array([1]), np.array([ts]), 1)
    assert behaviors.counts == {"behaviors": 2, "requests_without": 1, "requests_cut_to_the_last": 1}
