"""Benchmarks of training steps on a pretended GPU: batches are there, and clocks are read when it is done."""

import pytest

from mim_torchrec.benchmarks.measures.turns import in_turns
from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.benchmarks.speed import ctr_throughput, scaling
from mim_torchrec.training.distributed import distributed


@pytest.fixture
def counts():
    return Counts()


def test_ctr_throughput_runs_on_a_gpu(tmp_path, counts):
    config = ctr_throughput.ThroughputConfig(
        out=tmp_path, batch_size=16, users=20, items=30, categories=5, mm_dim=4, batches=1, rounds=1, warmup=0
    )
    with pretended_gpu(counts), distributed(0) as context:
        ours = ctr_throughput.our_step(config, "sim", 4, context, mim=True)
        batch = ctr_throughput.make_batch(config, 1, 0, mm=True)
        (ready,) = ctr_throughput.ready_on(context.device, [batch])
        assert ready.labels.is_cuda
        ours(ready)
        figures = ctr_throughput.compare(config, "din", 4, 1, context)
    assert figures["ratio"] > 0 and not counts.mixed


def test_scaling_runs_on_a_gpu(tmp_path, counts):
    config = scaling.ScalingConfig(out=tmp_path, dim=4, mm_dim=4, candidates=2, batch_size=16)
    sizes = config.sizes(max_behaviors=4)
    scaling.write_scale_table(scaling.table_path(config, 50), 50, 4)
    point = scaling.Point("history", 4, True, sizes, scaling.table_path(config, 50))
    with pretended_gpu(counts), distributed(0) as context:
        step, _ = scaling.make_step(point, config, context)
        step(0)
    assert counts.launches.total() > 50 and not counts.mixed


def test_clocks_are_read_when_the_gpu_is_done(counts):
    with pretended_gpu(counts):
        in_turns([lambda _: None], rounds=3, warmup=0)
    assert counts.waited == 6
