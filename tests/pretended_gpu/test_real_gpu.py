"""The same training steps on a real GPU: their losses are those of the CPU."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from mim_torchrec.benchmarks.harness.launching import launch
from mim_torchrec.benchmarks.rehearsal.steps import CASES, measure_step

ALONE = [case for case in CASES if case.ranks == 1]


def train(folder: Path) -> dict[str, list[float]]:
    """Losses of every model of one rank, on the device that there is."""
    return {case.name: measure_step(case, folder, on_gpu=False)[0].losses for case in ALONE}


@cache
def losses(devices: str | None) -> dict[str, list[float]]:
    """By model, where the process sees these GPUs."""
    with pytest.MonkeyPatch.context() as patched, TemporaryDirectory() as name:
        if devices is not None:
            patched.setenv("CUDA_VISIBLE_DEVICES", devices)
        return launch(1, train, Path(name))[0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_losses_are_those_of_the_cpu(case):
    torch.testing.assert_close(losses(None)[case.name], losses("")[case.name], rtol=1e-3, atol=1e-4)
