"""A TorchX component of a stage that waits for a fault: `torchx run <this file>:paused`."""

import torchx.specs as specs

from mim_torchrec.launch.jobs import distributed, process


@distributed(max_retries=3)
def paused(*script_args: str, stage: str, module: str, step: int, file: str, out: str) -> specs.AppDef:
    """
    Run a training stage whose last rank waits in a step, in the first attempt of the job.

    Args:
        script_args: further flags of the stage, after a lone --
        stage: its name
        module: its module
        step: in which it waits, from 1
        file: that is written when it waits
        out: directory of its results
    """
    waiting = f"mim_torchrec.benchmarks.cluster.paused {module} {step} {file}"
    return process(stage, waiting, script_args, out=out)
