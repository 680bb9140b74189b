"""What a checkpoint holds of an item index: the items of a live table that its files do not have."""

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mim_torchrec.embeddings.table.row_index import Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedIndex:
    """What a checkpoint holds of an index beside the table on the disk.

    Args:
        base: digest of the items that the table on the disk has.
        seq: of the last window.
        items: (num_new,) int64, new items in the order of their rows.
        deleted: (num_deleted,) int64, rows of deleted items, ascending.
    """

    base: str
    seq: int
    items: Ints
    deleted: Ints

    def to_json(self) -> dict[str, Any]:
        """Return it in the types of JSON."""
        numbers = {"items": self.items, "deleted": self.deleted}
        coded = {name: base64.b64encode(a.astype("<i8").tobytes()).decode() for name, a in numbers.items()}
        return {"base": self.base, "seq": self.seq, **coded}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SavedIndex":
        """Return what :meth:`to_json` was called on."""
        items, deleted = (
            np.frombuffer(base64.b64decode(value[name]), "<i8").astype(np.int64)
            for name in ("items", "deleted")
        )
        return cls(base=value["base"], seq=value["seq"], items=items, deleted=deleted)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, to compare ranks by."""
        words = f"{self.base} {self.seq} {self.items.size} ".encode()
        return hashlib.sha256(words + self.items.tobytes() + self.deleted.tobytes()).hexdigest()
