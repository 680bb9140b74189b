"""The simulated online test against loops over requests."""

import numpy as np
import pytest

from mim_torchrec.benchmarks.paper.auction import Outcome, Traffic, lifts, outcome, rank

SLOTS, EXAMINATION = 2, 0.5


@pytest.fixture
def traffic() -> Traffic:
    rng = np.random.default_rng(0)
    counts = [4, 1, 3, 5]
    request = np.repeat([10, 20, 30, 40], counts)
    n = len(request)
    return Traffic(request, np.repeat([7, 8, 7, 9], counts), np.arange(n), rng.random(n), rng.random(n) + 0.1,
                   np.array(["a", "b"], dtype=object)[np.arange(n) % 2])  # fmt: skip


@pytest.fixture
def score(traffic) -> np.ndarray:
    return np.random.default_rng(1).random(len(traffic.item_id))


def naive(traffic: Traffic, score: np.ndarray, by: str) -> list[tuple[int, float, float]]:
    """Candidate, probability that it is looked at, price: of everything shown."""
    shown = []
    for request in sorted(set(traffic.request_id)):
        mine = [k for k in range(len(score)) if traffic.request_id[k] == request]
        mine.sort(key=lambda k: -(score[k] * traffic.bid[k] if by == "ecpm" else score[k]))
        for slot, k in enumerate(mine[:SLOTS]):
            after = mine[slot + 1] if slot + 1 < len(mine) else None
            needed = 0.0 if after is None else score[after] * traffic.bid[after] / score[k]
            shown.append((k, EXAMINATION**slot, min(needed, traffic.bid[k])))
    return shown


@pytest.mark.parametrize("by", ["ecpm", "ctr"])
def test_the_ranking_its_slots_and_prices_are_those_of_a_loop(traffic, score, by):
    shown = rank(traffic, score, by, SLOTS, EXAMINATION)
    expected = naive(traffic, score, by)
    assert shown.candidate.tolist() == [k for k, _, _ in expected]
    assert shown.seen == pytest.approx([seen for _, seen, _ in expected])
    assert shown.price == pytest.approx([price for _, _, price in expected])


def test_the_price_of_a_click_is_at_most_the_bid(traffic, score):
    shown = rank(traffic, score, "ctr", SLOTS, EXAMINATION)
    assert (shown.price <= traffic.bid[shown.candidate]).all()


def test_expected_clicks_and_revenue_are_summed_by_user(traffic, score):
    users = np.searchsorted([7, 8, 9], traffic.user_id)
    found = outcome(traffic, rank(traffic, score, "ecpm", SLOTS, EXAMINATION), users)
    for place, user in enumerate((7, 8, 9)):
        mine = [entry for entry in naive(traffic, score, "ecpm") if traffic.user_id[entry[0]] == user]
        assert found.impressions[place] == len(mine)
        assert found.clicks[place] == pytest.approx(sum(traffic.probability[k] * seen for k, seen, _ in mine))
        assert found.revenue[place] == pytest.approx(
            sum(traffic.probability[k] * seen * price for k, seen, price in mine)
        )


def test_drawn_clicks_have_the_expectation(traffic, score):
    users = np.zeros(len(score), np.int64)
    shown = rank(traffic, score, "ecpm", SLOTS, EXAMINATION)
    drawn = [outcome(traffic, shown, users, np.random.default_rng(k)) for k in range(4000)]
    expected = outcome(traffic, shown, users)
    assert np.mean([d.clicks for d in drawn]) == pytest.approx(expected.clicks[0], rel=0.03)
    assert np.mean([d.revenue for d in drawn]) == pytest.approx(expected.revenue[0], rel=0.03)
    assert set(drawn[0].clicks % 1) == {0.0}


def test_a_category_counts_what_is_shown_of_it(traffic, score):
    users = np.zeros(len(score), np.int64)
    shown = rank(traffic, score, "ecpm", SLOTS, EXAMINATION)
    parts = [outcome(traffic, shown, users, kept=traffic.category == name) for name in ("a", "b")]
    whole = outcome(traffic, shown, users)
    for name in ("impressions", "clicks", "revenue"):
        assert sum(getattr(part, name)[0] for part in parts) == pytest.approx(getattr(whole, name)[0])


def test_a_ranking_by_the_truth_has_the_most_expected_clicks(traffic, score):
    users = np.zeros(len(score), np.int64)
    best = outcome(traffic, rank(traffic, traffic.probability, "ctr", SLOTS, EXAMINATION), users)
    other = outcome(traffic, rank(traffic, score, "ctr", SLOTS, EXAMINATION), users)
    assert best.clicks[0] > other.clicks[0]


def users_outcome(clicks: list[float], revenue: list[float]) -> Outcome:
    return Outcome(np.full(len(clicks), 10.0), np.array(clicks), np.array(revenue))


def test_a_lift_is_the_ratio_of_rates_over_all_runs():
    base = [users_outcome([1, 2], [5, 5]), users_outcome([2, 1], [5, 5])]
    other = [users_outcome([2, 2], [6, 6]), users_outcome([2, 1], [6, 6])]
    found = lifts(base, other, draws=200, seed=0)
    assert found["ctr_lift"] == pytest.approx(7 / 6 - 1)
    assert found["rpm_lift"] == pytest.approx(0.2)
    assert found["rpm_lift_ci"] == pytest.approx([0.2, 0.2])
    low, high = found["ctr_lift_ci"]
    assert low == pytest.approx(0) and high == pytest.approx(1 / 3)  # of one user alone, of the other


def test_without_a_click_of_base_there_is_no_lift():
    found = lifts([users_outcome([0], [0])], [users_outcome([1], [1])], draws=0, seed=0)
    assert found == {"ctr_lift": None, "ctr_lift_ci": None, "rpm_lift": None, "rpm_lift_ci": None}
