"""Rows of a base table in Redis: their keys, how a window changes them, and which items windows have changed.

A reader that finds a higher watermark than before asks what has changed. The script that writes a part of a
window adds its items to a list of the shard, in the same step. The list has the last PARTS parts. Where it
does not have every part of every window since, a reader takes all items for changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.embeddings.windows.window import Window

ROWS = 200  # written by one command: others wait no longer than that
PARTS = 64  # whose items a shard remembers: 8 bytes an item, so at most 100 KB

# KEYS: watermark, list of changes, rows to write, to delete. ARGV: watermark expected, and to set; changes of
# the window ahead of these; rows to write; parts that the list keeps; the rows. A part is refused unless all
# ahead of it are written: one may come to an error (no memory, a slot that moves) and the next one through.
APPLY = """
local seq, done = string.match(redis.call('GET', KEYS[1]) or '', '^(%-?%d+)%+?(%d*)$')
local before, rows, changes = tonumber(ARGV[3]), tonumber(ARGV[4]), #KEYS - 2
done = tonumber(done) or 0
if seq ~= ARGV[1] or done < before then return 0 end
local moves = ARGV[2] ~= ARGV[1]
if moves or before + changes > done then
  local items = {}
  for i = 3, #KEYS do items[i - 2] = string.sub(KEYS[i], -8) end
  local head = string.format('%d:%d:%d:', ARGV[1] + 1, before, moves and 1 or 0)
  redis.call('RPUSH', KEYS[2], head .. table.concat(items))
  redis.call('LTRIM', KEYS[2], -tonumber(ARGV[5]), -1)
end
for i = 1, rows do redis.call('SET', KEYS[2 + i], ARGV[5 + i]) end
for i = rows + 3, #KEYS do redis.call('DEL', KEYS[i]) end
if moves then
  redis.call('SET', KEYS[1], ARGV[2])
elseif before + changes > done then
  redis.call('SET', KEYS[1], seq .. '+' .. (before + changes))
end
return 1
"""


@dataclass(frozen=True)
class RedisRows:
    """What a store says of the base table of a version, and the keys of its shards and rows.

    Args:
        prefix: of the version's keys.
        seq: of the base table.
        dim: length of a vector.
        dtype: as stored.
        shards: over which rows are divided, by id.
    """

    prefix: str
    seq: int
    dim: int
    dtype: str
    shards: int

    def mark(self, shard: int) -> bytes:
        """Key of the watermark of a shard."""
        return f"{{{self.prefix}{self.seq}:{shard}}}".encode()

    def changes(self, shard: int) -> bytes:
        """Key of the list of changes of a shard."""
        return self.mark(shard) + b"w"

    def keys(self, items: list[int]) -> list[bytes]:
        """Keys of rows, which end with the 8 bytes of the id."""
        shards = [self.mark(shard) for shard in range(self.shards)]
        return [shards[item % len(shards)] + item.to_bytes(8, "big", signed=True) for item in items]

    def commands(
        self, window: Window, values: list[bytes], due: list[int]
    ) -> Iterator[tuple[list[bytes], list[bytes | int]]]:
        """Keys and arguments of the script: at most ROWS rows each; a shard's last call moves its mark."""
        for shard in due:
            rows = [(item, value) for item, value in zip(window.ids.tolist(), values, strict=True)
                    if item % self.shards == shard]  # fmt: skip
            gone = [item for item in window.removed.tolist() if item % self.shards == shard]
            changes: list[tuple[int, bytes | None]] = [*rows, *((item, None) for item in gone)]
            parts = [changes[start : start + ROWS] for start in range(0, len(changes), ROWS)] or [[]]
            for number, part in enumerate(parts):
                mark = window.seq if number == len(parts) - 1 else window.seq - 1
                written = [(item, value) for item, value in part if value is not None]
                keys = [self.mark(shard), self.changes(shard), *self.keys([item for item, _ in part])]
                numbers = [window.seq - 1, mark, number * ROWS, len(written), PARTS]
                yield keys, [*numbers, *(value for _, value in written)]


def changed_items(log: Sequence[bytes], after: int, until: int) -> Tensor | None:
    """Items that windows of a shard have changed.

    Args:
        log: the shard's list of changes.
        after: number of the last window whose changes are known.
        until: number of the last window that is asked for.

    Returns:
        (num_changed,) int64; None where the list does not have all of these windows whole.

    >>> item = (7).to_bytes(8, "big")
    >>> changed_items([b"1:0:1:" + item, b"2:0:1:"], 0, 2), changed_items([b"2:0:1:"], 0, 2)
    (tensor([7]), None)
    """
    found: list[bytes] = []
    window, place = after + 1, 0  # of the part that comes next
    for entry in log:
        seq, before, is_last, items = entry.split(b":", 3)
        if int(seq) <= after or int(seq) > until:
            continue
        if (int(seq), int(before)) != (window, place):
            return None  # a part is not there any more, or a writer of an earlier release has left none
        found.append(items)
        window, place = (window + 1, 0) if int(is_last) else (window, place + len(items) // 8)
    if window <= until:
        return None
    return torch.from_numpy(np.frombuffer(b"".join(found), ">i8").astype(np.int64))
