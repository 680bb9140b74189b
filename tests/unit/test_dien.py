"""DIEN against its equations, one candidate and one step at a time."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.ubm.dien import DIEN
from mim_torchrec.ciubm.ubm.recurrence import AttentionalGRU, TimeOrder
from tests.histories import Case, assert_same_with_gradients, make_case, naive_value, offsets

DIM = 8
ORACLE = Path(__file__).parents[1] / "oracles" / "deepctr_torch.json"


@pytest.fixture
def model() -> DIEN:
    torch.manual_seed(2)
    return DIEN(DIM).double()


def naive_step(cell: AttentionalGRU, x: Tensor, h: Tensor, attention: Tensor | float) -> Tensor:
    """Eq. 2-5, 14 and 15."""
    x_r, x_u, x_n = (cell.input.weight @ x + cell.input.bias).chunk(3)
    h_r, h_u, h_n = (cell.hidden.weight @ h + cell.hidden.bias).chunk(3)
    u = attention * torch.sigmoid(x_u + h_u)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (1 - u) * h + u * n


def naive_interests(model: DIEN, history: Tensor) -> Tensor:
    states, h = [], history.new_zeros(DIM)
    for x in history:
        h = naive_step(model.extractor, x, h, 1.0)
        states.append(h)
    return torch.stack(states)


def naive_dien(model: DIEN, case: Case) -> Tensor:
    def interest(candidate: Tensor, history: Tensor, *_) -> Tensor:
        states = naive_interests(model, history)
        attention = torch.stack([i @ model.attention.weight @ candidate for i in states]).softmax(0)
        h = history.new_zeros(DIM)
        for a, i in zip(attention, states, strict=True):
            h = naive_step(model.evolution, i, h, a)
        return h

    return naive_value(case, interest, DIM)


def test_dien_equals_its_equations_a_step_at_a_time(model):
    assert_same_with_gradients(make_case(), model, lambda case: naive_dien(model, case))


def test_dien_with_one_candidate_a_request_equals_its_equations(model):
    case = make_case((1, 1, 1, 1), (4, 0, 6, 1))
    assert_same_with_gradients(case, model, lambda case: naive_dien(model, case))


def test_dien_passes_over_a_request_without_candidates(model):
    case = make_case((1, 0, 2), (2, 7, 3))
    assert_same_with_gradients(case, model, lambda case: naive_dien(model, case))


def torch_weights(cell: AttentionalGRU) -> dict[str, Tensor]:
    """Weights of torch.nn.GRU, which has one minus our update gate."""
    sign = torch.ones(3 * DIM, dtype=torch.float64)
    sign[DIM : 2 * DIM] = -1
    weights = {"weight_ih": cell.input.weight, "weight_hh": cell.hidden.weight,
               "bias_ih": cell.input.bias, "bias_hh": cell.hidden.bias}  # fmt: skip
    return {name: w.detach() * sign.view(-1, *[1] * (w.dim() - 1)) for name, w in weights.items()}


def test_the_interest_extractor_is_torchs_gru(model):
    case = make_case()
    gru = nn.GRU(DIM, DIM).double()
    gru.load_state_dict({f"{name}_l0": w for name, w in torch_weights(model.extractor).items()})
    order = TimeOrder.of(offsets(case.num_behaviors))
    by_time = torch.empty_like(case.behaviors).index_copy(0, order.position, case.behaviors)
    states = model.extractor.states(by_time, order)[order.position]
    for _, behaviors in case.requests():
        if behaviors:
            expected, _ = gru(case.behaviors[behaviors])
            torch.testing.assert_close(states[behaviors], expected, atol=1e-9, rtol=0)


def test_augru_with_attention_one_is_torchs_gru_cell(model):
    history = make_case().behaviors[:7]
    cell = nn.GRUCell(DIM, DIM).double()
    cell.load_state_dict(torch_weights(model.evolution))
    expected = history.new_zeros(1, DIM)
    for x in history:
        expected = cell(x[None], expected)
    order = TimeOrder.of(torch.tensor([0, 7]))
    ones, owner = torch.ones(7, dtype=torch.float64), torch.tensor([0])
    actual = model.evolution.last_state(history, ones, order, order, owner)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def test_augru_is_that_of_deepctr_torch():
    oracle = json.loads(ORACLE.read_text())["augru"]
    t = {name: torch.tensor(value) for name, value in oracle.items()}
    cell = AttentionalGRU(t["weight_ih"].shape[1], t["weight_hh"].shape[1])
    cell.load_state_dict({
        "input.weight": t["weight_ih"], "hidden.weight": t["weight_hh"],
        "input.bias": t["bias_ih"], "hidden.bias": t["bias_hh"],
    })  # fmt: skip
    order = TimeOrder.of(offsets(t["lengths"].tolist()))
    inputs, attention = torch.empty_like(t["inputs"]), torch.empty_like(t["attention"])
    inputs[order.position], attention[order.position] = t["inputs"], t["attention"]
    every = torch.arange(t["lengths"].numel())
    last = cell.last_state(inputs, attention, order, order, every)[order.rank]
    torch.testing.assert_close(last, t["last_states"], atol=1e-5, rtol=0)


def test_the_auxiliary_task_tells_the_next_behavior_from_one_of_another_request(model):
    case = make_case()
    auxiliary = case.run(model).auxiliary
    steps = [(i, i + 1, set(behaviors)) for _, behaviors in case.requests() for i in behaviors[:-1]]
    states = {
        i: h
        for _, behaviors in case.requests() if behaviors
        for i, h in zip(behaviors, naive_interests(model, case.behaviors[behaviors]), strict=True)
    }  # fmt: skip
    positive, negative = auxiliary.logits.chunk(2)
    assert auxiliary.targets.tolist() == [1.0] * len(steps) + [0.0] * len(steps)
    for (i, following, own), p, n in zip(steps, positive, negative, strict=True):
        torch.testing.assert_close(p, states[i] @ case.behaviors[following], atol=1e-9, rtol=0)
        products = case.behaviors @ states[i]
        drawn = int((products - n).abs().argmin())
        torch.testing.assert_close(n, products[drawn], atol=1e-9, rtol=0)
        assert drawn not in own


def test_every_behavior_of_other_requests_can_be_a_negative(model):
    case = make_case((1, 1, 1), (2, 3, 2))
    state = naive_interests(model, case.behaviors[2:5])[0]  # of behavior 2, the first of the second request
    drawn = set()
    for seed in range(60):
        torch.manual_seed(seed)
        negative = case.run(model).auxiliary.logits.chunk(2)[1][1]
        drawn.add(int((case.behaviors @ state - negative).abs().argmin()))
    assert drawn == {0, 1, 5, 6}


@pytest.mark.parametrize("num_behaviors", [(0, 0), (4, 0), (1, 1)])
def test_without_anything_to_compare_the_auxiliary_task_is_empty(model, num_behaviors):
    auxiliary = make_case((1, 1), num_behaviors).run(model).auxiliary
    assert auxiliary.logits.numel() == auxiliary.targets.numel() == 0


def test_there_is_no_auxiliary_task_in_evaluation_or_without_its_weight(model):
    assert make_case().run(model.eval()).auxiliary is None
    assert make_case().run(DIEN(DIM, auxiliary=False).double()).auxiliary is None
