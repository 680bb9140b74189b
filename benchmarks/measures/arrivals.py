"""New items that arrive where RIM looks for them: in a directory or in a Redis stream."""

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from redis.exceptions import ResponseError

from mim_torchrec.embeddings.windows.redis_address import is_redis, locate
from mim_torchrec.embeddings.windows.redis_connection import connect, reachable

SCHEMA = pa.schema([("item_id", pa.int64()), ("title", pa.string()), ("image", pa.binary()),
                    ("removed", pa.bool_())])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One arrival.

    Args:
        item_id: of the item.
        title: None where it is deleted.
        image: likewise.
        removed: whether it is deleted.
        bad: whether it cannot be encoded.
    """

    item_id: int
    title: str | None = None
    image: bytes | None = None
    removed: bool = False
    bad: bool = False

    def content(self) -> tuple[str, bytes]:
        """Title and image of an item that is not deleted."""
        assert self.title is not None and self.image is not None, f"item {self.item_id} is deleted"
        return self.title, self.image

    def row(self) -> dict[str, object]:
        """As a source has it."""
        return {"item_id": self.item_id, "title": self.title, "image": self.image, "removed": self.removed}


class Feeder:
    """Puts arrivals where RIM looks for them.

    Args:
        source: directory, or URL of a Redis stream.
        arrivals: in order.
    """

    def __init__(self, source: str, arrivals: list[Arrival]) -> None:
        self._source, self._arrivals = source, arrivals
        self.fed = 0
        if not is_redis(source):
            Path(source).mkdir(parents=True)

    def feed(self, through: int) -> None:
        """Put all arrivals up to a number that are not there yet.

        Raises:
            RedisUnavailable: the server does not answer; what came is not put a second time.
        """
        part = self._arrivals[self.fed : through]
        if not part:
            return
        if is_redis(self._source):
            at = locate(self._source)
            client = connect(at)
            for arrival in part:
                fields = {name: int(v) if isinstance(v, bool) else v for name, v in arrival.row().items()
                          if v is not None}  # fmt: skip
                try:
                    with reachable(at):
                        client.xadd(at.name, fields, id=f"{self.fed + 1}-0")
                except ResponseError as error:  # the answer to the last attempt was lost
                    if "equal or smaller" not in str(error):
                        raise
                self.fed += 1
            return
        path = Path(self._source) / f".{self.fed:08d}"
        pq.write_table(pa.Table.from_pylist([a.row() for a in part], schema=SCHEMA), path, row_group_size=7)
        os.replace(path, path.with_name(f"{self.fed:08d}.parquet"))
        self.fed += len(part)
