"""Sources of new items: Parquet files that are moved into a directory, or a Redis stream.

A source consists of units, such as files or one stream, and is read in order. A position is a row of a file
or an entry of the stream. Windows record the positions that they reach, so the log alone tells what is still
to be read.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import (
    ITEMS,
    ITEMS_REQUIRED,
    ORIGINAL,
    TableFile,
    computed,
    open_parquet,
    present_columns,
)
from mim_torchrec.embeddings.listing import data_files
from mim_torchrec.embeddings.windows.redis_address import locate

LOOK_EVERY = 0.05  # seconds between two looks into the directory
BATCH = 64  # rows in memory
REMOVED = "removed"

Positions = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A new item, or one that was deleted, as it came.

    Args:
        unit: of the source.
        position: in the unit, behind this arrival.
        place: for people.
        item_id: None where there was none that could be read.
        item_name: the id as people know it, where that is text.
        title: likewise.
        image: encoded, likewise.
        removed: whether the item was deleted.
        problem: why it cannot be used, None if it can.
    """

    unit: str
    position: str
    place: str
    item_id: int | None = None
    item_name: str | None = None
    title: str | None = None
    image: bytes | None = None
    removed: bool = False
    problem: str | None = None


class ItemSource(Protocol):
    """New items in order."""

    def seek(self, positions: Positions) -> None:
        """Continue after these positions; units that are not named are read from their beginning."""

    def read(self, limit: int, timeout: float) -> list[Arrival]:
        """The next items, at most `limit`; none if none came within `timeout` seconds.

        Raises:
            RedisUnavailable: the server does not answer; the source may be read again.
        """


class DirectorySource:
    """Parquet files of a directory and of those in it, in the order of their paths as far as they are there.

    Files and directories whose names begin with `.` or `_` are left alone: they are being written.

    Args:
        root: directory.
        name: what units begin with.

    Raises:
        DataError: there is no such directory.
    """

    def __init__(self, root: Path, name: str = "") -> None:
        if not root.is_dir():
            raise DataError("no such directory; make it, or check --source", file=root)
        self._root, self._name = root, name
        self.seek({})

    def seek(self, positions: Positions) -> None:
        """See `ItemSource`."""
        self._positions = dict(positions)
        self._done: dict[str, tuple[int, int]] = {}  # files that were read to their end, by size and time
        self._current: Iterator[Arrival] = iter(())

    def read(self, limit: int, timeout: float) -> list[Arrival]:
        """See `ItemSource`; a file that cannot be read is one arrival with a problem."""
        deadline = time.monotonic() + timeout
        while True:
            found = [arrival for _, arrival in zip(range(limit), self._arrivals(), strict=False)]
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(LOOK_EVERY, left))

    def _arrivals(self) -> Iterator[Arrival]:
        # not `yield from`, which would end the rows of a file together with this generator
        for arrival in self._current:  # noqa: UP028
            yield arrival
        for path in data_files(self._root):
            stat = path.stat()
            known = (stat.st_size, stat.st_mtime_ns)
            if self._done.get(str(path)) != known:
                self._done[str(path)] = known
                self._current = self._rows(path)
                for arrival in self._current:  # noqa: UP028
                    yield arrival

    def _rows(self, path: Path) -> Iterator[Arrival]:
        within = path.relative_to(self._root).as_posix()
        unit = f"{self._name}/{within}" if self._name else within
        first = int(self._positions.get(unit, 0))
        try:
            parquet = open_parquet(path, ITEMS, ITEMS_REQUIRED, originals=True)
            columns = [c for c in present_columns(parquet, ITEMS) if c in ("item_id", "title", "image")]
            removed = parquet.schema_arrow.get_field_index(REMOVED)
            if removed >= 0 and not pa.types.is_boolean(parquet.schema_arrow.field(removed).type):
                raise DataError("expected bool; convert the column", file=path, column=REMOVED)
            wanted = [*columns, *([REMOVED] if removed >= 0 else [])]
            start = 0
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                if stop > first:
                    for row, item in enumerate(_items(parquet, group, wanted, path), start):
                        if row >= first:
                            self._positions[unit] = str(row + 1)
                            item[REMOVED] = bool(item.get(REMOVED))
                            name = item.pop(f"item_id{ORIGINAL}", None)
                            item["item_name"] = None if name is None else str(name)
                            yield Arrival(
                                unit=unit, position=str(row + 1), place=f"{path}, row {row}", **item
                            )
                start = stop
        except DataError as error:
            # somebody may fix it: no position says that it was read
            yield Arrival(unit="", position="", place=str(path), problem=str(error))


def _items(parquet: TableFile, group: int, columns: list[str], path: Path) -> Iterator[dict]:
    """Rows of a row group, a few at a time, because images are large."""
    try:
        for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
            yield from computed(pa.Table.from_batches([batch]), parquet, path, group).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error}); write it again", file=path, row_group=group) from None


class StreamSource:
    """Entries of a Redis stream.

    Args:
        where: URL; the name behind # is that of the stream.
        name: what units begin with.

    Raises:
        RedisUnavailable: the server does not answer.
        MissingExtra: the extra `redis` is not installed.
    """

    def __init__(self, where: str, name: str = "") -> None:
        from mim_torchrec.embeddings.windows.redis_connection import connect, reachable

        self._at, self._reachable = locate(where), reachable
        self._client = connect(self._at)
        self._unit = f"{name}/{self._at.name}" if name else self._at.name
        self.seek({})

    def seek(self, positions: Positions) -> None:
        """See `ItemSource`."""
        self._after = positions.get(self._unit, "0-0")

    def read(self, limit: int, timeout: float) -> list[Arrival]:
        """See `ItemSource`."""
        block = max(1, int(1000 * timeout)) if timeout > 0 else None
        with self._reachable(self._at):
            found = self._client.xread({self._at.name: self._after}, count=limit, block=block)
        if not found:
            return []
        entries = found[0][1] if isinstance(found, list) else next(iter(found.values()))[0]
        self._after = entries[-1][0].decode()
        return [self._arrival(entry.decode(), fields) for entry, fields in entries]

    def _arrival(self, entry: str, fields: dict[bytes, bytes]) -> Arrival:
        known: dict[str, Any] = {"unit": self._unit, "position": entry, "place": f"{self._at} entry {entry}"}
        try:
            text = fields[b"item_id_text"].decode() if b"item_id_text" in fields else None
            item_id = int(fields[b"item_id"]) if text is None else stable_ids(pa.array([text]))[0].as_py()
            title = fields[b"title"].decode() if b"title" in fields else None
        except KeyError:
            return Arrival(**known, problem="there is no item_id, nor item_id_text")
        except ValueError as error:
            return Arrival(**known, problem=str(error))
        removed = fields.get(REMOVED.encode(), b"0") not in (b"0", b"", b"false")
        if not -(2**63) <= item_id < 2**64:
            return Arrival(**known, problem=f"item_id {item_id} is beyond 64 bits")
        if item_id >= 2**63:
            item_id -= 2**64  # as `stable_ids` has it
        image = fields.get(b"image")
        return Arrival(**known, item_id=item_id, item_name=text, title=title, image=image, removed=removed)
