"""DIN's attention with copied weights against deepctr-torch; its equation is tested in test_ciubm.py."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.din import DIN
from tests.histories import Case, assert_same_with_gradients, make_case, naive_value, offsets

ORACLE = Path(__file__).parents[1] / "oracles" / "deepctr_torch.json"


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    values = json.loads(ORACLE.read_text())["din"]
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.fixture
def model(oracle) -> DIN:
    """DIN with the weights and the statistics of the oracle."""
    widths = [oracle[f"weight_{k}"].shape[0] for k in range(2)]
    model = DIN(oracle["candidates"].shape[1], tuple(widths), "dice").eval()
    linears = [model.first, model.middle[1], model.last]
    for k, linear in enumerate(linears):
        linear.load_state_dict({"weight": oracle[f"weight_{k}"], "bias": oracle[f"bias_{k}"]})
    for k, dice in enumerate([model.middle[0], model.activation]):
        dice.slope.data = oracle[f"slope_{k}"]
        dice.normalize.running_mean = oracle[f"mean_{k}"]
        dice.normalize.running_var = oracle[f"variance_{k}"] - dice.normalize.eps
    return model


def test_din_is_that_of_deepctr_torch(oracle, model):
    lengths = oracle["lengths"].tolist()
    pairs = RequestPairs.build(offsets([1] * len(lengths)), offsets(lengths))
    interest = model(oracle["candidates"], oracle["behaviors"], pairs).value
    torch.testing.assert_close(interest, oracle["interest"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_din_equals_the_attention_unit_on_one_pair_at_a_time_in_evaluation(activation):
    torch.manual_seed(2)
    model = DIN(8, (6, 5), activation).double().eval()

    def naive(case: Case) -> Tensor:
        def interest(q: Tensor, history: Tensor, *_) -> Tensor:
            first = model.first(torch.stack([torch.cat([q, s, q - s, q * s]) for s in history]))
            weights = model.last(model.activation(model.middle(first))).squeeze(1)
            return sum((w * s for w, s in zip(weights, history, strict=True)), torch.zeros(8).double())

        return naive_value(case, interest, 8)

    assert_same_with_gradients(make_case(), model, naive)
