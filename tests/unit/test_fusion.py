"""The three fusions against loops over what their papers write."""

import pytest
import torch

from mim_torchrec.encoders.fusion import ConcatFusion, LowRankFusion
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemHead

N, DIM = 5, 3


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, DIM, generator=generator, dtype=torch.float64) for _ in range(2))


def test_low_rank_fusion_is_a_product_under_a_sum_of_rank_one_tensors(vectors):
    torch.manual_seed(0)
    fusion = LowRankFusion(DIM, fusion_dim=2, hidden_dim=4, rank=3).double()
    with torch.no_grad():
        fusion.weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
        fusion.bias.uniform_()
    image, text = vectors
    u, v = (
        torch.cat([layer.weight, layer.bias[:, None]], dim=1).view(3, 4, 3)
        for layer in (fusion.image_factors, fusion.text_factors)
    )
    for n in range(N):
        a = torch.cat([fusion.image(image[n]), torch.ones(1)])
        b = torch.cat([fusion.text(text[n]), torch.ones(1)])
        tensor = torch.zeros(4, 3, 3, dtype=torch.float64)
        for r in range(3):
            for h in range(4):
                tensor[h] += fusion.weights[r] * torch.outer(u[r, h], v[r, h])
        hidden = torch.stack([(tensor[h] * torch.outer(a, b)).sum() for h in range(4)]) + fusion.bias
        expected = fusion.out(hidden.clamp(min=0))
        assert torch.allclose(fusion(image, text)[n], expected, atol=1e-12)


def test_concat_fusion_is_an_mlp_of_both(vectors):
    fusion = ConcatFusion(DIM, hidden_dim=4).double()
    image, text = vectors
    first, last = fusion.mlp[0], fusion.mlp[3]
    for n in range(N):
        hidden = first.weight @ torch.cat([image[n], text[n]]) + first.bias
        assert torch.allclose(fusion(image, text)[n], last.weight @ hidden.clamp(min=0) + last.bias)


@pytest.mark.parametrize("fusion", ["tfn", "lmf", "concat"])
def test_every_parameter_of_a_fusion_is_trained(fusion):
    head = ItemHead(6, 4, HeadConfig(dim=8, fusion_dim=5, hidden_dim=16, dropout=0.0, fusion=fusion))
    mm = head.encode_items(torch.randn(9, 6), torch.randn(9, 4)).mm
    assert mm.shape == (9, 8)
    mm.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.fusion.parameters())


def test_facts_leave_out_what_plays_no_part():
    assert HeadConfig().facts().keys() == HeadConfig(lmf_rank=9).facts().keys()
    assert "fusion" not in HeadConfig().facts()  # as in checkpoints that were written without
    assert HeadConfig(fusion="concat").facts()["fusion"] == "concat"
    assert HeadConfig(fusion="lmf", lmf_rank=9).facts()["lmf_rank"] == 9
