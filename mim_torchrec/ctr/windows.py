"""Windows of new items into the table of a model that is being trained (§3.5, RIM).

Every few steps all ranks agree on the windows that each of them can read, and apply those at that step. An
item that was unknown when training started has its content interest from then on. The watermark goes into
checkpoints: a resumed run applies the windows that it had applied, and continues.
"""

import logging

from torch import nn

from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.live import (
    apply_window,
    check_index,
    check_ranks,
    expected_digest,
    table_state,
)
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.windows.compact import changes
from mim_torchrec.embeddings.windows.transport import Transport
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext

log = logging.getLogger(__name__)

CHUNK = 32  # windows in memory


class LiveWindows:
    """Applies the windows of a log to a sharded model; every rank calls every method.

    Args:
        model: with a loaded frozen table.
        index: of the table, which the batches' ids are mapped by.
        windows: the log.
        every: steps between two looks.
        context: the process group.
    """

    def __init__(
        self, model: nn.Module, index: ItemIndex, windows: Transport, every: int, context: DistributedContext
    ) -> None:
        if every < 1:
            raise OptionError(f"windows are looked for every {every} steps; it has to be at least 1")
        self._model, self._index, self._windows = model, index, windows
        self._every, self._context = every, context
        self.applied = 0

    @property
    def seq(self) -> int:
        """The last window applied."""
        return table_state(self._model).seq

    def before_step(self, done: int) -> None:
        """Look for windows where it is time to, after `done` steps.

        Raises:
            WindowGap: the log has forgotten windows that the table lacks.
            SpareRowsExhausted: there is no row left for a new item.
        """
        if done % self._every == 0:
            self.catch_up()

    def catch_up(self, seq: int | None = None) -> None:
        """Apply windows up to one, or all that every rank can read.

        Raises:
            ConnectionError: up to that one they cannot be read.
            WindowGap: as of `before_step`.
            TableError: the index that batches are mapped by is not that of the rows.
        """
        check_index(self._model, self._index)
        while seq is None or self.seq < seq:
            stop = self.seq + CHUNK if seq is None else min(seq, self.seq + CHUNK)
            found, problem = self._read(stop)
            common = min(self._context.all_gather_objects(len(found)))
            if not common:
                if seq is not None:
                    number = self.seq + 1
                    raise ConnectionError(f"window {number} of {self._windows} cannot be read: {problem}")
                return
            for window in found[:common]:
                apply_window(self._model, self._index, window)
            self.applied += common
            if self._context.is_main:
                log.info("windows applied up to %d, %d items in the table", self.seq, len(self._index))

    def check_ranks(self) -> None:
        """See that all ranks have applied the same windows.

        Raises:
            TableError: one has not; on all ranks.
        """
        check_ranks(self._model)

    def expected_digest(self, table: Table) -> str:
        """What `table_digest` is where nothing but the windows changed the table.

        Args:
            table: the base.

        Raises:
            WindowGap: the log has forgotten windows that were applied.
        """
        changed, _ = changes(self._windows, table.manifest, self.seq)
        return expected_digest(self._model, Table.open(table.path, verify=False), self._index, changed)

    def _read(self, stop: int) -> tuple[list[Window], OSError | None]:
        """The next windows that this rank can read; the others may be able to read fewer."""
        found: list[Window] = []
        try:
            for window in self._windows.after(self.seq):
                if window.seq > stop:
                    break
                found.append(window)
        except OSError as error:
            log.warning("rank %d: %s; windows are looked for again later", self._context.rank, error)
            return found, error
        return found, None
