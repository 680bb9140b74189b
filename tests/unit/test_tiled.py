"""The tiled log-sum-exp against the plain one over all logits, in double precision."""

import pytest
import torch
from torch.nn import functional as F

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.losses import tiled
from mim_torchrec.losses.tiled import LeftOut, Tile, tiled_logsumexp

N, M, D = 7, 23, 5
TILES = [Tile(3, 4), Tile(7, 23), Tile(100, 100), Tile(1, 1)]


def vectors(seed: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=1).requires_grad_()


def some_ids() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(9, (M,), generator=generator),
        torch.randint(9, (N, 2), generator=generator),
        torch.tensor([3, 0, -1, 22, 8, -1, 3]),
    )


def counts_of(item_ids, query_ids, positive) -> torch.Tensor:
    """(N, M) whether an entry counts, one by one."""
    found = torch.ones(N, M, dtype=torch.bool)
    for i in range(N):
        for j in range(M):
            if query_ids is not None and item_ids[j] in query_ids[i]:
                found[i, j] = False
            if positive is not None and positive[i] == j:
                found[i, j] = False
    return found


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("by_ids", [True, False])
@pytest.mark.parametrize("by_column", [True, False])
def test_values_and_gradients_are_those_of_the_plain_log_sum_exp(tile, by_ids, by_column):
    queries, items = vectors(0, N), vectors(1, M)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    item_ids, query_ids, positive = some_ids()
    query_ids, positive = query_ids if by_ids else None, positive if by_column else None
    weights = torch.arange(1.0, N + 1, dtype=torch.float64)

    logits = (scale * queries @ items.T).masked_fill(~counts_of(item_ids, query_ids, positive), -torch.inf)
    expected = torch.logsumexp(logits, 1)
    found = tiled_logsumexp(queries, items, scale, LeftOut(item_ids, query_ids, positive), tile)

    torch.testing.assert_close(found.logsumexp, expected)
    torch.testing.assert_close(found.hardest, logits.detach().amax(1))
    inputs = (queries, items, scale)
    for ours, theirs in zip(gradients(found.logsumexp @ weights, *inputs),
                            gradients(expected @ weights, *inputs), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("by_ids", [True, False])
@pytest.mark.parametrize("by_column", [True, False])
def test_what_remains_is_counted(by_ids, by_column):
    item_ids, query_ids, positive = some_ids()
    query_ids, positive = query_ids if by_ids else None, positive if by_column else None
    left = LeftOut(item_ids, query_ids, positive).remaining(N)
    assert left.tolist() == counts_of(item_ids, query_ids, positive).sum(1).tolist()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_gpu_that_compares_all_items_leaves_out_the_same(tile, monkeypatch):
    item_ids, query_ids, positive = some_ids()
    found = []
    for whole in (0, M):
        monkeypatch.setattr(tiled, "WHOLE", whole)
        counts = Counts()
        with pretended_gpu(counts):
            there = [tensor.to("cuda") for tensor in (item_ids, query_ids, positive)]
            queries, items = (vectors(k, n).detach().to("cuda").requires_grad_() for k, n in ((0, N), (1, M)))
            before, left_out = counts.syncs.total(), LeftOut(*there)
            result = tiled_logsumexp(queries, items, torch.tensor(9.0).double(), left_out, tile)
            result.logsumexp.sum().backward()
            left = left_out.remaining(N)
            assert counts.syncs.total() - before == (0 if whole else 2)
        found.append([result.logsumexp.detach(), queries.grad, items.grad, left])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert found[0][3].tolist() == counts_of(item_ids, query_ids, positive).sum(1).tolist()


def test_gradients_are_those_of_finite_differences():
    queries, items = vectors(0, 3), vectors(1, 5)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    left_out = LeftOut(torch.arange(5), torch.tensor([[4], [0], [9]]))
    assert torch.autograd.gradcheck(
        lambda q, k, s: tiled_logsumexp(q, k, s, left_out, Tile(2, 2)).logsumexp, (queries, items, scale)
    )


def test_a_query_that_leaves_out_everything_has_gradients_of_zero():
    queries, items = vectors(0, 2), vectors(1, 6)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    left_out = LeftOut(torch.tensor([1, 1, 1, 1, 1, 1]), torch.tensor([[1], [2]]))
    found = tiled_logsumexp(queries, items, scale, left_out, Tile(2, 4))
    assert found.logsumexp[0] == found.hardest[0] == -torch.inf
    found.logsumexp.exp().sum().backward()
    assert not queries.grad[0].any() and queries.grad[1].all()
    assert all(torch.isfinite(x.grad).all() for x in (queries, items, scale))


def test_a_query_may_leave_out_the_whole_first_tile():
    queries, items = vectors(0, 2), vectors(1, 6)
    left_out = LeftOut(torch.tensor([1, 1, 1, 2, 3, 4]), torch.tensor([[1], [5]]))
    scale = torch.tensor(5.0, dtype=torch.float64)
    found = tiled_logsumexp(queries, items, scale, left_out, Tile(2, 3))
    torch.testing.assert_close(found.logsumexp[0], torch.logsumexp(5 * queries[0] @ items[3:].T, 0))


def test_logits_of_any_size_neither_overflow_nor_vanish():
    queries, items = vectors(0, N), vectors(1, M)
    item_ids, *_ = some_ids()
    for factor in (1e4, -1e4):
        scale = torch.tensor(factor)
        found = tiled_logsumexp(queries.float(), items.float(), scale, LeftOut(item_ids), Tile(3, 4))
        expected = torch.logsumexp(factor * queries @ items.T, 1)
        torch.testing.assert_close(found.logsumexp.double(), expected, rtol=1e-6, atol=0)


def test_bfloat16_items_are_summed_in_float32():
    queries, items = vectors(0, N).detach().float(), vectors(1, 2000).detach().bfloat16()
    found = tiled_logsumexp(queries, items, torch.tensor(3.0), None, Tile(3, 4))
    expected = torch.logsumexp(3 * queries.double() @ items.double().T, 1)
    assert found.logsumexp.dtype == torch.float32
    torch.testing.assert_close(found.logsumexp.double(), expected, rtol=1e-6, atol=0)


def test_autocast_does_not_lower_the_precision():
    queries, items = vectors(0, N).detach().float(), vectors(1, M).detach().float()
    plain = tiled_logsumexp(queries, items, torch.tensor(30.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = tiled_logsumexp(queries, items, torch.tensor(30.0))
    assert torch.equal(plain.logsumexp, cast.logsumexp)


def test_no_items_have_an_empty_sum():
    queries = vectors(0, N)
    found = tiled_logsumexp(
        queries, queries.new_empty(0, D), torch.tensor(1.0), LeftOut(torch.empty(0).long())
    )
    assert (found.logsumexp == -torch.inf).all()
    found.logsumexp.exp().sum().backward()
    assert not queries.grad.any()


def test_items_without_a_gradient_are_not_kept_for_the_backward_pass():
    queries, items = vectors(0, N), vectors(1, M).detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tiled_logsumexp(queries, items, torch.tensor(2.0, dtype=torch.float64))
    assert saved and all(tensor.shape[:1] != (M,) for tensor in saved)


def test_nothing_of_the_size_of_the_logits_is_made():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return result

    queries, items = vectors(0, 64), vectors(1, 512)
    ids = torch.zeros(512, dtype=torch.int64)  # all the same, the most that can be left out
    with Largest():
        left_out = LeftOut(ids, torch.arange(64)[:, None])
        tiled_logsumexp(queries, items, torch.tensor(2.0).double(), left_out, Tile(16, 16)).logsumexp[
            1:
        ].sum().backward()
    assert Largest.elements < 64 * 512 / 4
