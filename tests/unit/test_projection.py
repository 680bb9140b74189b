"""Projecting the shorter of two lists that are compared."""

import pytest
import torch
from torch import nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.projection import compared
from tests.histories import offsets


@pytest.mark.parametrize(
    ("candidates", "behaviors", "dim", "attention_dim", "folded"),
    [
        ([1, 1], [20, 30], 6, 6, True),
        ([30, 30], [20, 30], 6, 6, False),  # more candidates than behaviors
        ([1, 1], [20, 30], 6, 2, False),  # wider rows in every product of pairs
    ],
)
def test_the_side_whose_projection_costs_less_is_projected(candidates, behaviors, dim, attention_dim, folded):
    torch.manual_seed(0)
    pairs = RequestPairs.build(offsets(candidates), offsets(behaviors))
    key = nn.Linear(dim, attention_dim, bias=False).double()
    queries = torch.randn(sum(candidates), attention_dim).double()
    rows = torch.randn(sum(behaviors), dim).double()
    query, projected = compared(queries, key, rows, pairs)
    assert (projected is rows) == folded
    torch.testing.assert_close(
        pairs.inner_products(query, projected), pairs.inner_products(queries, key(rows)), atol=1e-12, rtol=0
    )
