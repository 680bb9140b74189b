"""Rows that a table does not have: an error that names one, or row 0 in their place.

TorchRec's ``BoundsCheckMode`` says which: ``FATAL`` raises IndexError, ``WARNING`` looks up row 0, which is
zero, and logs the first time, ``IGNORE`` only looks up row 0. TorchRec's own FATAL stops a GPU's context
without saying which table or row; here the smallest and the largest row are copied to the host while the
lookup runs on rows that exist, and are examined when its outputs are waited for. In training nobody waits for
them: limits that have not arrived by then are examined before the next lookup, evaluation or checkpoint.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.distributed.types import BoundsCheckMode
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

log = logging.getLogger(__name__)

MODES = {
    BoundsCheckMode.FATAL: BoundsCheckMode.FATAL,
    BoundsCheckMode.WARNING: BoundsCheckMode.WARNING,
    BoundsCheckMode.IGNORE: BoundsCheckMode.IGNORE,
    # versions of fbgemm's kernel with the same meaning
    BoundsCheckMode.V2_FATAL: BoundsCheckMode.FATAL,
    BoundsCheckMode.V2_WARNING: BoundsCheckMode.WARNING,
    BoundsCheckMode.V2_IGNORE: BoundsCheckMode.IGNORE,
}


class BoundsCheck:
    """What one table does about rows that it does not have.

    Args:
        config: of the table.
        mode: FATAL, WARNING or IGNORE.

    Raises:
        ValueError: another mode.

    >>> config = BaseEmbeddingConfig(name="mm", num_embeddings=3, embedding_dim=4, feature_names=["item"])
    >>> BoundsCheck(config, BoundsCheckMode.IGNORE).examine(torch.tensor([1, 3, -1]), []).tolist()
    [1, 0, 0]
    """

    def __init__(self, config: BaseEmbeddingConfig, mode: BoundsCheckMode = BoundsCheckMode.FATAL) -> None:
        if mode not in MODES:
            raise ValueError(
                f"frozen table {config.name}: bounds check {mode.name} is none of FATAL, WARNING and IGNORE"
            )
        self.mode = MODES[mode]
        self._config = config
        self._has_warned = False

    @property
    def replaces(self) -> bool:
        """Whether row 0 is looked up in the place of a row that does not exist."""
        return self.mode is not BoundsCheckMode.FATAL

    def examine(self, rows: Tensor, later: "list[Limits]", ascending: bool = False) -> Tensor:
        """Return the rows (n,) int64 to look up: all of them exist.

        Args:
            rows: (n,) int64.
            later: gets the limits of rows on a GPU; someone must call ``Limits.settle``.
            ascending: whether they are in ascending order; they still are in what is returned, if the mode is
                FATAL.

        Raises:
            IndexError: a row does not exist, and the mode is FATAL; of rows on a CPU.
        """
        if not rows.numel():
            return rows
        low, high = (rows[0], rows[-1]) if ascending else rows.aminmax()
        if rows.is_cpu:
            if low >= 0 and high < self._config.num_embeddings:
                return rows
            self.report(int(low), int(high))
        elif self.mode is not BoundsCheckMode.IGNORE:
            later.append(Limits(self, low, high))
        return self.existing(rows)

    def existing(self, rows: Tensor) -> Tensor:
        """Return rows (n,) with others in the place of those that do not exist: row 0, or a near one."""
        if self.replaces:
            return torch.where((rows >= 0) & (rows < self._config.num_embeddings), rows, 0)
        return rows.clamp(0, self._config.num_embeddings - 1)

    def report(self, low: int, high: int) -> None:
        """Raise or log if the smallest or the largest row does not exist.

        Raises:
            IndexError: the mode is FATAL.
        """
        if low >= 0 and high < self._config.num_embeddings:
            return
        problem = (
            f"frozen table {self._config.name}: row {low if low < 0 else high} is not within "
            f"0:{self._config.num_embeddings}"
        )
        if self.mode is BoundsCheckMode.FATAL:
            raise IndexError(f"{problem}; features are rows, and unknown ids are row 0 (see ItemIndex)")
        if self.mode is BoundsCheckMode.WARNING and not self._has_warned:
            self._has_warned = True
            log.warning("%s; row 0 is looked up instead, from now on without a message", problem)


class Limits:
    """The smallest and the largest row of a lookup on a GPU, on their way to the host.

    Args:
        check: of the table.
        low: the smallest row, a scalar.
        high: the largest row.
    """

    def __init__(self, check: BoundsCheck, low: Tensor, high: Tensor) -> None:
        self._check = check
        self._limits = torch.stack([low, high]).to("cpu", non_blocking=True)  # into pinned memory
        self._copied: torch.cuda.Event | None = None
        if low.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def have_arrived(self) -> bool:
        """Whether nobody would wait in `settle`."""
        return self._copied is None or self._copied.query()

    def settle(self) -> None:
        """Wait for the limits and raise or log as the table's mode says.

        Raises:
            IndexError: a row does not exist, and the mode is FATAL.
        """
        if self._copied is not None:
            self._copied.synchronize()
        low, high = self._limits.tolist()
        self._check.report(low, high)


class PendingLimits:
    """Limits of lookups in training, which nobody waits for."""

    def __init__(self) -> None:
        self._limits: list[Limits] = []

    def settle(self, later: Sequence[Limits] = (), *, may_wait: bool = True) -> None:
        """Examine limits, and where the host may wait, also those that were left.

        Args:
            later: of a lookup.
            may_wait: whether to wait for those that have not arrived; otherwise they are left.

        Raises:
            IndexError: a row does not exist, and the mode of its table is FATAL.
        """
        limits, self._limits = [*self._limits, *later], []
        for each in limits:
            if may_wait or each.have_arrived():
                each.settle()
            else:
                self._limits.append(each)
