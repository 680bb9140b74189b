"""CiUBM (Eq. 1, 7, 8, 9) against loops written from the paper."""

import math

import pytest
import torch
from torch import Tensor

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.content import content_relevance, relevant_interest
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.activation import Dice, PReLU
from mim_torchrec.ciubm.ubm.avg_pooling import AvgPooling
from mim_torchrec.ciubm.ubm.din import DIN

CANDIDATES = [2, 3, 1, 1]
BEHAVIORS = [3, 0, 1, 4]
DIM, MM_DIM = 6, 5


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.fixture
def pairs() -> RequestPairs:
    return RequestPairs.build(offsets(CANDIDATES), offsets(BEHAVIORS))


@pytest.fixture
def ids() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(sum(CANDIDATES), DIM), torch.randn(sum(BEHAVIORS), DIM)


@pytest.fixture
def mm() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    candidates, behaviors = torch.randn(sum(CANDIDATES), MM_DIM), torch.randn(sum(BEHAVIORS), MM_DIM)
    candidates[0] = 0  # an unknown item
    behaviors[1] = 0
    return candidates, behaviors


def requests() -> list[tuple[list[int], list[int]]]:
    """Candidates and behaviors of each request, by a plain loop."""
    out, c, b = [], 0, 0
    for n, m in zip(CANDIDATES, BEHAVIORS, strict=True):
        out.append((list(range(c, c + n)), list(range(b, b + m))))
        c, b = c + n, b + m
    return out


def naive_cosine(x: Tensor, y: Tensor) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    norms = math.sqrt(sum(float(a) ** 2 for a in x)) * math.sqrt(sum(float(b) ** 2 for b in y))
    return dot / norms if norms else 0.0


def naive_weighted(mm_candidates: Tensor, mm_behaviors: Tensor, values: Tensor, mean: bool = False) -> Tensor:
    rows = []
    for candidates, behaviors in requests():
        for t in candidates:
            total = torch.zeros(values.shape[1])
            for i in behaviors:
                total += naive_cosine(mm_candidates[t], mm_behaviors[i]) * values[i]
            rows.append(total / len(behaviors) if mean and behaviors else total)
    return torch.stack(rows)


def unit(model: DIN, row: Tensor) -> Tensor:
    return model.last(model.activation(model.middle(model.first(row)[None]))).squeeze()


def naive_din(model: DIN, candidates: Tensor, behaviors: Tensor) -> Tensor:
    """Eq. 1 with the attention unit on [q, s, q - s, q * s], a pair at a time."""
    rows = []
    for cs, bs in requests():
        for t in cs:
            q = candidates[t]
            scores = [unit(model, torch.cat([q, s, q - s, q * s])) for s in (behaviors[i] for i in bs)]
            weights = torch.stack(scores).softmax(0) if scores and model.softmax else scores
            rows.append(sum((w * behaviors[i] for w, i in zip(weights, bs, strict=True)), torch.zeros(DIM)))
    return torch.stack(rows)


def test_pairs_join_candidates_with_behaviors_of_their_own_request(pairs):
    expected = [(t, i) for cs, bs in requests() for t in cs for i in bs]
    assert list(zip(pairs.candidate_index.tolist(), pairs.behavior_index.tolist(), strict=True)) == expected


def test_pairs_refuse_offsets_of_different_numbers_of_requests():
    with pytest.raises(ValueError, match="2 requests but behaviors to 1"):
        RequestPairs.build(torch.tensor([0, 1, 2]), torch.tensor([0, 1]))


def test_segment_softmax_sums_to_one_for_each_candidate_with_behaviors(pairs):
    weights = pairs.segment_softmax(torch.randn(pairs.num_pairs) * 50)
    sums = torch.zeros(pairs.num_candidates).index_add(0, pairs.candidate_index, weights)
    torch.testing.assert_close(sums, (pairs.history_lengths() > 0).float())


