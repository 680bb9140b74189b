"""What holds for every user behavior model."""

import dataclasses

import pytest
import torch
from torch import nn

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.ubm.avg_pooling import AvgPooling
from mim_torchrec.ciubm.ubm.bst import BST
from mim_torchrec.ciubm.ubm.dien import DIEN
from mim_torchrec.ciubm.ubm.din import DIN
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, Interest
from mim_torchrec.ciubm.ubm.sim import SIM
from mim_torchrec.ciubm.ubm.twin import TWIN
from tests.histories import make_case

DIM = 8
MODELS = {
    "avg_pooling": lambda: AvgPooling(DIM),
    "din": lambda: DIN(DIM, (8, 4)),
    "din_dice_softmax": lambda: DIN(DIM, (8, 4), "dice", softmax=True),
    "dien": lambda: DIEN(DIM),
    "bst": lambda: BST(DIM, heads=2, max_positions=4),
    "sim_soft": lambda: SIM(DIM, "soft", top_k=3, heads=2),
    "sim_hard": lambda: SIM(DIM, "hard", top_k=3, heads=2),
    "twin": lambda: TWIN(DIM, top_k=3, heads=2),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(2)
    return MODELS[request.param]().double()


def loss_of(interest: Interest) -> torch.Tensor:
    """Something that depends on all that the model gives."""
    total = (interest.value * torch.linspace(-1, 1, interest.value.shape[1])).pow(2).sum()
    return total if interest.auxiliary is None else total + interest.auxiliary.logits.pow(2).sum()


def test_the_interest_has_the_size_it_says(model):
    assert make_case().run(model).value.shape == (9, model.out_dim)


def test_an_empty_history_among_others_gives_zeros(model):
    value = make_case((2, 3, 1), (3, 0, 5)).run(model).value
    assert value[2:5].abs().sum() == 0
    others = torch.cat([value[:2], value[5:]])
    assert others.isfinite().all()


def test_empty_histories_only_give_zeros_and_zero_gradients(model):
    case = make_case((2, 1), (0, 0)).with_gradient()
    interest = case.run(model)
    assert interest.value.abs().sum() == 0
    assert interest.value.requires_grad
    loss_of(interest).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    of_interest = [g for name, g in zip(dict(model.named_parameters()), gradients, strict=True)
                   if not name.startswith("click")]  # fmt: skip
    assert sum(float(g.abs().sum()) for g in of_interest) == 0


def test_permuting_requests_permutes_interests(model):
    case, model = make_case(), model.eval()
    requests = case.requests()
    order = [3, 1, 4, 0, 2]
    rows = [t for k in order for t in requests[k][0]]
    permuted = case.select([requests[k] for k in order]).run(model).value
    torch.testing.assert_close(permuted, case.run(model).value[rows], atol=1e-9, rtol=0)


def test_candidates_of_a_request_give_what_each_alone_gives(model):
    case, model = make_case(), model.eval()
    chosen = [([t], behaviors) for candidates, behaviors in case.requests() for t in candidates]
    alone = [case.select([one]).run(model).value for one in chosen]
    torch.testing.assert_close(case.run(model).value, torch.cat(alone), atol=1e-9, rtol=0)


def test_gradients_reach_every_parameter_and_input(model):
    case = make_case((3, 2, 2), (9, 12, 6)).with_gradient()
    loss_of(case.run(model)).backward()
    inputs = {"behaviors": case.behaviors}
    if not isinstance(model, AvgPooling):
        inputs["candidates"] = case.candidates
    for name, x in {**dict(model.named_parameters()), **inputs}.items():
        assert x.grad is not None and x.grad.abs().sum() > 0, name


def test_histories_of_0_1_50_and_10000_behaviors_train_in_one_batch(model):
    case = make_case((2, 1, 2, 2), (0, 1, 50, 10_000), dtype=torch.float32).with_gradient()
    model = model.float()
    interest = case.run(model)
    loss_of(interest).backward()
    assert interest.value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in [*model.parameters(), case.behaviors])


def test_float32_is_near_float64(model):
    model = model.eval()
    exact = make_case().run(model).value
    case = make_case()
    rough = dataclasses.replace(case, candidates=case.candidates.float(), behaviors=case.behaviors.float())
    torch.testing.assert_close(rough.run(model.float()).value.double(), exact, atol=1e-5, rtol=1e-4)


def test_ciubm_adds_content_and_fusion_interest_to_every_model(model):
    case, model = make_case(), model.eval()
    mm = torch.randn(9, 5), torch.randn(18, 5)
    interests = CiUBM(model, content=True, fusion=True)(
        case.candidates, case.behaviors, case.pairs, *mm, context=case.context
    )
    torch.testing.assert_close(interests.id, case.run(model).value)
    assert interests.concatenate().shape == (9, model.out_dim + 5 + DIM)


@pytest.mark.parametrize("name", ["bst", "sim_soft", "sim_hard", "twin"])
def test_a_model_that_needs_gaps_says_what_is_missing(name):
    case = make_case()
    context = BehaviorContext(
        candidate_categories=case.context.candidate_categories,
        behavior_categories=case.context.behavior_categories,
    )
    with pytest.raises(ValueError, match="how far behaviors lie back.*--recency order"):
        dataclasses.replace(case, context=context).run(MODELS[name]().double())
