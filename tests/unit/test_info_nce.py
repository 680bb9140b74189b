"""The loss against a loop written from Eq. 5 and 6."""

import math

import pytest
import torch

from mim_torchrec.losses.info_nce import MultiLevelInfoNCE, info_nce

N, D = 5, 7


def vectors(seed: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def cosine(a, b):
    a, b = a.detach(), b.detach()
    return float((a * b).sum() / (a.norm() * b.norm()))


def eq_5(query, items, tau, left_out=()):
    """Mean over queries of -log(exp(sim(q, h+) / tau) / sum_j exp(sim(q, h_j) / tau)), j from 0: with h+."""
    total = 0.0
    for i in range(len(query)):
        similarities = {
            j: cosine(query[i], items[j]) / tau for j in range(len(items)) if (i, j) not in left_out
        }
        total -= math.log(math.exp(similarities[i]) / sum(math.exp(s) for s in similarities.values()))
    return total / len(query)


def test_eq_5_and_eq_6_as_printed():
    query, mm, text, image = vectors(0, N), vectors(1, 2 * N), vectors(2, 2 * N), vectors(3, 2 * N)
    loss = MultiLevelInfoNCE(alpha=0.5, beta=0.25, temperature=1.0)
    total, report = loss(query, mm, text, image, torch.arange(2 * N))
    expected = eq_5(query, mm, 1.0) + 0.5 * eq_5(query, text, 1.0) + 0.25 * eq_5(query, image, 1.0)
    assert float(total.detach()) == pytest.approx(expected, abs=1e-5)
    assert float(report["negatives"]) == 2 * N - 1


def test_the_item_level_is_added_with_gamma():
    query, mm, query_mm = vectors(0, N), vectors(1, 2 * N), vectors(2, N)
    loss = MultiLevelInfoNCE(alpha=0.0, beta=0.0, gamma=0.5, temperature=0.1)
    total, _ = loss(query, mm, mm, mm, torch.arange(2 * N), None, query_mm)
    expected = eq_5(query, mm, 0.1) + 0.5 * eq_5(query_mm, mm, 0.1)
    assert float(total.detach()) == pytest.approx(expected, abs=1e-5)


def test_a_fixed_temperature_divides_the_similarities():
    query, mm = vectors(0, N), vectors(1, 2 * N)
    total, _ = MultiLevelInfoNCE(alpha=0, beta=0, temperature=0.2)(query, mm, mm, mm, torch.arange(2 * N))
    assert float(total.detach()) == pytest.approx(eq_5(query, mm, 0.2), abs=1e-5)


def test_the_same_item_once_more_is_no_negative():
    query, items = vectors(0, N), vectors(1, 2 * N)
    ids = torch.tensor([4, 4, 6, 7, 8, 1, 2, 6, 3, 4])  # pairs 0 and 1, negatives 7 (of 2) and 9 (of 0, 1)
    nobody = torch.full((N,), -1)
    result = info_nce(query, items, ids, nobody, torch.tensor(2.0), mask_same_item=True)
    left_out = {(0, 1), (1, 0), (0, 9), (1, 9), (2, 7)}
    assert float(result.loss.detach()) == pytest.approx(eq_5(query, items, 0.5, left_out), abs=1e-5)
    assert float(result.negatives) == pytest.approx(2 * N - 1 - len(left_out) / N)


def test_the_query_itself_is_no_negative():
    query, items = vectors(0, N), vectors(1, 2 * N)
    own = torch.tensor([3, -1, 9, -1, -1])
    result = info_nce(query, items, torch.arange(2 * N), own, torch.tensor(2.0), mask_same_item=True)
    assert float(result.loss.detach()) == pytest.approx(eq_5(query, items, 0.5, {(0, 3), (2, 9)}), abs=1e-5)


def test_the_paper_counts_the_same_item_as_a_negative():
    query, items = vectors(0, N), vectors(1, 2 * N)
    ids = torch.ones(2 * N, dtype=torch.int64)
    result = info_nce(query, items, ids, ids[:N], torch.tensor(2.0), mask_same_item=False)
    assert float(result.loss.detach()) == pytest.approx(eq_5(query, items, 0.5), abs=1e-5)
    assert float(result.negatives) == 2 * N - 1


def test_accuracy_is_the_share_of_queries_whose_positive_is_first():
    items = torch.eye(2 * N)
    query = items[:N].clone()
    query[0] = items[N]  # its hard negative
    result = info_nce(query, items, torch.arange(2 * N), torch.full((N,), -1), torch.tensor(1.0), True)
    assert float(result.accuracy) == pytest.approx(1 - 1 / N)


def test_a_batch_of_one_item_only_has_no_loss_and_a_finite_gradient():
    query, items = vectors(0, N), vectors(1, 2 * N)
    ids = torch.ones(2 * N, dtype=torch.int64)
    result = info_nce(query, items, ids, torch.full((N,), -1), torch.tensor(2.0), mask_same_item=True)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(query.grad).all() and torch.isfinite(items.grad).all()


def test_a_learned_scale_starts_at_the_temperature_of_clip_and_stays_at_most_100():
    loss = MultiLevelInfoNCE()
    assert float(loss.log_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    mm = vectors(1, 2 * N)
    _, report = loss(vectors(0, N), mm, mm, mm, torch.arange(2 * N))
    assert float(report["scale"]) == pytest.approx(100, rel=1e-5)


def test_a_fixed_temperature_has_no_parameter():
    assert not list(MultiLevelInfoNCE(temperature=0.1).parameters())
