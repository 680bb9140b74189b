"""The window log as a Redis stream, with the interface and guarantees of the directory log.

    <name>:log        hash: format version, table_version, number of the newest window
    <name>:windows    stream: entry <seq>-0 has window <seq>
    <name>:names      hash: number of a window by its name
    <name>:reached    hash: furthest positions of the names that were trimmed (`progress.py`)
    <name>:times      hash: time at which a window was added, by its number

A script takes the next number and adds the window in one step. No window is lost or duplicated, whichever
writers append and whenever they are killed. Readers store their watermark next to the rows that it describes
and continue from there; there is no consumer group with a second record. The setting of the server decides
how much of the stream survives a crash of the server (`appendonly yes`, `appendfsync always`).
"""

from collections.abc import Iterator

from torch import Tensor

from mim_torchrec.embeddings.table.manifest import TableError, TableLost, VersionMismatch
from mim_torchrec.embeddings.windows.forgotten import MOST_NAMES
from mim_torchrec.embeddings.windows.log import (
    FORMAT_VERSION,
    check_not_behind,
    check_not_moved,
    missing_window,
)
from mim_torchrec.embeddings.windows.progress import advance, name_of, positions_in
from mim_torchrec.embeddings.windows.redis_address import locate
from mim_torchrec.embeddings.windows.redis_connection import TIMEOUT, connect, reachable
from mim_torchrec.embeddings.windows.window import MalformedWindow, Window

BATCH = 16  # windows fetched at once
TRIMMED_AT_ONCE = 5000  # names, while other clients wait

# KEYS: log, windows, names, times, reached. ARGV: number, name, bytes; units and positions that
# the name holds. Gives the number it has, or 0: look again.
APPEND = """
local known = redis.call('HGET', KEYS[3], ARGV[2])
if known then return tonumber(known) end
local function parts(position)
  local found = {}
  for part in string.gmatch(position, '[^-]+') do table.insert(found, tonumber(part)) end
  return found
end
local function is_behind(one, other)
  local mine, theirs = parts(one), parts(other)
  for i = 1, math.max(#mine, #theirs) do
    if mine[i] ~= theirs[i] then return mine[i] and (not theirs[i] or mine[i] > theirs[i]) end
  end
  return false
end
local covered = #ARGV > 3
for i = 4, #ARGV, 2 do
  local reached = redis.call('HGET', KEYS[5], ARGV[i])
  if not reached or is_behind(ARGV[i + 1], reached) then covered = false break end
end
if covered then return tonumber(redis.call('HGET', KEYS[1], 'trimmed')) end
local seq = tonumber(redis.call('HGET', KEYS[1], 'head')) + 1
if seq ~= tonumber(ARGV[1]) then return 0 end
redis.call('XADD', KEYS[2], seq .. '-0', 'window', ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], seq)
redis.call('HSET', KEYS[4], seq, redis.call('TIME')[1])
redis.call('HSET', KEYS[1], 'head', seq)
return seq
"""

# KEYS: log, names, reached. ARGV: number of the last name; how many names; they; units and positions.
TRIM = """
if tonumber(redis.call('HGET', KEYS[1], 'trimmed') or '-1') >= tonumber(ARGV[1]) then return 0 end
local count = tonumber(ARGV[2])
for i = 3, 2 + count do redis.call('HDEL', KEYS[2], ARGV[i]) end
for i = 3 + count, #ARGV, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'trimmed', ARGV[1])
return count
"""

