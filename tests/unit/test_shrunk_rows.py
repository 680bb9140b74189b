"""Rows multiplied by factors, and put where the model reads them: beside naive loops, and on two devices."""

import pytest
import torch

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ctr.shrunk_rows import shrunk_items, shrunk_requests
from tests.histories import offsets

DIM = 3
CANDIDATES, BEHAVIORS = [2, 0, 1], [1, 3, 0]


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def gradients(found: list[torch.Tensor], of: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum in which every number has a weight of its own."""
    weights = [torch.arange(1.0, 1 + one.numel(), device=one.device).view(one.shape) for one in found]
    total = sum((one * weight).sum() for one, weight in zip(found, weights, strict=True))
    return list(torch.autograd.grad(total, of, materialize_grads=True))


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("counts", [(4, 5), (2, 0), (0, 0)])
def test_items_are_multiplied_and_put_side_by_side_as_in_a_loop(tables, counts):
    of_roles = [[rows(n, DIM) for _ in range(tables)] for n in counts]
    factors = torch.rand(tables, sum(counts))
    found = shrunk_items(*of_roles, factors)
    expected = []
    for role, count in enumerate(counts):
        first = sum(counts[:role])
        expected.append(torch.zeros(count, tables * DIM) + 0 * of_roles[role][0].sum())
        for table in range(tables):
            for k in range(count):
                place = slice(table * DIM, (table + 1) * DIM)
                expected[-1][k, place] = of_roles[role][table][k] * factors[table, first + k]
    given = [*of_roles[0], *of_roles[1]]
    for ours, theirs in zip(
        [*found, *gradients(list(found), given)], [*expected, *gradients(expected, given)], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_candidate_gets_the_multiplied_rows_of_its_request_as_in_a_loop(features, on_gpu):
    given, factors = rows(len(CANDIDATES), features * DIM), torch.rand(features, len(CANDIDATES))
    expected = torch.stack([
        torch.cat([given[k, f * DIM : (f + 1) * DIM] * factors[f, k] for f in range(features)])
        for k, count in enumerate(CANDIDATES) for _ in range(count)
    ])  # fmt: skip
    theirs = [expected, *gradients([expected], [given])]
    counts = Counts()
    if on_gpu:
        with pretended_gpu(counts):
            pairs = RequestPairs.build(offsets(CANDIDATES).cuda(), offsets(BEHAVIORS).cuda())
            there = given.detach().cuda().requires_grad_()
            found = shrunk_requests(there, factors.cuda(), pairs)
            ours = [found, *gradients([found], [there])]
        assert counts.launches["aten::segment_reduce"] == 1 and not counts.no_kernel
    else:
        found = shrunk_requests(given, factors, RequestPairs.build(offsets(CANDIDATES), offsets(BEHAVIORS)))
        ours = [found, *gradients([found], [given])]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=1e-6)
