"""The pretended GPU refuses what a GPU refuses, and counts what a GPU's host waits for."""

import pytest
import torch

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def counts():
    counts = Counts()
    with pretended_gpu(counts):
        yield counts


def test_tensors_of_two_devices_do_not_meet(counts):
    with pytest.raises(RuntimeError, match="same device: aten::add"):
        torch.ones(3, device=GPU) + torch.ones(3)
    assert (torch.ones(3, device=GPU) + torch.tensor(1.0)).is_cuda  # a scalar may be anywhere


def test_views_are_where_their_base_is_and_results_where_their_operands_are(counts):
    x = torch.arange(6, device=GPU)
    assert x.view(2, 3)[1].device == GPU and (x * 2).device == GPU
    assert x.cpu().device.type == "cpu" and torch.zeros_like(x).is_cuda


def test_a_tensor_on_the_gpu_is_no_array(counts):
    with pytest.raises(TypeError, match="can't convert"):
        torch.ones(2, device=GPU).numpy()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.unique(),
        lambda x: bool((x > 1).all()),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.cuda.synchronize(),
        lambda x: x.to("cpu"),
    ],
)
def test_the_host_waits_for_values(counts, wait):
    x = torch.arange(3.0, device=GPU)
    wait(x * 1)
    assert counts.syncs.total() == 1


def test_the_host_does_not_wait_for_what_is_known(counts):
    x = torch.arange(3.0, device=GPU)
    torch.repeat_interleave(x.long(), output_size=3)
    torch.nonzero_static(x, size=2)
    there = (x * 2).to("cpu", non_blocking=True)
    assert counts.syncs.total() == 0 and there.tolist() == [0, 2, 4]


def test_an_event_of_finished_work_is_not_waited_for(counts):
    first, second = torch.cuda.Event(), torch.cuda.Event()
    x = torch.ones(3, device=GPU) * 2
    first.record()
    x = x * 2
    second.record()
    second.synchronize()
    first.synchronize()
    assert counts.syncs.total() == 1 and first.query()


def test_a_wait_for_a_stream_beside_the_computation_is_none_for_that(counts):
    x = torch.arange(3.0, device=GPU)
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        (x * 2).tolist()
        torch.cuda.current_stream().synchronize()
    assert (counts.syncs.total(), counts.asides.total()) == (0, 1)
    torch.cuda.current_stream().synchronize()
    assert (counts.syncs.total(), counts.asides.total()) == (1, 1)


def test_uploads_are_counted_with_those_of_pageable_memory(counts):
    torch.ones(3).pin_memory().to(GPU, non_blocking=True)
    assert (counts.uploads.total(), counts.pageable.total()) == (1, 0)
    torch.ones(3).to(GPU)
    torch.tensor([1.0], device=GPU)
    assert (counts.uploads.total(), counts.pageable.total()) == (3, 2)


def test_views_launch_nothing(counts):
    x = torch.ones(2, 3, device=GPU)
    before = counts.launches.total()
    x.t().reshape(6)[1:]  # the reshape copies
    assert counts.launches.total() == before + 1


def test_it_leaves_torch_as_it_was():
    with pretended_gpu(Counts()):
        torch.ones(3, device=GPU)
    assert not torch.cuda.is_available() or torch.cuda.device_count()
    assert torch.ones(3).device.type == "cpu" and "device" not in vars(torch.Tensor)
