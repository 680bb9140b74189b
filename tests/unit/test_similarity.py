"""The similarity interest and the sharpened relevance against loops; content and id dropout."""

import math

import pytest
import torch
from torch import Tensor

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.content import content_relevance, sharpened
from mim_torchrec.ciubm.similarity import by_masks, similarity_dim, similarity_interest
from mim_torchrec.ciubm.ubm.avg_pooling import AvgPooling
from tests.histories import Case, make_case

TIERS, SPANS = 4, (2, 0)


@pytest.fixture
def case() -> Case:
    return make_case()


def vectors(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    candidates, behaviors = torch.randn(len(case.candidates), 5), torch.randn(len(case.behaviors), 5)
    candidates[1] = 0  # unknown items
    behaviors[2] = behaviors[-1] = 0
    behaviors[5] = candidates[5]  # a relevance of 1
    return candidates.double(), behaviors.double()


def naive(case: Case, relevance: dict[tuple[int, int], float]) -> Tensor:
    rows = []
    for candidates, behaviors in case.requests():
        for t in candidates:
            row = []
            for span in SPANS:
                counts, largest, total, weights = [0] * TIERS, None, 0.0, 0.0
                recent = behaviors[-span:] if span else behaviors
                for i in recent:
                    alpha = relevance[t, i]
                    if alpha == 0:
                        continue
                    counts[min(int((alpha + 1) / 2 * TIERS), TIERS - 1)] += 1
                    largest = alpha if largest is None else max(largest, alpha)
                    weight = 1 / (1 + behaviors[-1] - i)
                    total, weights = total + weight * alpha, weights + weight
                row += [math.log(1 + n) for n in counts]
                row += [largest or 0.0, total / weights if weights else 0.0]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def by_pair(case: Case, relevance: Tensor) -> dict[tuple[int, int], float]:
    pairs = case.pairs
    index = zip(pairs.candidate_index.tolist(), pairs.behavior_index.tolist(), strict=True)
    return dict(zip(index, relevance.tolist(), strict=True))


def test_the_similarity_interest_is_that_of_a_loop(case):
    relevance = content_relevance(*vectors(case), case.pairs).double()
    assert (relevance == 0).any()
    value = similarity_interest(relevance, case.pairs, TIERS, SPANS)
    assert value.shape == (len(case.candidates), similarity_dim(TIERS, SPANS))
    torch.testing.assert_close(value, naive(case, by_pair(case, relevance)))


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-6, -1.0, -1.0 - 1e-6])
def test_a_relevance_at_the_ends_falls_in_the_last_tier(alpha):
    case = make_case((1,), (1,))
    value = similarity_interest(torch.tensor([alpha]), case.pairs, TIERS, (0,))
    assert value[0, :TIERS].nonzero().item() == (TIERS - 1 if alpha > 0 else 0)


def test_an_empty_history_and_one_without_vectors_give_zeros():
    case = make_case((2, 1), (0, 3))
    value = similarity_interest(torch.zeros(3), case.pairs, TIERS, SPANS)
    assert value.shape == (3, similarity_dim(TIERS, SPANS))
    assert not value.any()


@pytest.mark.parametrize(("tiers", "spans"), [(0, (1,)), (3, ()), (3, (5, -1))])
def test_impossible_tiers_and_windows_are_errors(tiers, spans):
    case = make_case((1,), (1,))
    with pytest.raises(ValueError, match="at least one of each, none negative"):
        similarity_interest(torch.ones(1), case.pairs, tiers, spans)


def test_the_sharpened_relevance_and_the_gradient_of_its_temperature_are_those_of_a_loop(case):
    relevance = content_relevance(*vectors(case), case.pairs).double()
    upstream = torch.randn(relevance.shape, generator=torch.Generator().manual_seed(0)).double()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weights = sharpened(relevance, temperature, case.pairs)
    (weights * upstream).sum().backward()

    other = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = []
    for t in range(len(case.candidates)):
        mine = [float(a) for (c, _), a in by_pair(case, relevance).items() if c == t]
        exponentials = [torch.exp(a / other) if a else torch.zeros(()) for a in mine]
        expected += [e / (sum(exponentials) if any(mine) else 1) for e in exponentials]
    expected = torch.stack([e.double() for e in expected])
    (expected * upstream).sum().backward()
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(temperature.grad, other.grad)


def interests(case: Case, model: CiUBM) -> Tensor:
    candidates, behaviors = vectors(case)
    ids = (case.candidates.float(), case.behaviors.float())
    return model(*ids, case.pairs, candidates, behaviors).concatenate()


def test_the_similarity_interest_is_a_fourth_part(case):
    torch.manual_seed(0)
    plain = CiUBM(AvgPooling(8), content=True, fusion=True)
    more = CiUBM(AvgPooling(8), content=True, fusion=True, tiers=TIERS, spans=SPANS)
    three, four = interests(case, plain), interests(case, more)
    assert four.shape[1] == three.shape[1] + more.similarity_dim
    torch.testing.assert_close(four[:, : three.shape[1]], three)


def test_a_low_temperature_gives_the_interest_of_the_most_similar_behavior(case):
    model = CiUBM(None, content=True, fusion=False, temperature=1e-3)
    candidates, behaviors = vectors(case)
    relevance = by_pair(case, content_relevance(candidates, behaviors, case.pairs))
    best = max((i for t, i in relevance if t == 0), key=lambda i: relevance[0, i])
    torch.testing.assert_close(interests(case, model)[0], behaviors[best].float())


def test_content_dropout_leaves_out_all_content_of_a_candidate_in_training_only(case):
    model = CiUBM(None, content=True, fusion=True, tiers=TIERS, spans=(0,), content_dropout=0.5)
    whole = interests(case, model.eval())
    torch.manual_seed(0)
    dropped = interests(case, model.train())
    has_history = case.pairs.history_lengths() > 0
    known = has_history & (vectors(case)[0].abs().sum(1) > 0)
    left_out = (dropped == 0).all(1) & known
    assert 0 < left_out.sum() < known.sum()
    torch.testing.assert_close(dropped[~left_out], whole[~left_out])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"content_dropout": 1.0}, {"content_dropout": -0.1}]
)
def test_an_impossible_temperature_or_dropout_is_an_error(options):
    with pytest.raises(ValueError, match="above 0|below 1"):
        CiUBM(None, content=True, fusion=True, **options)


def test_a_relevance_that_is_no_number_is_not_hidden(case):
    pairs = case.pairs
    relevance = torch.full((pairs.num_pairs,), 0.5)
    relevance[0] = torch.nan
    found = by_masks(relevance, pairs.order[pairs.behavior_index], pairs, TIERS, SPANS)
    largest = found.unflatten(1, (len(SPANS), -1))[:, -1, TIERS]
    assert largest.isnan().sum() == 1
