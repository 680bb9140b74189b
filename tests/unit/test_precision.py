"""Linear layers in bfloat16: parameters, results and gradients in float32, near those of float32."""

import copy

import pytest
import torch
from torch import nn

from mim_torchrec.ciubm.ubm.registry import built_in_models
from mim_torchrec.errors import OptionError
from mim_torchrec.training.precision import BFloat16Linear, linear_layers_in_bfloat16, matrix_products_in
from tests.histories import make_case

CPU = torch.device("cpu")


def test_a_layer_multiplies_in_bfloat16_and_keeps_its_parameters():
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    layer = BFloat16Linear.of(linear)
    x = torch.randn(4, 5, requires_grad=True)
    out = layer(x)
    expected = (x.bfloat16() @ linear.weight.bfloat16().t() + linear.bias.bfloat16()).float()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert out.dtype == torch.float32 and not torch.equal(out, linear(x))
    out.sum().backward()
    assert layer.weight is linear.weight and linear.weight.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("ubm", built_in_models())
def test_a_model_of_behaviors_is_near_its_float32(ubm):
    torch.manual_seed(1)
    full = built_in_models()[ubm]().build(8, dropout=0.0, auxiliary=True)
    low = copy.deepcopy(full)
    linear_layers_in_bfloat16(low)
    assert list(low.state_dict()) == list(full.state_dict())
    case = make_case(dtype=torch.float32).with_gradient()
    results = []
    for model in (full, low):
        torch.manual_seed(2)
        found = case.run(model)
        (found.value.sum() + (found.auxiliary.logits.sum() if found.auxiliary else 0)).backward()
        results.append((found.value, [p.grad for p in model.parameters()]))
    (interest, gradients), (near, near_gradients) = results
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, interest, rtol=0.05, atol=0.05)
    for one, other in zip(near_gradients, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == torch.float32 and (one - other).norm() <= 0.05 * other.norm() + 0.05


def test_tf32_is_of_gpus_and_ends_with_the_training():
    with pytest.raises(OptionError, match="a CPU computes in fp32 or bf16"), matrix_products_in("tf32", CPU):
        pass
    with matrix_products_in("tf32", CPU, training=False):
        assert torch.get_float32_matmul_precision() == "highest"
    with matrix_products_in("tf32", torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
