"""BST against a transformer layer over one candidate's whole sequence."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.ubm.bst import BST, attend_at_once
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from tests.histories import Case, assert_same_with_gradients, make_case, naive_value

DIM, HEADS = 8, 2


def build(**options) -> BST:
    torch.manual_seed(2)
    return BST(DIM, heads=HEADS, **options).double()


def naive_bst(model: BST, case: Case) -> Tensor:
    """Eq. 1-6 over the sequence of the last behaviors and the target."""

    def interest(candidate: Tensor, _: Tensor, behaviors: list[int], __: int) -> Tensor:
        behaviors = behaviors[-model.max_positions :]
        buckets = recency_buckets(BehaviorContext(recency=case.context.recency[behaviors]), "BST")
        e = torch.cat([case.behaviors[behaviors], candidate[None]])
        e = e + model.position.weight[torch.cat([buckets, torch.tensor([64])])]
        projected = model.projection(e).view(-1, 3, HEADS, DIM // HEADS)
        q, k, v = projected.permute(1, 2, 0, 3)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        s = model.attention_norm(e + model.out(heads))
        outputs = model.norm(s + model.narrow(F.leaky_relu(model.widen(s))))
        return torch.cat([outputs[-1], outputs[:-1].mean(0)])

    return naive_value(case, interest, 2 * DIM)


@pytest.mark.parametrize("max_positions", [1, 3, 50])
def test_bst_equals_a_transformer_layer_over_each_candidates_sequence(max_positions):
    model = build(max_positions=max_positions)
    assert_same_with_gradients(make_case(), model, lambda case: naive_bst(model, case))


def test_bst_equals_it_where_lengths_fall_into_several_groups():
    model = build(feedforward=12)
    case = make_case((2, 1, 2, 1), (17, 8, 30, 9))
    assert_same_with_gradients(case, model, lambda case: naive_bst(model, case))


@pytest.mark.parametrize("max_positions", [3, 50])
def test_all_heads_and_histories_at_once_as_on_a_gpu_equal_it_too(monkeypatch, max_positions):
    model = build(max_positions=max_positions)
    monkeypatch.setattr(model, "_attend", lambda *arguments: attend_at_once(*arguments, HEADS))
    assert_same_with_gradients(make_case(), model, lambda case: naive_bst(model, case))
    nothing = make_case(num_behaviors=(0, 0, 0, 0, 0)).with_gradient()
    interest = nothing.run(model).value
    interest.sum().backward()
    assert not interest.any() and not nothing.candidates.grad.any()


def test_behaviors_before_the_last_positions_do_not_matter():
    case, model = make_case((1,), (9,)), build(max_positions=4)
    behaviors = case.behaviors.clone()
    behaviors[:5] = 0
    changed = dataclasses.replace(case, behaviors=behaviors)
    assert torch.equal(changed.run(model).value, case.run(model).value)


@pytest.mark.parametrize("options", [{"heads": 3}, {"heads": 2, "max_positions": 0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="impossible"):
        BST(DIM, **options)
