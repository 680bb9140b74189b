"""The parameter store in Redis or Valkey, one server or a cluster, for many computation machines.

    {<name>}:<version>                              hash: base, dim, dtype, shards
    {<name>:<version>:<base>:<shard>}               number of the last window applied to a shard; after a +
                                                    the number of written changes of the next window
    {<name>:<version>:<base>:<shard>}<8 bytes>      a row as stored, by item id
    {<name>:<version>:<base>:<shard>}w              list: which items the last windows have changed

A shard is what one slot of a cluster holds: its rows and their watermark. A script can therefore check the
watermark and write the rows in one step. A reader may see a part of a window before the watermark moves, but
never a torn row. It reads the watermarks with the rows: a shard that was lost, or is older than it was, is an
error and no unknown items. A consumer that was overtaken cannot write. The next base table of a version is
loaded next to the last and replaces it atomically. `<version>` is a digest of `table_version`. What lies
under the keys of a base table is in `redis_rows.py`.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mim_torchrec.embeddings.stores.redis_rows import APPLY, ROWS, RedisRows, changed_items
from mim_torchrec.embeddings.stores.seen import Marks, Seen
from mim_torchrec.embeddings.table.manifest import TableError, TableLost
from mim_torchrec.embeddings.table.quantize import DTYPES, decode, stored_width
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.shards import CHUNK
from mim_torchrec.embeddings.windows.redis_address import RedisAddress, locate
from mim_torchrec.embeddings.windows.redis_connection import check_kind, connect, reachable
from mim_torchrec.embeddings.windows.window import Window, is_due
from mim_torchrec.extras import needs

with needs("redis"):
    from redis.exceptions import NoPermissionError

log = logging.getLogger(__name__)

FETCH = 2000  # read by one command
CLUSTER_SHARDS = 64


class RedisStore:
    """A `ParameterStore` and `SharedStore` in Redis; open it with `open`, fill it with `load`."""

    def __init__(self, location: RedisAddress, table_version: str, timeout: float | None = None) -> None:
        self._connect(location, table_version, timeout)
        self._base = self._read_base()  # the newest that was seen; threads take a copy
        self.dim = self._base.dim
        self._check_policy()

    def _connect(self, location: RedisAddress, table_version: str, timeout: float | None = None) -> None:
        self.table_version, self._at, self._client = table_version, location, connect(location, timeout)
        version = hashlib.blake2b(table_version.encode(), digest_size=6).hexdigest()
        self._about, self._prefix = f"{{{location.name}}}:{version}", f"{location.name}:{version}:"
        self._may_ask = self._may_ask_changes = True
        self.seen = Seen()

    @classmethod
    def open(cls, where: str, table_version: str, timeout: float | None = None) -> "RedisStore":
        """Open a store that has a table of this version.

        Args:
            where: URL, see `redis_address.locate`.
            table_version: of the table.
            timeout: see `redis_connection.connect`.

        Raises:
            RedisUnavailable: the server does not answer; every method raises it, and may be called again.
            TableLost: no table of this version was loaded, or the server has lost it; likewise.
            TableError: the server may drop rows, as of `load`; likewise, from `seq`.
        """
        return cls(locate(where), table_version, timeout)

    @classmethod
    def load(
        cls, where: str, table: Table, progress: Callable[[int], object] = lambda rows: None
    ) -> "RedisStore":
        """Write a base table into a store, instead of an older one of its version.

        Where this base is there and the server has lost shards of it, these are written again.

        Args:
            where: URL, see `redis_address.locate`.
            table: the base.
            progress: called with the number of rows written since its last call.

        Raises:
            RedisFull: the server has no memory left. The table that was there before still is.
            OptionError: the URL is that of one server, and it is one of a cluster, or the other way round.
            TableError: the server may drop rows (a `maxmemory-policy` other than noeviction), or has a newer
                base.
        """
        at, manifest = locate(where), table.manifest
        shards = CLUSTER_SHARDS if at.cluster else 1
        store = cls.__new__(cls)
        store._connect(at, manifest.table_version)
        store.dim = manifest.dim
        with reachable(at):
            check_kind(store._client, at)
            _check_policy(store._client, at)
            before = store._client.hget(store._about, "base")
            if before is not None and int(before) > manifest.seq:
                raise TableError(f"{at} has a newer base, of seq {int(before)}, than {table.path}")
            store._base = RedisRows(store._prefix, manifest.seq, manifest.dim, manifest.dtype, shards)
            if before is None or int(before) < manifest.seq:
                store._write_base(table, range(shards), progress)
                facts = {"base": manifest.seq, "dim": manifest.dim, "dtype": manifest.dtype, "shards": shards}
                store._client.hset(store._about, mapping=facts)
            else:
                store._base = store._read_base()
                marks = store._get(store._base, [])[1]
                store._write_base(table, [n for n, mark in enumerate(marks) if mark is None], progress)
            store._drop_older()
            store._base = store._read_base()
        return store

    @property
    def seq(self) -> int:
        """See `ParameterStore`."""
        self._check_policy()
        return min(self._watermarks()[1])

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `ParameterStore`.

        Raises:
            TableLost: shards were lost, or are older than they were.
        """
        distinct, inverse = ids.unique(return_inverse=True)
        found = self._base
        while True:
            base, before = found, self.seen.marks
            values, marks = self._get(base, base.keys(distinct.tolist()))
            found = self._base = self._read_base()
            if found == base:  # else another one took the place of the one that was read
                break
        self._check_seen(before, base, self._numbers(base, marks))
        nothing = bytes(stored_width(base.dtype, base.dim) * DTYPES[base.dtype].itemsize)
        is_there = torch.tensor([value is not None for value in values], dtype=torch.bool)
        data = bytearray(b"".join(nothing if value is None else value for value in values))
        stored = torch.frombuffer(data, dtype=DTYPES[base.dtype]) if data else torch.empty(0)
        rows = stored.to(DTYPES[base.dtype]).view(len(values), -1) if values else stored.view(0, base.dim)
        vectors = decode(rows, base.dtype) if values else rows
        return vectors[inverse], is_there[inverse]

    def check(self) -> None:
        """See that the rows of all shards are there, and none older than they were.

        Raises:
            TableLost: they are not.
        """
        self._check_policy()
        before = self.seen.marks
        self._check_seen(before, *self._watermarks())

    def apply(self, window: Window) -> bool:
        """See `ParameterStore`; others may apply the same windows at the same time."""
        if window.dim != self.dim:
            raise TableError(f"{self._at} has vectors of {self.dim}, window {window.seq} of {window.dim}")
        base, marks = self._watermarks()
        stored = window.stored_as(base.dtype)
        values = [row.view(torch.uint8).numpy().tobytes() for row in stored.contiguous()]
        due = [
            shard
            for shard, mark in enumerate(marks)
            if is_due(window.table_version, window.seq, self.table_version, mark)
        ]
        if not due:
            return False
        with reachable(self._at):
            pipeline = self._client.pipeline(transaction=False)
            for keys, arguments in base.commands(window, values, due):
                # not eval(), which the pipelines of clusters do not have
                pipeline.execute_command("EVAL", APPLY, len(keys), *keys, *arguments)
            applied = all(pipeline.execute())
        if not applied and min(self._watermarks()[1]) < window.seq:
            # a new base came in between: the window is applied to that, or is in it
            return self.apply(window)
        if applied:
            self.seen.note_applied(base.seq, dict.fromkeys(due, window.seq))
        return applied

    def _write_base(self, table: Table, shards: Collection[int], progress: Callable[[int], object]) -> None:
        """Write the rows of shards, and their watermarks last."""
        if not shards:
            return
        # what somebody who was killed has left
        self._drop_where(lambda base, shard: base == table.manifest.seq and shard in shards)
        write = self._client.mset_nonatomic if self._at.cluster else self._client.mset
        row, count = table.manifest.first_row, self._base.shards
        for start in range(row, row + table.manifest.rows, CHUNK):
            stop = min(start + CHUNK, row + table.manifest.rows)
            ids = table.row_index().ids[start - row : stop - row].tolist()
            rows = table.rows_for(start, stop)
            stored = rows.view(torch.uint8).numpy()
            for first in range(0, len(ids), ROWS):
                part = ids[first : first + ROWS]
                values = (one.tobytes() for one in stored[first : first + ROWS])
                pairs = zip(self._base.keys(part), values, strict=True)
                written = {
                    key: value
                    for item, (key, value) in zip(part, pairs, strict=True)
                    if item % count in shards
                }
                if written:
                    write(written)
                progress(len(part))
        for number in shards:
            self._client.set(self._base.mark(number), table.manifest.seq)

    def _drop_older(self) -> None:
        """Remove the rows of all older base tables, also those that an interrupted load left."""
        self._drop_where(lambda base, _: base < self._base.seq)

    def _drop_where(self, is_dropped: Callable[[int, int], bool]) -> None:
        """Remove the rows of shards of base tables."""
        prefix = f"{{{self._prefix}"
        found: list[bytes] = []
        for key in self._client.scan_iter(match=f"{prefix}*", count=FETCH):
            base, shard = key[len(prefix.encode()) :].split(b"}")[0].split(b":")
            if not is_dropped(int(base), int(shard)):
                continue
            found.append(key)
            if len(found) == ROWS:
                self._unlink(found)
                found = []
        self._unlink(found)

    def _unlink(self, keys: list[bytes]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.unlink(key)
        pipeline.execute()

    def _get(self, base: RedisRows, keys: Sequence[bytes]) -> tuple[list[bytes | None], list[bytes | None]]:
        """Values by key, and the watermarks of all shards, each read by the command that reads its rows."""
        marks = [base.mark(shard) for shard in range(base.shards)]
        with reachable(self._at):
            if self._at.cluster:
                found = self._client.mget_nonatomic([*marks, *keys])  # grouped by slot
                return found[len(marks) :], found[: len(marks)]
            pipeline = self._client.pipeline(transaction=False)
            for start in range(0, max(len(keys), 1), FETCH):
                pipeline.mget(*marks, *keys[start : start + FETCH])
            parts = pipeline.execute()
        values = [value for part in parts for value in part[len(marks) :]]
        return values, [_lowest(part[at] for part in parts) for at in range(len(marks))]

    def _check_policy(self) -> None:
        """See that the server still keeps every row: one that was dropped looks like an unknown item."""
        if not self._may_ask:
            return
        try:
            with reachable(self._at):
                _check_policy(self._client, self._at)
        except NoPermissionError:
            self._may_ask = False
            log.warning("%s: this user may not ask INFO; whether the server may drop rows is not watched",
                        self._at)  # fmt: skip

    def _watermarks(self) -> tuple[RedisRows, list[int]]:
        """The base table, and the watermarks of its shards."""
        found = self._read_base()
        while True:
            base, marks = found, self._get(found, [])[1]
            found = self._base = self._read_base()
            if found == base:  # else another one took its place meanwhile
                return base, self._numbers(base, marks)

    def _numbers(self, base: RedisRows, marks: list[bytes | None]) -> list[int]:
        """Watermarks of the shards of a base table, which are remembered.

        Raises:
            TableLost: some are not there.
        """
        lost = [shard for shard, mark in enumerate(marks) if mark is None]
        if lost:
            raise TableLost(
                f"{self._at} has lost shards {lost} of {self.table_version}: load its table again"
            )
        found = [_number(mark) for mark in marks if mark is not None]
        changed = self._changed(base, found)  # first: where it cannot be read, nothing was seen
        self.seen.note(base.seq, dict(enumerate(found)), changed)
        return found

    def _changed(self, base: RedisRows, marks: list[int]) -> Tensor | None:
        """Items of the windows since the watermarks that were seen; None where the server cannot tell."""
        known = self.seen.marks
        if known.base != base.seq:
            return None
        before = [known.of_shards.get(shard, base.seq) for shard in range(base.shards)]
        moved = [shard for shard, mark in enumerate(marks) if mark > before[shard]]
        if not moved:
            return None  # of none
        try:
            with reachable(self._at):
                pipeline = self._client.pipeline(transaction=False)
                for shard in moved:
                    pipeline.lrange(base.changes(shard), 0, -1)
                logs = pipeline.execute()
        except NoPermissionError:
            if self._may_ask_changes:
                log.warning("%s: this user may not use LRANGE; every window changes all items", self._at)
            self._may_ask_changes = False
            return None
        parts = [changed_items(log, before[n], marks[n]) for n, log in zip(moved, logs, strict=True)]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None

    def _check_seen(self, before: Marks, base: RedisRows, marks: list[int]) -> None:
        loss = before.loss(base.seq, dict(enumerate(marks)))
        if loss is not None:
            raise TableLost(
                f"{self._at} has lost {loss}. An older copy may have taken its place: apply its windows "
                "again with mim store follow, or load a newer base table"
            )

    def _read_base(self) -> RedisRows:
        with reachable(self._at):
            facts = self._client.hmget(self._about, "base", "dim", "dtype", "shards")
        if None in facts:
            raise TableLost(
                f"{self._at} has no table of table_version {self.table_version}: load one with mim store load"
            )
        seq, dim, dtype, shards = facts
        return RedisRows(self._prefix, int(seq), int(dim), dtype.decode(), int(shards))


def _check_policy(client: Any, at: RedisAddress) -> None:
    servers = [node.redis_connection for node in client.get_primaries()] if at.cluster else [client]
    for server in servers:
        info = server.info("memory")
        if info["maxmemory"] and info["maxmemory_policy"] != "noeviction":
            raise TableError(
                f"{at} may drop rows when its memory is full (maxmemory-policy {info['maxmemory_policy']}); "
                "parameters need noeviction, and what was dropped has to be loaded again"
            )


def _number(mark: bytes) -> int:
    return int(mark.split(b"+")[0])


def _lowest(marks: Iterator[bytes | None]) -> bytes | None:
    """What can be said of rows that were read by several commands."""
    found = list(marks)
    return None if None in found else min((mark for mark in found if mark is not None), key=_number)
