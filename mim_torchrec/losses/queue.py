"""Items of the last k batches of a rank, for negatives across time (ST-NSG, §3.3 Q3).

Vectors are kept as they were when their batch was trained on, without gradient, in bfloat16, for every level
of Eq. 6. The ids, which say what is no negative, are kept once. Every rank has its own items, which never
leave it. Not here: how the vectors are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mim_torchrec.errors import OptionError

DTYPE = torch.bfloat16


class ItemQueue(nn.Module):
    """A ring of batches of item vectors.

    What it holds is in `state_dict()`, so that a resumed run has the negatives of an
    uninterrupted one. It is no buffer: `DistributedDataParallel` would overwrite it by that of rank 0, and
    `.to(dtype)` would convert it. Checkpoints have to keep that of every rank.

    Args:
        levels: names of the levels, whose vectors are all of one size.
        batches: how many batches are kept.

    Attributes:
        pushed: batches that were ever pushed.

    Raises:
        OptionError: there is no level, or no batch is to be kept.
    """

    def __init__(self, levels: Sequence[str], batches: int) -> None:
        super().__init__()
        if not levels or batches < 1:
            raise OptionError(f"a queue of {batches} batches of {len(levels)} levels holds nothing")
        self.levels, self.batches, self.pushed = tuple(levels), batches, 0
        self._vectors: Tensor | None = None  # (levels, batches * rows, dim), made for the first batch
        self._ids: Tensor | None = None

    def place_on(self, device: torch.device) -> None:
        """Move what is held, which after loading is in memory, to the device of the training."""
        if self._vectors is not None and self._ids is not None:
            self._vectors, self._ids = self._vectors.to(device), self._ids.to(device)

    def vectors(self, level: str) -> Tensor | None:
        """(num_queued, dim) bfloat16 of a level; None while nothing was pushed."""
        return None if self._vectors is None else self._vectors[self.levels.index(level), : self._filled()]

    @property
    def ids(self) -> Tensor | None:
        """(num_queued,) int64; None while nothing was pushed."""
        return None if self._ids is None else self._ids[: self._filled()]

    @torch.no_grad()
    def push(self, vectors: Sequence[Tensor], ids: Tensor) -> None:
        """Take in a batch, replacing the oldest if the queue is full.

        Args:
            vectors: of every level (rows, dim); as many rows as in all batches before.
            ids: (rows,) int64.

        Raises:
            ValueError: the sizes differ from those of the batches before.
        """
        batch = torch.stack([level.detach().to(DTYPE) for level in vectors])
        self.place_on(batch.device)
        if self._vectors is None or self._ids is None:
            levels, rows, dim = batch.shape
            self._vectors = batch.new_zeros(levels, self.batches * rows, dim)
            self._ids = ids.new_zeros(self.batches * rows)
        rows = self._vectors.shape[1] // self.batches
        expected = (len(self.levels), rows, self._vectors.shape[2])
        if tuple(batch.shape) != expected or len(ids) != rows:
            raise ValueError(
                f"a batch of (levels, items, dim) {tuple(batch.shape)} and {len(ids)} ids does not fit a "
                f"queue of batches of {expected}"
            )
        place = slice(self.pushed % self.batches * rows, (self.pushed % self.batches + 1) * rows)
        self._vectors[:, place] = batch
        self._ids[place] = ids
        self.pushed += 1

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict()` holds of the queue."""
        return {
            "levels": list(self.levels),
            "batches": self.batches,
            "pushed": self.pushed,
            "vectors": self._vectors,
            "ids": self._ids,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what another queue held; ValueError if it is one of other levels or of another length."""
        if tuple(state["levels"]) != self.levels or state["batches"] != self.batches:
            raise ValueError(
                f"the checkpoint has a queue of {state['batches']} batches of {', '.join(state['levels'])}; "
                f"this run has one of {self.batches} batches of {', '.join(self.levels)}"
            )
        self.pushed = state["pushed"]
        self._vectors = None if state["vectors"] is None else state["vectors"].clone()
        self._ids = None if state["ids"] is None else state["ids"].clone()

    def _filled(self) -> int:
        rows = 0 if self._ids is None else self._ids.shape[0] // self.batches
        return min(self.pushed, self.batches) * rows
