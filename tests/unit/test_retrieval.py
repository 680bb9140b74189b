"""Image search: places against a naive loop, its summary, and what recall was worth in AUC."""

import numpy as np
import pytest
import torch

from mim_torchrec.benchmarks.harness.comparison import exchange_rate
from mim_torchrec.training.retrieval import by_group, search, summarize

NUM_ITEMS, NUM_QUERIES, DIM = 40, 300, 6


@pytest.fixture
def vectors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(-1, NUM_ITEMS, (NUM_QUERIES,), generator=generator)
    bought = torch.randint(NUM_ITEMS, (NUM_QUERIES,), generator=generator)
    own[own == bought] = -1
    allowed = torch.ones(NUM_ITEMS, dtype=torch.bool)
    allowed[[3, 17]] = False
    bought[(bought == 3) | (bought == 17)] = 5
    own[own == bought] = -1
    return {
        "query": torch.randn(NUM_QUERIES, DIM, generator=generator),
        "items": torch.randn(NUM_ITEMS, DIM, generator=generator),
        "bought": bought, "own": own, "allowed": allowed,
    }  # fmt: skip


def naive(query, items, bought, own, allowed, top):
    """Sort what can be found by cosine, the bought item after all that score the same."""
    places, best = [], []
    for q, b, o in zip(query, bought.tolist(), own.tolist(), strict=True):
        scores = {
            row: float(torch.dot(q / q.norm(), item / item.norm()))
            for row, item in enumerate(items) if allowed[row] and row != o
        }  # fmt: skip
        order = sorted(scores, key=lambda row: (-scores[row], row == b))
        places.append(order.index(b) + 1)
        best.append(order[:top])
    return places, best


def test_places_and_the_best_are_those_of_a_naive_loop(vectors):
    doubles = vectors | {name: vectors[name].double() for name in ("query", "items")}
    found = search(**vectors, top=7)
    places, best = naive(**doubles, top=7)
    assert found.rank.tolist() == places
    assert found.top.tolist() == best


def test_vectors_that_are_all_the_same_find_nothing(vectors):
    found = search(**vectors | {"items": torch.ones(NUM_ITEMS, DIM)})
    of_items = (vectors["own"] >= 0).long()
    assert found.rank.tolist() == (NUM_ITEMS - 2 - of_items * vectors["allowed"][vectors["own"]]).tolist()


@pytest.mark.parametrize("damaged", ["query", "items"])
def test_vectors_that_are_not_finite_are_refused(vectors, damaged):
    vectors[damaged][5] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        search(**vectors)


def test_an_item_that_cannot_be_found_may_have_any_vector(vectors):
    found = search(**vectors)
    vectors["items"][3] = torch.nan
    assert search(**vectors).rank.equal(found.rank)


def test_no_queries_find_nothing(vectors):
    empty = {name: vectors[name][:0] for name in ("query", "bought", "own")}
    assert search(**vectors | empty).rank.shape == (0,)


def test_the_summary_is_that_of_the_definition():
    found = summarize(torch.tensor([1, 10, 11, 200]), num_items=1000)
    assert found["recall_at_1"] == 0.25
    assert found["recall_at_10"] == 0.5
    assert found["recall_at_50"] == 0.75
    assert found["mean_rank"] == pytest.approx(222 / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 200) / 4)
    assert found["chance_at_10"] == 0.01


def test_groups_without_queries_are_left_out():
    found = by_group(torch.tensor([1, 3, 5]), np.array([0, 2, 2]), ["a", "b", "c"], 10)
    assert {name: part["mean_rank"] for name, part in found.items()} == {"a": 1.0, "c": 4.0}


def test_the_exchange_rate_is_the_slope_by_least_squares():
    recall, gain = [0.1, 0.2, 0.4, 0.5], [0.01, 0.03, 0.02, 0.05]
    found = exchange_rate(recall, gain)
    assert found["auc_per_point"] == pytest.approx(np.polyfit(recall, gain, 1)[0] / 100)
    assert found["pearson"] == pytest.approx(np.corrcoef(recall, gain)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)


@pytest.mark.parametrize("recall", [[0.1, 0.2], [0.1, 0.1, 0.1]])
def test_runs_that_say_nothing_have_no_exchange_rate(recall):
    found = exchange_rate(recall, [0.01, 0.02, 0.03][: len(recall)])
    assert found == {"n": len(recall), "auc_per_point": None, "pearson": None, "spearman": None}
