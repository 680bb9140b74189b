"""Rows of a table that is larger than memory: its files on an SSD behind a cache in host memory.

A row that is popular and one that is not share a page of a file, so the page cache keeps 4 KiB for a row of
256 bytes. The cache here keeps rows. It is set-associative: a row may have any of the ``WAYS`` slots of one
set, and takes the one that was used longest ago. Rows that it lacks are read by many threads, because an SSD
is fast only when it is asked for many pages at once.

``prefetch`` reads the rows of a later batch in the background, while the model computes.

Not here: a cache that outlives the process, and fbgemm's key-value embedding (``EmbeddingRocksDB``), which
fbgemm's build for CPUs lacks.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mim_torchrec.embeddings.sharded.rows import MappedRows, RowStore
from mim_torchrec.embeddings.table.quantize import DTYPES, row_bytes

WAYS = 8
READERS = 32  # pages asked for at once
MAX_READ = 64  # rows that a reader copies at a time: few enough that torch uses one thread


class SsdRows(RowStore):
    """Rows in files behind a cache in host memory, which holds those that were used last.

    One thread calls its methods; the threads that read are its own.

    Args:
        backing: all rows.
        cache_bytes: of the cache, with what it needs to find rows.

    Raises:
        ValueError: so many bytes hold no set of rows.

    ``hits`` and ``misses`` count the ids looked up that were in the cache or not, and ``rows_read`` the rows
    read from files, by lookups and prefetches.
    """

    def __init__(self, backing: MappedRows, cache_bytes: int) -> None:
        super().__init__(backing.dtype, backing.num_rows, backing.dim)
        self.backing = backing
        number = torch.int32 if backing.num_rows < 2**31 else torch.int64
        slot_bytes = row_bytes(self.dtype, self.dim) + number.itemsize + torch.int32.itemsize
        sets = min(cache_bytes // (WAYS * slot_bytes), -(-backing.num_rows // WAYS))
        if sets < 1 and backing.num_rows:
            raise ValueError(f"a cache needs {WAYS * slot_bytes} bytes or more, found {cache_bytes}")
        self.cache_rows = sets * WAYS
        self.cache_bytes = self.cache_rows * slot_bytes
        self._holds = torch.full((sets, WAYS), -1, dtype=number)
        self._used = torch.zeros(sets, WAYS, dtype=torch.int32)  # when: the clock ticks once a batch
        self._cache = torch.empty(self.cache_rows, self.stored_width, dtype=DTYPES[self.dtype])
        self._clock = 0
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ssd-reader")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="ssd-prefetch")
        self._coming: list[tuple[Tensor, Future[None]]] = []
        self.hits = 0
        self.misses = 0
        self.rows_read = 0

    def gather(self, rows: Tensor) -> Tensor:
        if not rows.numel():
            return self.backing.gather(rows)
        self._finish_those_that_bring(rows)
        with self._lock:
            slot = self._find(rows, tick=True)
            missing = (slot < 0).nonzero()[:, 0]
            out = self._cache.index_select(0, slot.clamp_(min=0))
            self.misses += missing.numel()
            self.hits += rows.numel() - missing.numel()
        if missing.numel():
            distinct, index = rows[missing].unique(return_inverse=True)
            stored = self._read(distinct)
            out.index_copy_(0, missing, stored.index_select(0, index))
            with self._lock:
                self._insert(distinct, stored)
        return out

    def prefetch(self, rows: Tensor) -> None:
        """Begin to bring rows (n,) int64 of a later lookup into the cache, and return at once.

        A lookup that needs them waits for them. An error of the reading is raised by the next lookup or
        prefetch.
        """
        while self._coming and self._coming[0][1].done():  # they end in the order in which they began
            self._coming.pop(0)[1].result()
        if rows.numel():
            self._coming.append((rows, self._background.submit(self._bring, rows)))

    def write(self, rows: Tensor, stored: Tensor) -> None:
        for _, future in self._coming:
            future.result()  # it may have read the bytes that are replaced
        with self._lock:
            self.backing.write(rows, stored)
            if rows.numel():
                slot = self._find(rows)
                found = slot >= 0
                self._cache[slot[found]] = stored[found]

    def blocks(self) -> Iterator[Tensor]:
        yield from self.backing.blocks()

    def _finish_those_that_bring(self, rows: Tensor) -> None:
        """Wait for the prefetches under way that bring rows (n,) which the cache lacks."""
        while self._coming:
            with self._lock:
                absent = rows[self._find(rows) < 0]
            brings = [bool(torch.isin(absent, own).any()) for own, _ in self._coming]
            if not any(brings):
                return
            for _ in range(1 + brings.index(True)):
                self._coming.pop(0)[1].result()

    def _bring(self, rows: Tensor) -> None:
        distinct = rows.unique()
        with self._lock:
            absent = distinct[self._find(distinct, tick=True) < 0]
        stored = self._read(absent)
        with self._lock:
            self._insert(absent, stored)

    def _read(self, rows: Tensor) -> Tensor:
        """Return rows (n,) of the files, (n, stored_width), read by many threads."""
        stored = torch.empty(rows.numel(), self.stored_width, dtype=DTYPES[self.dtype])
        count = max(1, min(MAX_READ, -(-rows.numel() // READERS)))

        def copy(some: Tensor, out: Tensor) -> None:
            out.copy_(self.backing.gather(some))

        for _ in self._readers.map(copy, rows.split(count), stored.split(count)):
            pass
        self.rows_read += rows.numel()
        return stored

    def _find(self, rows: Tensor, tick: bool = False) -> Tensor:
        """The slots of rows (n,), int64, and -1 for those that have none; with ``tick`` they are used now."""
        sets = rows % len(self._holds)
        held, way = (self._holds[sets] == rows[:, None]).max(1)
        slot = torch.where(held, WAYS * sets + way, -1)
        if tick:
            self._clock += 1
            self._used.view(-1)[slot[held]] = self._clock
        return slot

    def _insert(self, rows: Tensor, stored: Tensor) -> None:
        """Put distinct rows (n,) into the slots used longest ago; what exceeds a set stays out."""
        absent = self._find(rows) < 0  # another thread may have brought some
        rows, stored = rows[absent], stored[absent]
        sets, order = (rows % len(self._holds)).sort()
        place = torch.arange(rows.numel()) - torch.searchsorted(sets, sets)  # among the rows of a set
        oldest = self._used[sets].argsort(1)
        fits = place < WAYS
        slot = WAYS * sets[fits] + oldest[fits].gather(1, place[fits, None])[:, 0]
        kept = order[fits]
        self._cache[slot] = stored[kept]
        self._holds.view(-1)[slot] = rows[kept].to(self._holds.dtype)
        self._used.view(-1)[slot] = self._clock