def test_weighted_sum_has_the_gradients_of_index_add(pairs, ids):
    weights = torch.randn(pairs.num_pairs, requires_grad=True)
    values = ids[1].clone().requires_grad_()
    upstream = torch.randn(pairs.num_candidates, DIM)
    terms = values[pairs.behavior_index] * weights[:, None]
    naive = torch.zeros(pairs.num_candidates, DIM).index_add(0, pairs.candidate_index, terms)
    expected = torch.autograd.grad((naive * upstream).sum(), (values, weights))
    actual = torch.autograd.grad((pairs.weighted_sum(values, weights) * upstream).sum(), (values, weights))
    torch.testing.assert_close(actual, expected)


def test_eq1_average_pooling_is_the_mean_of_the_behaviors(pairs, ids):
    actual = AvgPooling(DIM)(*ids, pairs).value
    rows = []
    for cs, bs in requests():
        rows += [sum((ids[1][i] for i in bs), torch.zeros(DIM)) / max(len(bs), 1)] * len(cs)
    torch.testing.assert_close(actual, torch.stack(rows))


@pytest.mark.parametrize("softmax", [False, True])
def test_eq1_din_equals_the_attention_unit_applied_to_one_pair_at_a_time(pairs, ids, softmax):
    torch.manual_seed(2)
    model = DIN(DIM, hidden=(8, 4), softmax=softmax)
    torch.testing.assert_close(model(*ids, pairs).value, naive_din(model, *ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softmax", [False, True])
def test_din_with_a_folded_first_layer_has_the_gradients_of_the_naive_form(pairs, ids, softmax):
    torch.manual_seed(2)
    model = DIN(DIM, hidden=(8, 4), softmax=softmax)
    inputs = [x.clone().requires_grad_() for x in ids]
    wanted = [*inputs, *model.parameters()]
    upstream = torch.randn(sum(CANDIDATES), DIM)
    expected = torch.autograd.grad((naive_din(model, *inputs) * upstream).sum(), wanted)
    actual = torch.autograd.grad((model(*inputs, pairs).value * upstream).sum(), wanted)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_prelu_has_the_gradients_of_torchs_own():
    torch.manual_seed(3)
    x = torch.randn(50, 4, requires_grad=True)
    ours, theirs = PReLU(), torch.nn.PReLU()
    actual = torch.autograd.grad(ours(x).pow(2).sum(), (x, ours.weight))
    expected = torch.autograd.grad(theirs(x).pow(2).sum(), (x, theirs.weight))
    torch.testing.assert_close(actual, expected)


def test_dice_gates_by_batch_statistics():
    torch.manual_seed(3)
    x = torch.randn(50, 4) * 3 + 1
    dice = Dice(4)
    torch.nn.init.constant_(dice.slope, 0.3)
    p = torch.sigmoid((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * 0.3 * x)


def test_eq7_relevance_is_the_cosine_and_zero_for_unknown_items(pairs, mm):
    expected = [naive_cosine(mm[0][t], mm[1][i]) for cs, bs in requests() for t in cs for i in bs]
    torch.testing.assert_close(content_relevance(*mm, pairs), torch.tensor(expected))
    assert expected[0] == expected[4] == 0.0


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_eq7_content_interest_weights_multi_modal_vectors_by_relevance(pairs, mm, pooling):
    actual = relevant_interest(mm[1], content_relevance(*mm, pairs), pairs, pooling)
    torch.testing.assert_close(actual, naive_weighted(*mm, mm[1], mean=pooling == "mean"))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_eq8_fusion_interest_weights_id_embeddings_by_relevance(pairs, ids, mm, pooling):
    actual = relevant_interest(ids[1], content_relevance(*mm, pairs), pairs, pooling)
    torch.testing.assert_close(actual, naive_weighted(*mm, ids[1], mean=pooling == "mean"))


def test_eq9_concatenates_id_content_and_fusion_interest(pairs, ids, mm):
    torch.manual_seed(4)
    ubm = DIN(DIM, hidden=(8, 4))
    actual = CiUBM(ubm, content=True, fusion=True)(*ids, pairs, *mm).concatenate()
    expected = torch.cat(
        [naive_din(ubm, *ids), naive_weighted(*mm, mm[1]), naive_weighted(*mm, ids[1])], dim=1
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("with_id", [False, True])
def test_ablations_drop_their_part_only(pairs, ids, mm, content, fusion, with_id):
    if not (content or fusion or with_id):
        with pytest.raises(ValueError, match="at least one"):
            CiUBM(None, content=False, fusion=False)
        return
    interests = CiUBM(AvgPooling(DIM) if with_id else None, content=content, fusion=fusion)(*ids, pairs, *mm)
    parts = [interests.id, interests.content, interests.fusion]
    assert [part is not None for part in parts] == [with_id, content, fusion]
    width = DIM * with_id + MM_DIM * content + DIM * fusion
    assert interests.concatenate().shape == (sum(CANDIDATES), width)


def test_interests_without_vectors_are_refused(pairs, ids):
    with pytest.raises(ValueError, match="need multi-modal vectors"):
        CiUBM(None, content=True, fusion=False)(*ids, pairs)


def test_frozen_vectors_need_no_gradient_and_id_embeddings_get_theirs(pairs, ids, mm):
    behaviors = ids[1].clone().requires_grad_()
    interests = CiUBM(None, content=True, fusion=True)(ids[0], behaviors, pairs, *mm)
    assert not interests.content.requires_grad
    interests.fusion.sum().backward()
    assert behaviors.grad is not None and behaviors.grad.abs().sum() > 0


def test_vectors_that_are_trained_get_the_gradients_of_the_equations(pairs, ids, mm):
    def trained() -> list[Tensor]:
        return [x.double().requires_grad_() for x in (ids[1], mm[0][1:], mm[1])]

    def loss(content: Tensor, fusion: Tensor) -> Tensor:
        weights = torch.arange(1.0, 1 + sum(CANDIDATES), dtype=torch.float64)[:, None]
        return (weights * content).sum() + (weights * fusion.square()).sum()

    behaviors, candidates_mm, behaviors_mm = inputs = trained()
    unknown = torch.zeros(1, MM_DIM, dtype=torch.float64)
    own = CiUBM(None, content=True, fusion=True)(
        ids[0], behaviors, pairs, torch.cat([unknown, candidates_mm]), behaviors_mm
    )
    loss(own.content, own.fusion).backward()
    naive = behaviors, candidates_mm, behaviors_mm = trained()
    content, fusion = [], []
    for cs, bs in requests():
        for c in cs:
            alpha = [
                torch.cosine_similarity(behaviors_mm[b], candidates_mm[c - 1], dim=0)
                if c and mm[1][b].any() else torch.zeros(())
                for b in bs
            ]  # fmt: skip
            for sums, values in ((content, behaviors_mm), (fusion, behaviors)):
                rows = [a * values[b] for a, b in zip(alpha, bs, strict=True)]
                sums.append(sum(rows, torch.zeros(values.shape[1], dtype=torch.float64)))
    loss(torch.stack(content), torch.stack(fusion)).backward()
    for x, y, known in zip(inputs, naive, (slice(None), slice(None), mm[1].any(1)), strict=True):
        torch.testing.assert_close(x.grad[known].float(), y.grad[known].float())


@pytest.mark.parametrize(
    "ubm", [AvgPooling(DIM), DIN(DIM, hidden=(8, 4)), DIN(DIM, hidden=(8,), softmax=True)]
)
def test_empty_histories_give_zeros_and_zero_gradients(ubm):
    pairs = RequestPairs.build(torch.tensor([0, 2, 3]), torch.tensor([0, 0, 0]))
    candidates, behaviors = torch.randn(3, DIM), torch.zeros(0, DIM, requires_grad=True)
    interests = CiUBM(ubm, content=True, fusion=True)(
        candidates, behaviors, pairs, torch.randn(3, MM_DIM), torch.zeros(0, MM_DIM)
    )
    out = interests.concatenate()
    assert out.abs().sum() == 0
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in ubm.parameters())