# KEYS: log. ARGV: format version, table_version, start. Begins a log where there is none.
BEGIN = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'format_version', ARGV[1], 'table_version', ARGV[2], 'head', ARGV[3])
end
"""


class RedisWindowLog:
    """The windows of one table version in a Redis stream; see `WindowLog` for what methods do.

    Args:
        where: URL, see `redis_address.locate`.
        table_version: that all of its windows have.
        start: as of `WindowLog`.

    Raises:
        RedisUnavailable: the server does not answer; every method raises it, and may be called again.
        VersionMismatch: the log is of another version.
        TableError: there is no log, or it is of another format.
    """

    def __init__(self, where: str, table_version: str, start: int | None = None) -> None:
        self.table_version = table_version
        self._at = locate(where)
        self._client = connect(self._at)
        # braces: the slot of a cluster is that of what is in them, so a script may use all
        self._log, self._windows, self._names, self._times, self._reached = (
            f"{{{self._at.name}}}:{part}" for part in ("log", "windows", "names", "times", "reached")
        )
        with reachable(self._at):
            if start is not None:
                self._client.eval(BEGIN, 1, self._log, FORMAT_VERSION, table_version, start)
            version, log_of = self._client.hmget(self._log, "format_version", "table_version")
        if version is None:
            raise TableError(f"{self._at} has no window log of this name")
        if int(version) != FORMAT_VERSION:
            raise TableError(
                f"{self._at}: format_version {int(version)}, this release reads {FORMAT_VERSION}"
            )
        if log_of.decode() != table_version:
            raise VersionMismatch(
                f"{self._at} is of table_version {log_of.decode()}, expected {table_version}"
            )

    def __str__(self) -> str:
        return str(self._at)

    def last_seq(self) -> int:
        """Number of the newest window; where the log starts if there never was one.

        Raises:
            TableLost: the server has lost the log.
        """
        with reachable(self._at):
            last = self._client.hget(self._log, "head")
        if last is None:
            raise TableLost(f"{self._at} has lost the window log of this name")
        return int(last)

    def first_seq(self) -> int:
        """Number of the oldest window that can be read; one past the newest where none can."""
        with reachable(self._at):
            oldest = self._client.xrange(self._windows, count=1)
        return _number(oldest[0][0]) if oldest else self.last_seq() + 1

    def size(self) -> int:
        """Bytes of the windows that can be read, as the server counts them."""
        with reachable(self._at):
            return int(self._client.memory_usage(self._windows, samples=0) or 0)

    def append(
        self,
        window_id: str,
        ids: Tensor,
        vectors: Tensor,
        *,
        dtype: str = "float16",
        removed: Tensor | None = None,
        seq: int | None = None,
    ) -> int:
        """Add a window, unless the log has one of this name; returns its number.

        Raises:
            LogMoved: others have added windows, and the next number is not `seq`.
            TableError: the window is malformed, see `Window`.
            RedisFull: the server has no memory left; the window is not in the log.
        """
        while True:
            number = self.last_seq() + 1 if seq is None else seq
            window = Window.of(ids, vectors, table_version=self.table_version, seq=number,
                               window_id=window_id, dtype=dtype, removed=removed)  # fmt: skip
            with reachable(self._at):
                keys = (self._log, self._windows, self._names, self._times, self._reached)
                positions = [part for both in (positions_in(window_id) or {}).items() for part in both]
                taken = self._client.eval(
                    APPEND, len(keys), *keys, number, window_id, window.to_bytes(), *positions
                )
            if int(taken):
                return int(taken)
            check_not_moved(str(self), self.last_seq() + 1, seq)

    def names(self) -> list[str]:
        """Names of all windows that were ever added; of trimmed ones one name with all their positions."""
        with reachable(self._at):
            names = [name.decode() for name in self._client.hkeys(self._names)]
            reached = self._client.hgetall(self._reached)  # last: whoever trims moves names there
        trimmed = {unit.decode(): position.decode() for unit, position in reached.items()}
        return [*([name_of(trimmed)] if trimmed else []), *names]

    def read(self, seq: int) -> Window:
        """A window by its number.

        Raises:
            WindowGap: there is none of this number.
            MalformedWindow: its bytes are damaged, or hold another window.
            VersionMismatch: it is of another version.
        """
        with reachable(self._at):
            found = self._client.xrange(self._windows, f"{seq}-0", f"{seq}-0")
        if not found:
            raise missing_window(str(self), seq, self.first_seq(), self.last_seq())
        return self._window(*found[0])

    def wait(self, seq: int, timeout: float) -> bool:
        """Wait until there is a window after a number, at most `timeout` seconds; whether there is one."""
        block = max(1, int(1000 * min(timeout, TIMEOUT / 2)))  # 0 would be for ever
        with reachable(self._at):
            return bool(self._client.xread({self._windows: f"{seq}-0"}, count=1, block=block))

    def after(self, seq: int) -> Iterator[Window]:
        """The windows after a number, in order, up to the newest one at the first call of `next`."""
        last = self.last_seq()
        check_not_behind(str(self), last, seq)
        while seq < last:
            with reachable(self._at):
                stop = min(last, seq + BATCH)
                found = self._client.xrange(self._windows, f"{seq + 1}-0", f"{stop}-0")
            if not found or _number(found[0][0]) != seq + 1:
                self.read(seq + 1)
            for entry in found:
                yield self._window(*entry)
            seq = _number(found[-1][0])

    def forget(self, through: int, min_age: float = 0.0) -> int:
        """Remove windows that a base table holds. Their names are kept or trimmed (`progress.py`).

        Args:
            through: `seq` of the base table.
            min_age: seconds that a window is kept in any case.

        Returns:
            How many were removed.
        """
        with reachable(self._at):
            now = self._client.time(**({"target_nodes": "random"} if self._at.cluster else {}))
            came = {int(seq): int(at) for seq, at in self._client.hgetall(self._times).items()}
            newest = now[0] - min_age
            gone = [seq for seq in sorted(came) if seq <= through and came[seq] <= newest]
            if not gone:
                return 0
            removed = self._client.xtrim(self._windows, minid=f"{gone[-1] + 1}-0", approximate=False)
            self._client.hdel(self._times, *gone)
            self._trim(gone[-1])
        return int(removed)

    def _trim(self, through: int) -> None:
        """Keep positions in the place of the names of windows up to one, where there are many."""
        found = sorted((int(seq), name.decode()) for name, seq in self._client.hgetall(self._names).items())
        names = [(seq, name) for seq, name in found if seq <= through and positions_in(name)]
        if len(names) <= MOST_NAMES:
            return
        reached = {k.decode(): v.decode() for k, v in self._client.hgetall(self._reached).items()}
        for start in range(0, len(names), TRIMMED_AT_ONCE):
            part = names[start : start + TRIMMED_AT_ONCE]
            for _, name in part:
                advance(reached, positions_in(name) or {})
            positions = [part for both in reached.items() for part in both]
            keys = (self._log, self._names, self._reached)
            self._client.eval(
                TRIM, len(keys), *keys, part[-1][0], len(part), *(name for _, name in part), *positions
            )

    def _window(self, entry: bytes, fields: dict[bytes, bytes]) -> Window:
        seq, source = _number(entry), f"{self._at} entry {entry.decode()}"
        window = Window.from_bytes(fields.get(b"window", b""), source)
        if window.seq != seq:
            raise MalformedWindow(f"{source} holds window {window.seq}")
        if window.table_version != self.table_version:
            raise VersionMismatch(f"{source} is of {window.table_version}, its log of {self.table_version}")
        return window


def _number(entry: bytes) -> int:
    return int(entry.split(b"-")[0])
