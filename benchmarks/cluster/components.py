"""TorchX components of stages that wait for a fault: `torchx run <this file>:ctr`."""

import torchx.specs as specs

from mim_torchrec.launch.jobs import distributed, process

STEP = 2
"""In which the last rank waits, from 1."""


@distributed(max_retries=3)
def csft(*script_args: str, out: str) -> specs.AppDef:
    """
    Run C-SFT, whose last rank waits in a step of the first attempt of the job.

    Args:
        script_args: further flags of the stage, after a lone --
        out: directory of its results; <out>.waits is written when the rank waits
    """
    return _paused("csft", "mim_torchrec.csft.main", script_args, out)


@distributed(max_retries=3)
def ctr(*script_args: str, out: str) -> specs.AppDef:
    """
    Train a CTR model, whose last rank waits in a step of the first attempt of the job.

    Args:
        script_args: further flags of the stage, after a lone --
        out: directory of its results; <out>.waits is written when the rank waits
    """
    return _paused("ctr", "mim_torchrec.ctr.main", script_args, out)


def _paused(stage: str, module: str, script_args: tuple[str, ...], out: str) -> specs.AppDef:
    words = f"mim_torchrec.benchmarks.cluster.paused {module} {STEP} {out}.waits"
    return process(stage, words, script_args, out=out)
