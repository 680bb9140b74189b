"""TWIN against its equations, one candidate and one head at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.jagged import Pairs
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from mim_torchrec.ciubm.ubm.twin import TWIN
from tests.histories import Case, assert_same_with_gradients, make_case, naive_value

DIM, HEADS = 8, 2


def build(top_k: int, heads: int = HEADS, **options) -> TWIN:
    torch.manual_seed(2)
    model = TWIN(DIM, top_k=top_k, heads=heads, recency_dim=3, **options).double()
    torch.nn.init.normal_(model.cross_weight)
    return model


def cross_features(model: TWIN, case: Case, behaviors: list[int]) -> Tensor:
    return model.recency.weight[
        recency_buckets(BehaviorContext(recency=case.context.recency[behaviors]), "TWIN")
    ]


def naive_twin(model: TWIN, case: Case) -> Tensor:
    def interest(candidate: Tensor, k_h: Tensor, behaviors: list[int], _: int) -> Tensor:
        k_c = cross_features(model, case, behaviors)
        heads = []
        for head in range(model.heads):
            w_q, w_h, w_v = (w.weight.chunk(model.heads)[head] for w in (model.query, model.key, model.value))
            w_c, beta = model.cross.weight[head], model.cross_weight[head]
            alpha = (k_h @ w_h.T) @ (w_q @ candidate) / math.sqrt(w_q.shape[0]) + (k_c @ w_c) * beta
            top = alpha.topk(min(model.top_k, len(behaviors)))
            heads.append(top.values.softmax(0) @ (torch.cat([k_h, k_c], dim=1) @ w_v.T)[top.indices])
        return model.out.weight @ torch.cat(heads)

    return naive_value(case, interest, DIM)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 50])
def test_twin_equals_its_equations(top_k):
    model = build(top_k)
    assert_same_with_gradients(make_case(), model, lambda case: naive_twin(model, case))


@pytest.mark.parametrize(
    "shape", [((2, 3, 1, 1, 2), (3, 0, 1, 9, 5)), ((9, 7), (3, 4)), ((1, 1, 1), (9, 0, 20))]
)
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_twin_equals_its_equations_however_it_lists_pairs(monkeypatch, shape, short, heads):
    monkeypatch.setattr(Pairs, "is_short", lambda *_, **__: short)
    model = build(2, heads)
    assert_same_with_gradients(make_case(*shape), model, lambda case: naive_twin(model, case))


def test_twin_that_keeps_everything_is_full_target_attention():
    case, model = make_case(), build(top_k=9)

    def interest(candidate: Tensor, history: Tensor, behaviors: list[int], _: int) -> Tensor:
        k_c = cross_features(model, case, behaviors)
        bias = (k_c @ model.cross.weight.T * model.cross_weight).T[:, None]
        q, k, v = (
            x.view(-1, HEADS, DIM // HEADS).transpose(0, 1)
            for x in (model.query(candidate), model.key(history), model.value(torch.cat([history, k_c], 1)))
        )
        return model.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).flatten())

    torch.testing.assert_close(case.run(model).value, naive_value(case, interest, DIM), atol=1e-9, rtol=0)


def test_heads_may_keep_different_behaviors():
    case, model = make_case((1,), (6,)), build(top_k=1)
    model.out.weight.data = torch.eye(DIM).double()
    values = model.value(torch.cat([case.behaviors, cross_features(model, case, list(range(6)))], dim=1))
    chosen = []
    for part, all_values in zip(case.run(model).value[0].chunk(HEADS), values.chunk(HEADS, 1), strict=True):
        chosen.append([i for i in range(6) if torch.allclose(all_values[i], part)])
    assert [len(c) for c in chosen] == [1, 1]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 1, "attention_dim": 3}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="impossible"):
        build(**options)
