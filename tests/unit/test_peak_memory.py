"""The estimate of peak memory against peaks computed by hand, and against torch's allocator."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mim_torchrec.benchmarks.measures.peak_memory import PeakMemory, estimated, measured_on_cpu

KB = 1024
FLOATS = 256  # of a kilobyte


def test_storages_count_while_they_are_alive():
    with PeakMemory() as memory:
        a = torch.zeros(FLOATS)
        b = a + 1
        assert memory.current == 2 * KB
        del a
        c = b * 2 + 1  # the product lives until the sum is there
        assert memory.current == 2 * KB and memory.peak == 3 * KB
    assert c is not b


def test_views_and_results_in_place_cost_nothing():
    with PeakMemory() as memory:
        a = torch.zeros(FLOATS)
        a.view(2, -1)[1].add_(1).t()
        assert memory.peak == KB


def test_storages_are_rounded_up_to_blocks():
    with PeakMemory() as memory:
        kept = [torch.zeros(1), torch.zeros(129)]
        assert memory.current == 512 + 1024
    assert len(kept) == 2


def test_what_was_there_counts_once_it_is_named():
    a = torch.zeros(FLOATS)
    assert estimated(lambda: None, iter([a, a[:8]])) == KB
    assert estimated(lambda: a + 1, iter([a])) == 2 * KB
    assert estimated(lambda: a.mul_(2), iter([])) == KB


def test_a_backward_pass_peaks_where_both_gradients_of_a_product_are():
    x = torch.zeros(FLOATS, requires_grad=True)
    weight = torch.zeros(FLOATS, requires_grad=True)
    with PeakMemory(round_to=1) as memory:
        memory.track([x, weight])
        loss = (x * weight).sum()
        assert memory.current == 2 * KB + 4  # the product is not kept
        loss.backward()  # that of the loss is spread without a copy; then a kilobyte for each input
        assert memory.peak == 4 * KB + 8
    del loss


def test_fake_tensors_count_as_real_ones_do():
    def step(x: Tensor, model: nn.Module) -> int:
        with PeakMemory() as memory:
            memory.track([x, *model.parameters()])
            model(x).square().sum().backward()
        return memory.peak

    def make() -> tuple[Tensor, nn.Module]:
        return torch.zeros(64, 32), nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 8))

    real = step(*make())
    with FakeTensorMode():
        assert step(*make()) == real


@pytest.mark.parametrize("training", [True, False])
def test_the_estimate_is_within_three_percent_of_the_allocator(training):
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
        torch.manual_seed(0)
        blocks = [nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)] * 3
        model = nn.Sequential(*blocks)
        return model, torch.optim.AdamW(model.parameters()), torch.randn(16, 32, 64)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        if not training:
            with torch.no_grad():
                model.eval()(x)
            return
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    parts = model, optimizer, x = build()
    step(*parts)

    def resident() -> Iterator[Tensor]:  # no list, which would keep gradients that the step gives back
        yield from (x, *model.parameters())
        yield from (p.grad for p in model.parameters() if p.grad is not None)
        yield from (value for state in optimizer.state.values() for value in state.values())

    estimate = estimated(lambda: step(*parts), resident())
    kept = []

    def started():
        kept.append(build())
        step(*kept[0])
        return lambda: step(*kept[0])

    gc.collect()
    assert estimate == pytest.approx(measured_on_cpu(started), rel=0.03)


def test_the_allocator_is_asked_about_the_step_and_not_about_what_was_before():
    def build():
        torch.zeros(64 * FLOATS)  # gone before the step
        kept = torch.zeros(4 * FLOATS)
        return lambda: kept + 1

    assert measured_on_cpu(build) == pytest.approx(8 * KB, abs=512)
