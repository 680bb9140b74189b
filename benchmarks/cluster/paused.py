"""A training stage whose last rank waits in a step for what happens to it, in the first attempt of its job.

    python -m mim_torchrec.benchmarks.cluster.paused MODULE STEP FILE <flags of the stage>

The stage is the real one; the wait makes sure that a fault comes in the middle of it. FILE then has the id of
the process. A signal that the stage handles ends the wait.
"""

import os
import signal
import sys
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from mim_torchrec import program
from mim_torchrec.embeddings.files import write_bytes


def main(argv: list[str] | None = None) -> None:
    """Entry point of the program."""
    module, step, file, *words = sys.argv[1:] if argv is None else argv
    stage: Any = import_module(module)
    fit = stage.fit

    def paused_fit(task: Any, **options: Any) -> Any:
        forward, steps = task.training_forward, count(1)

        def training_forward(batch: Any) -> Any:
            if next(steps) == int(step):
                _wait(Path(file))
            return forward(batch)

        if _is_last_rank_of_first_attempt():
            task.training_forward = training_forward
        return fit(task, **options)

    stage.fit = paused_fit
    stage.main(words)


def _is_last_rank_of_first_attempt() -> bool:
    attempts = [os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    return is_last and attempts == ["0", "0"]


def _wait(file: Path) -> None:
    """Until a signal comes that has a handler; one that comes before the wait is not lost."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs)
    write_bytes(file, str(os.getpid()).encode())
    os.read(ours, 1)
    signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    program.run(main)
