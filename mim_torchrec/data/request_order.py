"""Which requests each rank reads, in which order: arithmetic on row numbers, without reading a row.

A collective waits for every rank, so no rank may run out of batches before the others. Row groups are put in
an order of (seed, epoch) that all ranks compute alike; the rows they hold, taken as one sequence, are divided
evenly and contiguously over the ranks; each rank permutes its rows in a buffer and cuts them into nearly
equal batches. What some number of ranks has left of an epoch, another number can go on with.
"""

from collections.abc import Iterator, Sequence

import numpy as np

Done = Sequence[tuple[int, int]]
"""Parts of an epoch that numbers of ranks have read, in turn: how many ranks, and batches of each."""

BUFFER_ROW_GROUPS = 8
BUFFER_ROWS = 256 * 1024


class RequestOrder:
    """The order of one rank.

    Args:
        rows: (num_row_groups,) requests of each row group, each at least 1.
        candidates: of all these requests.
        batch_size: candidates in a batch of this rank, on average.
        rank: of this process.
        world_size: number of ranks.
        seed: of the order, with the epoch.
        shuffle: whether there is another order than that of the files.
        buffer_rows: requests that are permuted together; None are those of eight row groups, but at most
            262,144.
        drop_remainder: leave out the last rows of an epoch so that all ranks have equally many requests.
        size_per_rank: whether each rank of other numbers of ranks had such batches as well; otherwise all
            ranks of one had as many candidates together.
    """

    def __init__(
        self,
        rows: Sequence[int],
        candidates: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        buffer_rows: int | None,
        drop_remainder: bool,
        size_per_rank: bool = False,
    ) -> None:
        self._rows = rows
        self.first: np.ndarray = np.cumsum([0, *rows])[:-1]
        """(num_row_groups,) number of the first request of each row group; requests are numbered in the order
        of the files."""
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._seed, self._shuffle, self._drop_remainder = seed, shuffle, drop_remainder
        self._size_per_rank = size_per_rank
        self._buffer_rows = BUFFER_ROWS if buffer_rows is None else buffer_rows
        self._buffer_row_groups = BUFFER_ROW_GROUPS if buffer_rows is None else len(rows)
        self.num_requests, self.num_candidates = int(sum(rows)), candidates
        self._epoch = 0
        self._done: Done = ()

    def set_epoch(self, epoch: int, done: Done) -> None:
        """Choose the order of the next pass, and what other numbers of ranks have read of it."""
        self._epoch, self._done = epoch, tuple(done)

    @property
    def num_batches(self) -> int:
        """Batches of the epoch, or of what is left of it, the same on every rank."""
        return self._count(self._left(self._done), self._world_size)

    def bounds(self) -> list[int]:
        """Where this rank's batches begin and end in its sequence of requests."""
        start, stop = self._share(self._left(self._done), self._rank, self._world_size)
        return _bounds(stop - start, self.num_batches)

    def chunks(self) -> Iterator[np.ndarray]:
        """Numbers of this rank's requests, in its order, in chunks that are read together."""
        return self._stream(self._pool(self._done), self._rank, self._world_size, self._epoch)

    def _count(self, requests: int, world_size: int) -> int:
        """Batches of each rank where so many divide so many requests."""
        others = 1 if self._size_per_rank else self._world_size / world_size
        each = self._batch_size * others * self.num_requests / self.num_candidates
        fewest = requests // world_size
        most = fewest if self._drop_remainder else -(-requests // world_size)
        return min(-(-most // max(1, round(each))), fewest)

    def _share(self, requests: int, rank: int, world_size: int) -> tuple[int, int]:
        """Where a rank's part of so many requests begins and ends."""
        if self._drop_remainder:
            each = requests // world_size
            return rank * each, (rank + 1) * each
        return requests * rank // world_size, requests * (rank + 1) // world_size

    def _read_by(self, requests: int, world_size: int, batches: int) -> list[int]:
        """How many of so many requests each rank has read after some batches."""
        shares = [self._share(requests, rank, world_size) for rank in range(world_size)]
        return [_bounds(stop - start, self._count(requests, world_size))[batches] for start, stop in shares]

    def _left(self, done: Done) -> int:
        """Requests that are left after parts of an epoch."""
        requests = self.num_requests
        for world_size, batches in done:
            shares = [self._share(requests, rank, world_size) for rank in range(world_size)]
            read = self._read_by(requests, world_size, batches)
            requests = sum(stop - start for start, stop in shares) - sum(read)
        return requests

    def _pool(self, done: Done) -> list[np.ndarray] | None:
        """Numbers of the requests left after parts of an epoch, in chunks; None is the whole epoch."""
        pool: list[np.ndarray] | None = None
        for k, (world_size, batches) in enumerate(done):
            read = self._read_by(self._left(done[:k]), world_size, batches)
            streams = [list(self._stream(pool, rank, world_size, self._epoch)) for rank in range(world_size)]
            pool = [
                chunk for rank, stream in enumerate(streams)
                for chunk in _between(stream, read[rank], sum(map(len, stream)))
            ]  # fmt: skip
        return pool

    def _stream(
        self, pool: list[np.ndarray] | None, rank: int, world_size: int, epoch: int
    ) -> Iterator[np.ndarray]:
        """Numbers of the requests of a rank, in its order, in chunks."""
        requests = self.num_requests if pool is None else sum(map(len, pool))
        start, stop = self._share(requests, rank, world_size)
        if pool is None:
            yield from self._permuted(start, stop, rank, epoch)
        else:
            yield from _between(pool, start, stop)

    def _permuted(self, start: int, stop: int, rank: int, epoch: int) -> Iterator[np.ndarray]:
        """Requests start to stop of the epoch's sequence, permuted within each chunk when shuffling."""
        order = np.arange(len(self._rows))
        rng = np.random.default_rng((self._seed, epoch, rank + 1))
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(order)
        waiting: list[np.ndarray] = []
        first = room = 0
        for index in order:
            rows = self._rows[int(index)]
            begin, end = max(start - first, 0), min(stop - first, rows)
            first += rows
            while begin < end:
                room = room if waiting else self._buffer_rows
                part = self.first[index] + np.arange(begin, min(end, begin + room))
                waiting.append(part)
                begin, room = begin + len(part), room - len(part)
                is_full = not room or (begin == end and len(waiting) == self._buffer_row_groups)
                if not self._shuffle or is_full or (begin == end and first >= stop):
                    chunk = np.concatenate(waiting)
                    yield chunk[rng.permutation(len(chunk))] if self._shuffle else chunk
                    waiting = []


def _bounds(rows: int, count: int) -> list[int]:
    """Where `count` nearly equal batches of so many rows begin and end."""
    return [rows * k // count for k in range(count + 1)] if count else [0]


def _between(chunks: Sequence[np.ndarray], start: int, stop: int) -> Iterator[np.ndarray]:
    """Elements start to stop of the concatenation of chunks, in chunks."""
    first = 0
    for chunk in chunks:
        begin, end = max(start - first, 0), min(stop - first, len(chunk))
        first += len(chunk)
        if begin < end:
            yield chunk[begin:end]
