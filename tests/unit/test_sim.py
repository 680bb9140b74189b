"""SIM against its equations, one candidate at a time."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mim_torchrec.ciubm.jagged import Pairs
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from mim_torchrec.ciubm.ubm.sim import SIM
from tests.histories import Case, assert_same_with_gradients, make_case, naive_value

DIM, HEADS = 8, 2


def build(heads: int = HEADS, **options) -> SIM:
    torch.manual_seed(2)
    return SIM(DIM, heads=heads, recency_dim=3, **options).double()


def naive_search(model: SIM, case: Case, candidate: Tensor, behaviors: list[int], t: int) -> list[int]:
    """The general search unit."""
    context = case.context
    if model.search == "hard":
        category = int(context.candidate_categories[t])
        same = [i for i in behaviors if category and int(context.behavior_categories[i]) == category]
        return same[-model.top_k :]
    a = b = torch.eye(DIM, dtype=torch.float64)
    if model.auxiliary:
        a, b = model.search_query.weight, model.search_key.weight
    relevance = {i: ((b @ case.behaviors[i]) @ (a @ candidate)).item() for i in behaviors}
    return sorted(sorted(behaviors, key=lambda i: -relevance[i])[: model.top_k])


def naive_sim(model: SIM, case: Case) -> Tensor:
    def interest(candidate: Tensor, _: Tensor, behaviors: list[int], t: int) -> Tensor:
        found = naive_search(model, case, candidate, behaviors, t)
        if not found:
            return candidate.new_zeros(model.out_dim)
        buckets = recency_buckets(BehaviorContext(recency=case.context.recency[found]), "SIM")
        z = torch.cat([case.behaviors[found], model.recency.weight[buckets]], dim=1)
        heads = []
        for w_a, w_b in zip(*(x.weight.chunk(model.heads) for x in (model.query, model.key)), strict=True):
            heads.append(((z @ w_b.T) @ (w_a @ candidate)).softmax(0) @ z)
        return torch.cat(heads)

    return naive_value(case, interest, model.out_dim)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("options", [{"search": "hard"}, {}, {"auxiliary": False}])
def test_sim_equals_its_equations(options, top_k):
    model = build(top_k=top_k, **options)
    assert_same_with_gradients(make_case(), model, lambda case: naive_sim(model, case))


@pytest.mark.parametrize(
    "shape", [((2, 3, 1, 1, 2), (3, 0, 1, 9, 5)), ((9, 7), (3, 4)), ((1, 1, 1), (9, 0, 20))]
)
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_sim_equals_its_equations_however_it_lists_pairs(monkeypatch, shape, short, heads):
    monkeypatch.setattr(Pairs, "is_short", lambda *_, **__: short)
    model = build(heads, top_k=2)
    assert_same_with_gradients(make_case(*shape), model, lambda case: naive_sim(model, case))


def test_the_auxiliary_task_predicts_the_click_from_the_relevant_history():
    model = build(top_k=2)
    case = make_case()
    a, b = model.search_query.weight, model.search_key.weight

    def pooled(candidate: Tensor, history: Tensor, *_) -> Tensor:
        return sum((torch.dot(b @ e, a @ candidate) * e for e in history), torch.zeros(DIM).double())

    rows = torch.cat([naive_value(case, pooled, DIM), case.candidates], dim=1)
    auxiliary = case.run(model).auxiliary
    assert auxiliary.targets is None
    torch.testing.assert_close(auxiliary.logits, model.click(rows).squeeze(1), atol=1e-9, rtol=0)


def test_searching_alike_gives_the_same_in_evaluation():
    model = build(top_k=2)
    trained = make_case().run(model)
    evaluated = make_case().run(model.eval())
    torch.testing.assert_close(evaluated.value, trained.value)
    assert evaluated.auxiliary is None


def test_an_unknown_category_matches_nothing():
    case = make_case((1,), (2,))
    unknown = dataclasses.replace(
        case.context, candidate_categories=torch.tensor([0]), behavior_categories=torch.tensor([0, 1])
    )
    assert dataclasses.replace(case, context=unknown).run(build(search="hard")).value.abs().sum() == 0


def test_a_hard_search_without_categories_is_refused():
    case = make_case()
    context = BehaviorContext(recency=case.context.recency)
    with pytest.raises(ValueError, match="categories of candidates and behaviors"):
        dataclasses.replace(case, context=context).run(build(search="hard"))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"attention_dim": 3}, {"search": "medium"}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="impossible|'soft' or 'hard'"):
        build(**options)
