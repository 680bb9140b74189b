"""Which items the rows of a live table are of: the index that windows are applied with, or a checkpoint's."""

from typing import Any

import torch.distributed as dist

from mim_torchrec.embeddings.collective import gather
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.saved_index import SavedIndex
from mim_torchrec.embeddings.table.format import TableError


class TableItems:
    """What the state of a frozen table holds of the index of its items.

    Attributes:
        index: that the last window was applied with.
        saved: of a checkpoint whose rows the table has, until an index has it.
    """

    def __init__(self) -> None:
        self.index: ItemIndex | None = None
        self.saved: SavedIndex | None = None

    def to_save(self) -> SavedIndex | None:
        """Return what a checkpoint holds, None where no window was applied."""
        return self.saved if self.index is None else self.index.saved()

    def to_json(self) -> list[dict[str, Any]]:
        """Return what :meth:`load_json` takes."""
        saved = self.to_save()
        return [] if saved is None else [saved.to_json()]

    def load_json(self, found: list[dict[str, Any]]) -> None:
        """Take what a checkpoint holds beside rows that were loaded."""
        self.index, self.saved = None, SavedIndex.from_json(found[0]) if found else None

    def clear(self) -> None:
        """Forget the items, where rows were loaded from a table."""
        self.index = self.saved = None

    def check_ranks(
        self, name: str, table_version: str | None, seq: int, group: dist.ProcessGroup | None
    ) -> None:
        """See that all ranks hold the same windows and items; every rank of the group calls it.

        Args:
            name: of the table.
            table_version: of this rank's rows.
            seq: of the last window that was applied to them.
            group: the ranks that share the rows.

        Raises:
            TableError: a rank has others than the first; on every rank.
        """
        saved = self.to_save()
        items = None if saved is None else (saved.items.size, saved.deleted.size, saved.digest[:8])
        ranks = gather((table_version, seq, items), group)
        for rank, found in enumerate(ranks):
            if found != ranks[0]:
                raise TableError(
                    f"frozen table {name}: rank {rank} {_words(*found)}, rank 0 {_words(*ranks[0])}. Every "
                    "rank has to be given the same windows in the same order; go back to a checkpoint before"
                )

    def check(self, name: str) -> None:
        """See that an index has the items of a checkpoint, before rows are looked up.

        Raises:
            TableError: none has.
        """
        if self.saved is not None:
            raise TableError(
                f"frozen table {name}: the checkpoint has windows up to {self.saved.seq} with "
                f"{self.saved.items.size} new items, which no index has; call restore_index(model, index) "
                "after load_state_dict"
            )


def _words(version: str | None, seq: int, items: tuple[int, int, str] | None) -> str:
    new, deleted, digest = items if items is not None else (0, 0, "none")
    return (
        f"has table_version {version}, windows up to {seq} with {new} new and {deleted} deleted items "
        f"(digest {digest})"
    )
