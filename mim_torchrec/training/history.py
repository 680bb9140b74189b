"""What happened in training, in a file that only grows: `history.jsonl`, a line of JSON a step and an epoch.

Checkpoints hold the summary of epochs and how many steps the file had. A run that is resumed cuts off the
lines of later steps, so its file is that of an uninterrupted run.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim_torchrec.embeddings.files import fsync, full_disk_reported

log = logging.getLogger(__name__)


@dataclass
class History:
    """What happened in training.

    Attributes:
        num_steps: of the run so far.
        epochs: of every epoch `epoch`, `loss` (mean over steps), `seconds` and the validation metrics.
        best_epoch: whose weights are in `best`.
        loss_sum: of the steps of the epoch that is being trained.
        loss_count: how many these are.
        steps: of every step `step` (from 1), `epoch` (from 0) and `loss` (mean over ranks); every few steps
            also `samples_per_s` (of all ranks), `data_wait` (fraction of the time spent waiting for batches),
            `grad_norm` (before the step), `peak_memory_gib` (of rank 0, so far) and what the task reports.
            Only `read_history` fills it.
    """

    num_steps: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    loss_sum: float = 0.0
    loss_count: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"num_steps": self.num_steps, "epochs": list(self.epochs), "best_epoch": self.best_epoch,
                "loss_sum": self.loss_sum, "loss_count": self.loss_count}  # fmt: skip

    def best(self) -> dict[str, float]:
        """The entry of the epoch whose weights were kept."""
        assert self.best_epoch is not None  # the first epoch is the best until a better one comes
        # by its number: a crash may have lost the lines of earlier epochs
        return next(entry for entry in self.epochs if entry["epoch"] == self.best_epoch)


def read_history(file: Path) -> History:
    """The history of a run, steps included; an unfinished last line of a run that goes on is left out."""
    found = History()
    for line in file.read_text().splitlines():
        entry = _parse(line)
        if entry is None:
            break
        if "step" in entry:
            found.steps.append(entry)
        else:
            if entry.pop("is_best"):
                found.best_epoch = entry["epoch"]
            found.epochs.append(entry)
    found.num_steps = len(found.steps)
    return found


class HistoryFile:
    """The file of a run that is being trained.

    Args:
        file: its path.
        resumed: the history to go on after; lines behind it are cut off.
    """

    def __init__(self, file: Path, resumed: History) -> None:
        self._path = file
        end, steps = _end_of(file, resumed.num_steps, len(resumed.epochs)) if file.exists() else (0, 0)
        if steps != resumed.num_steps:
            log.warning("%s lacks the last %d of the %d steps before the checkpoint", file,
                        resumed.num_steps - steps, resumed.num_steps)  # fmt: skip
        self._file = file.open("ab")
        self._file.truncate(end)

    def add_step(self, entry: dict[str, float], flush: bool) -> None:
        """Add a step; `flush` shows it, and those before it, to whoever reads the file."""
        self._write(entry, flush)

    def add_epoch(self, entry: dict[str, float], is_best: bool) -> None:
        """Add an epoch."""
        self._write(entry | {"is_best": is_best}, True)

    def sync(self) -> None:
        """Bring the file to the disk, before a checkpoint that relies on it."""
        with full_disk_reported(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            fsync(self._path.parent)

    def close(self) -> None:
        """Close the file."""
        with full_disk_reported(self._path):
            self._file.close()

    def _write(self, entry: dict[str, float], flush: bool) -> None:
        with full_disk_reported(self._path):
            self._file.write((json.dumps(entry) + "\n").encode())
            if flush:
                self._file.flush()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _end_of(file: Path, num_steps: int, num_epochs: int) -> tuple[int, int]:
    """Where the lines of so many steps and epochs end, in bytes, and how many steps these are."""
    end, steps = 0, 0
    with file.open("rb") as lines:
        for line in lines:
            entry = _parse(line.decode(errors="replace")) if line.endswith(b"\n") else None
            if entry is None:
                break
            if "step" in entry:
                is_known = entry["step"] <= num_steps
                steps += is_known
            else:
                is_known = entry["epoch"] < num_epochs
            if not is_known:
                break
            end += len(line)
    return end, steps
