"""Operations of packed attention, counted against the formulas of its equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mim_torchrec.benchmarks.measures.flops import count_flops
from tests.histories import make_case

DIM = 8


@pytest.fixture
def case():
    return make_case(dim=DIM).with_gradient()


def test_scores_are_a_product_and_a_sum_for_each_dimension_of_each_pair(case):
    pairs = case.pairs
    flops = count_flops(lambda: pairs.inner_products(case.candidates, case.behaviors))
    assert flops == 2 * pairs.num_pairs * DIM


def test_pooling_is_a_product_and_a_sum_for_each_dimension_of_each_pair(case):
    pairs = case.pairs
    weights = torch.rand(pairs.num_pairs, dtype=torch.float64)
    assert count_flops(lambda: pairs.weighted_sum(case.behaviors, weights)) == 2 * pairs.num_pairs * DIM


def test_the_backward_pass_of_scores_is_two_poolings(case):
    pairs = case.pairs
    scores = pairs.inner_products(case.candidates, case.behaviors)
    assert count_flops(lambda: scores.sum().backward()) == 4 * pairs.num_pairs * DIM


def test_a_matrix_product_counts_as_torch_counts_it():
    assert count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


def test_a_lookup_counts_nothing():
    rows = torch.rand(10, DIM)
    index, offsets = torch.tensor([1, 2, 3]), torch.arange(3)
    assert count_flops(lambda: F.embedding_bag(index, rows, offsets, mode="sum")) == 0


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind, spots", [(nn.Conv2d, 5 * 5), (nn.ConvTranspose2d, 7 * 7)])
def test_each_gradient_of_a_convolution_costs_what_its_forward_pass_costs(kind, spots, groups):
    layer = kind(8, 16, 3, groups=groups, bias=False)
    images = torch.rand(4, 8, 7, 7, requires_grad=True)
    # a product and a sum for each tap of the kernel, each pair of channels of a group, each output or input
    expected = 2 * 4 * spots * 3 * 3 * 8 * 16 // groups
    found = layer(images)
    assert count_flops(lambda: layer(images)) == expected
    assert count_flops(lambda: found.sum().backward(retain_graph=True)) == 2 * expected
    weight_only = layer(images.detach())
    assert count_flops(lambda: weight_only.sum().backward()) == expected


def test_fused_attention_costs_its_two_products():
    query, key, value = torch.rand(3, 2, 4, 6, 8)
    attend = F.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, key, value)) == 2 * (2 * 2 * 4 * 6 * 6 * 8)
