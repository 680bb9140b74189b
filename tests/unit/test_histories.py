"""Histories cut out of a log, against a naive loop."""

import numpy as np
import pytest

from mim_torchrec.data.histories import histories


def naive(user, item, ts, of_user, before, max_behaviors) -> list[list[tuple[int, int]]]:
    """Item and time of the last behaviors of every request, one request after the other."""
    found = []
    for who, when in zip(of_user, before, strict=True):
        mine = [(t, k) for k, (u, t) in enumerate(zip(user, ts, strict=True)) if u == who and t < when]
        found.append([(int(item[k]), int(t)) for t, k in sorted(mine)][-max_behaviors:])
    return found


def split(lengths, items, times) -> list[list[tuple[int, int]]]:
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(items, ends), np.split(times, ends), strict=True)
    return [list(zip(i.tolist(), t.tolist(), strict=True)) for i, t in parts]


@pytest.mark.parametrize("max_behaviors", [1, 3, 100])
@pytest.mark.parametrize("moments", [5, 1000], ids=["with ties", "mostly without ties"])
@pytest.mark.parametrize("seed", range(3))
def test_histories_are_those_of_the_naive_loop(seed, moments, max_behaviors):
    rng = np.random.default_rng(seed)
    behaviors, requests = 120, 50
    arguments = (
        rng.integers(8, size=behaviors),
        np.arange(behaviors),
        rng.integers(moments, size=behaviors),
        rng.integers(10, size=requests),
        rng.integers(moments + 2, size=requests),
        max_behaviors,
    )
    assert split(*histories(*arguments)) == naive(*arguments)


def one_user(ts: list[int], before: int, max_behaviors: int = 10) -> list[int]:
    """Positions of the behaviors in the history of a request by the only user there is."""
    user, items = np.zeros(len(ts), np.int64), np.arange(len(ts))
    return histories(user, items, np.array(ts), np.array([0]), np.array([before]), max_behaviors)[1].tolist()


def test_a_behavior_at_the_moment_of_the_request_is_left_out():
    assert one_user([10, 20, 30], before=20) == [0]


def test_behaviors_at_one_moment_keep_the_order_given():
    assert one_user([20, 10, 20, 10, 20], before=30) == [1, 3, 0, 2, 4]


def test_the_last_behaviors_are_kept():
    assert one_user([30, 10, 20], before=40, max_behaviors=2) == [2, 0]


def test_a_request_before_or_after_all_behaviors_has_none_or_all():
    assert one_user([10, 20], before=5) == []
    assert one_user([10, 20], before=10**15) == [0, 1]


@pytest.mark.parametrize("stranger", [0, 5, 9])
def test_a_user_without_behaviors_has_an_empty_history(stranger):
    user, ts = np.array([3, 3, 7]), np.array([1, 2, 1])
    lengths, items, times = histories(user, ts, ts, np.array([stranger]), np.array([100]), 10)
    assert (lengths.tolist(), items.tolist(), times.tolist()) == ([0], [], [])
