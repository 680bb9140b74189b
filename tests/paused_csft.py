"""C-SFT whose last rank waits for a signal in a step: it cannot end before the signal comes."""

import os
import signal

from mim_torchrec import program
from mim_torchrec.csft.main import main
from mim_torchrec.csft.task import CSFTTask

STEP = 7


def pause() -> None:
    """Until a signal comes that has a handler; if it comes before the wait, it is not lost."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs)
    print(f"process {os.getpid()} waits for a signal", flush=True)
    os.read(ours, 1)
    signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    forward, steps = CSFTTask.training_forward, []
    is_last = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def paused(self, batch):
        steps.append(batch)
        if len(steps) == STEP and is_last:
            pause()
        return forward(self, batch)

    CSFTTask.training_forward = paused
    program.run(main)
