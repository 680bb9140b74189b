"""Packed pairs: their two orders, choosing some of them, and what is computed on them."""

import pytest
import torch
from torch import Tensor

from mim_torchrec.ciubm.jagged import Pairs, RequestPairs
from mim_torchrec.ciubm.packed import segment_logsumexp, segment_sum
from tests.histories import offsets

CANDIDATES, BEHAVIORS = [2, 3, 1, 0, 2, 1], [3, 0, 1, 2, 70, 50]


@pytest.fixture
def pairs() -> RequestPairs:
    return RequestPairs.build(offsets(CANDIDATES), offsets(BEHAVIORS))


def listed(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.candidate_index.tolist(), pairs.behavior_index.tolist(), strict=True))


def assert_consistent(pairs: Pairs) -> None:
    """Offsets and the order by behavior describe the pairs that are listed."""
    every = listed(pairs)
    for t in range(pairs.num_candidates):
        start, stop = pairs.pair_offsets[t : t + 2].tolist()
        assert every[start:stop] == [pair for pair in every if pair[0] == t]
    order = pairs.by_behavior
    assert [every[p] for p in order.position.tolist()] == sorted(every, key=lambda pair: (pair[1], pair[0]))
    assert order.candidate_index.tolist() == [every[p][0] for p in order.position.tolist()]
    counts = [sum(i == b for _, b in every) for i in range(order.offsets.numel() - 1)]
    assert order.offsets.diff().tolist() == counts


def test_both_orders_list_the_same_pairs(pairs):
    assert_consistent(pairs)


