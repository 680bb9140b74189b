"""What all stages that train are told alike; nothing here imports what acts on it."""

from dataclasses import dataclass
from typing import Literal

from mim_torchrec.domains import Count, Natural, Positive, Weight


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of the run."""

    every: Natural = 0
    """Steps between two checkpoints; 0 saves only at the end of every epoch and at SIGTERM."""
    minutes: Weight = 0.0
    """Minutes between two checkpoints, of whatever kind; 0 saves none by time."""
    keep: Count = 2
    """Number of checkpoints that are kept, the newest."""
    asynchronous: bool = True
    """Continue training while a copy of the state is written. The copy takes as much memory as the state."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest whole checkpoint in `out`; the result is that of an uninterrupted run.
    `never` removes what is there and starts from scratch, except when torchrun restarts its workers."""


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long ranks wait for each other, in seconds."""

    init: Positive = 600.0
    """Until all ranks have started."""
    step: Positive = 1800.0
    """In one exchange between ranks, of a step, an evaluation or a checkpoint. The error names the rank that
    was waited for."""
