"""The loss against a loop written from Eq. 5 and 6, and against those of other libraries."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mim_torchrec.losses.alignment import ImageTextContrastive
from mim_torchrec.losses.contrast import InfoNCE, Level, contrast, unit
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE

N, D = 5, 7


def info_nce(
    query: Tensor, items: Tensor, item_ids: Tensor, query_ids: Tensor, scale: Tensor, mask_same_item: bool
) -> InfoNCE:
    """One level without a queue; arguments as in `MultiLevelInfoNCE`, of vectors of any length."""
    level = Level(unit(query), unit(items))
    return contrast([level], item_ids, scale, own_ids=query_ids, mask_same_item=mask_same_item)[0]


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


def differentiable_eq_5(query, items, scale, counts):
    """Eq. 5 one query and one item at a time; counts(i, j) says whether item j is in the sum of query i."""
    losses = []
    for i in range(len(query)):
        scores = [
            scale * (query[i] @ item) / query[i].norm() / item.norm() if counts(i, j) else None
            for j, item in enumerate(items)
        ]
        losses.append(
            torch.stack([score for score in scores if score is not None]).exp().sum().log() - scores[i]
        )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mask", [True, False])
def test_loss_and_gradients_are_within_1e_5_of_eq_5_and_6_in_double_precision(mask):
    ids, own = torch.tensor([4, 4, 6, 7, 8, 1, 2, 6, 3, 4]), torch.tensor([3, -1, 1, -1, 8])
    loss = MultiLevelInfoNCE(alpha=0.5, beta=0.25, gamma=0.7, mask_same_item=mask)
    inputs = [vectors(0, N), *(vectors(seed, 2 * N) for seed in (1, 2, 3)), vectors(4, N), loss.log_scale]
    query, mm, text, image, query_mm, _ = inputs
    total, _ = loss(query, mm, text, image, ids, own, query_mm)
    found = torch.autograd.grad(total, inputs)

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, mm, text, image, query_mm, log_scale = doubles

    def counts(i, j):
        return i == j or not mask or int(ids[j]) not in (int(ids[i]), int(own[i]))

    def eq(source, items):
        return differentiable_eq_5(source, items, log_scale.exp(), counts)

    expected = eq(query, mm) + 0.5 * eq(query, text) + 0.25 * eq(query, image) + 0.7 * eq(query_mm, mm)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(expected, doubles), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


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


@pytest.mark.parametrize(("sizes", "message"), [
    ((N, N - 1, N - 1), "rank 0 has 5 queries, 4 items and 4 item ids"),
    ((N, 2 * N, N), "rank 0 has 5 queries, 10 items and 5 item ids"),
])  # fmt: skip
def test_items_without_a_positive_or_an_id_are_refused(sizes, message):
    queries, items, ids = sizes
    with pytest.raises(ValueError, match=message):
        info_nce(vectors(0, queries), vectors(1, items), torch.arange(ids), torch.full((queries,), -1),
                 torch.tensor(1.0), mask_same_item=True)  # fmt: skip


@pytest.fixture(scope="module")
def open_clip_loss():
    from open_clip.loss import ClipLoss  # takes seconds to load

    return ClipLoss()


def test_without_hard_negatives_it_is_the_image_to_text_half_of_open_clip(open_clip_loss):
    query, items, scale = vectors(0, N), vectors(1, N), torch.tensor(14.0, requires_grad=True)
    ours = info_nce(query, items, torch.arange(N), torch.full((N,), -1), scale, mask_same_item=False).loss
    per_image, _ = open_clip_loss.get_logits(F.normalize(query, dim=1), F.normalize(items, dim=1), scale)
    theirs = F.cross_entropy(per_image, torch.arange(N))
    torch.testing.assert_close(ours, theirs)
    inputs = (query, items, scale)
    for one, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_alignment_of_images_and_texts_is_the_loss_of_open_clip(open_clip_loss):
    image, text, loss = vectors(0, N), vectors(1, N), ImageTextContrastive()
    ours, report = loss(image, text, torch.arange(N))
    scale = loss.log_scale.exp()
    theirs = open_clip_loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
    torch.testing.assert_close(ours, theirs)
    assert float(report["negatives"]) == N - 1
    inputs = (image, text, loss.log_scale)
    for one, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_images_and_texts_of_the_same_item_are_no_negatives_of_each_other():
    image, text, ids = vectors(0, N), vectors(1, N), torch.tensor([3, 3, 5, 6, 3])
    total, _ = ImageTextContrastive(temperature=0.5)(image, text, ids)
    left_out = {(i, j) for i in range(N) for j in range(N) if i != j and ids[i] == ids[j]}
    expected = (eq_5(image, text, 0.5, left_out) + eq_5(text, image, 0.5, left_out)) / 2
    assert float(total.detach()) == pytest.approx(expected, abs=1e-5)
    unmasked, _ = ImageTextContrastive(temperature=0.5, mask_same_item=False)(image, text, ids)
    expected = (eq_5(image, text, 0.5) + eq_5(text, image, 0.5)) / 2
    assert float(unmasked.detach()) == pytest.approx(expected, abs=1e-5)


class Embedded(torch.nn.Module):
    """What sentence-transformers takes for a model, of texts that are vectors already."""

    def forward(self, features):
        return {"sentence_embedding": features["vector"]}


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_with_hard_negatives_it_is_the_ranking_loss_of_sentence_transformers(name):
    from sentence_transformers.sentence_transformer import losses  # takes seconds to load

    query, items = vectors(0, N), vectors(1, 2 * N)
    ours = info_nce(query, items, torch.arange(2 * N), torch.full((N,), -1), torch.tensor(20.0), True).loss
    expected = torch.autograd.grad(ours, (query, items))
    texts = [{"vector": part} for part in (query, items[:N], items[N:])]
    theirs = getattr(losses, name)(torch.nn.Sequential(Embedded()), scale=20.0)(texts, None)
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=1e-5)
    theirs.backward()
    for one, other in zip(expected, (query.grad, items.grad), strict=True):
        torch.testing.assert_close(one, other)