def test_selected_pairs_keep_both_orders(pairs):
    kept = torch.rand(pairs.num_pairs, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen = pairs.select(kept)
    assert listed(chosen) == [pair for pair, keep in zip(listed(pairs), kept.tolist(), strict=True) if keep]
    assert_consistent(chosen)
    again = chosen.select(torch.arange(chosen.num_pairs) % 2 == 0)
    assert listed(again) == listed(chosen)[::2]
    assert_consistent(again)


@pytest.mark.parametrize("k", [1, 2, 3, 33, 69, 70, 100])
def test_top_k_keeps_the_largest_of_each_candidate(pairs, k):
    scores = torch.randn(pairs.num_pairs, generator=torch.Generator().manual_seed(0))
    kept = pairs.top_k(scores, k)
    for t in range(pairs.num_candidates):
        of_t = pairs.candidate_index == t
        largest = sorted(scores[of_t].tolist(), reverse=True)[:k]
        assert sorted(scores[of_t & kept].tolist(), reverse=True) == largest


@pytest.mark.parametrize("value", [0.0, -torch.inf])
def test_top_k_keeps_the_last_of_equal_scores(pairs, value):
    kept = pairs.select(pairs.top_k(torch.full((pairs.num_pairs,), value), 20))
    of = [[pair for pair in listed(pairs) if pair[0] == t] for t in range(pairs.num_candidates)]
    assert listed(kept) == [pair for every in of for pair in every[-20:]]


def test_top_k_keeps_the_last_of_scores_that_equal_the_smallest_kept(pairs):
    scores = torch.randint(3, (pairs.num_pairs,), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 2, 20, 60):
        kept = pairs.top_k(scores, k)
        for t in range(pairs.num_candidates):
            of_t = (pairs.candidate_index == t).nonzero().squeeze(1).tolist()
            best = sorted(of_t, key=lambda place: (-scores[place].item(), -place))[:k]
            assert [place for place in of_t if kept[place]] == sorted(best)


def test_top_k_keeps_what_is_not_a_number_for_the_loss_to_show(pairs):
    assert pairs.top_k(torch.full((pairs.num_pairs,), torch.nan), 2).all()


def test_a_list_of_the_best_is_short_where_few_pairs_are_left_out(pairs):
    # candidates have 3, 3, 1, 70, 70 and 50 pairs, besides three without
    assert pairs.num_pairs == 197
    assert [pairs.num_kept(k) for k in (1, 50, 69)] == [6, 157, 195]
    assert [pairs.is_short(k, uses=1) for k in (1, 50, 69)] == [False, True, True]
    assert [pairs.is_short(50, uses) for uses in (3, 4)] == [True, False]


def test_recent_keeps_the_last_behaviors_of_each_request(pairs):
    kept, shorter = pairs.recent(2)
    assert kept.tolist() == [1, 2, 3, 4, 5, 74, 75, 124, 125]
    assert listed(shorter) == listed(RequestPairs.build(offsets(CANDIDATES), offsets([2, 0, 1, 2, 2, 2])))


def test_order_counts_the_behaviors_that_follow(pairs):
    assert pairs.order.tolist() == [2, 1, 0, 0, 1, 0, *range(69, -1, -1), *range(49, -1, -1)]


def naive(name: str, pairs: Pairs, candidates: Tensor, behaviors: Tensor, weights: Tensor) -> Tensor:
    rows = behaviors[pairs.behavior_index] * candidates[pairs.candidate_index]
    of = [weights[pairs.candidate_index == t] for t in range(pairs.num_candidates)]
    if name == "inner_products":
        return rows.sum(-1)
    if name == "segment_softmax":
        return torch.cat([w.softmax(0) for w in of])
    if name == "segment_logsumexp":
        return torch.stack([w.logsumexp(0) for w in of])
    terms = rows if name == "segment_sum" else behaviors[pairs.behavior_index] * weights[:, None]
    return torch.stack([terms[pairs.candidate_index == t].sum(0) for t in range(pairs.num_candidates)])


def packed(name: str, pairs: Pairs, candidates: Tensor, behaviors: Tensor, weights: Tensor) -> Tensor:
    if name == "inner_products":
        return pairs.inner_products(candidates, behaviors)
    if name == "segment_softmax":
        return pairs.segment_softmax(weights)
    if name == "segment_logsumexp":
        return segment_logsumexp(weights, pairs)
    if name == "weighted_sum":
        return pairs.weighted_sum(behaviors, weights)
    rows = behaviors[pairs.behavior_index] * candidates[pairs.candidate_index]
    return segment_sum(rows, pairs)


@pytest.mark.parametrize(
    "name", ["inner_products", "segment_softmax", "segment_logsumexp", "weighted_sum", "segment_sum"]
)
@pytest.mark.parametrize("chosen", ["all", "some"])
def test_packed_operations_and_their_gradients_are_those_of_the_naive_form(pairs, name, chosen):
    torch.manual_seed(0)
    some = pairs if chosen == "all" else pairs.select(torch.rand(pairs.num_pairs) < 0.3)
    shapes = (sum(CANDIDATES), 4), (sum(BEHAVIORS), 4), (some.num_pairs,)
    inputs = [(torch.randn(shape).double() * 10).requires_grad_() for shape in shapes]
    actual, expected = packed(name, some, *inputs), naive(name, some, *inputs)
    if name == "segment_logsumexp":  # where there is nothing, ours is finite
        filled = some.history_lengths() > 0
        assert actual[~filled].isfinite().all()
        actual, expected = actual[filled], expected[filled]
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    upstream = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((out * upstream).sum(), inputs, allow_unused=True) for out in (actual, expected)
    ]
    for a, e in zip(*gradients, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["inner_products", "weighted_sum"])
def test_rows_of_half_precision_are_multiplied_without_the_kernel_that_refuses_them(pairs, name):
    torch.manual_seed(0)
    shapes = (sum(CANDIDATES), 4), (sum(BEHAVIORS), 4), (pairs.num_pairs,)
    low = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    high = [each.detach().float().requires_grad_() for each in low]
    actual, expected = (packed(name, pairs, *inputs) for inputs in (low, high))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.02)
    for out in (actual, expected):
        out.float().sum().backward()
    for a, e in zip(low, high, strict=True):
        if e.grad is not None:
            torch.testing.assert_close(a.grad.float(), e.grad, atol=0.5, rtol=0.05)
