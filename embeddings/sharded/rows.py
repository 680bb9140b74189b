"""Where the rows that a rank owns are kept, and how they are looked up there: nothing here can be trained.

A row is stored as on the disk (``table/quantize.py``). ``gather`` copies its bytes by ``index_select``, which
is as fast as copying memory is. ``vectors`` converts int8 and int4 rows to float32; on a CPU the embedding
bag kernels, with bags of one row, read bytes and write floats in one go. Rows are numbered from 0 on each
rank.

Three places: a tensor (``DenseRows``: host memory, HBM, or managed (UVM) memory), the pages of the files that
a table was written to (``MappedRows``), and managed memory behind a cache in HBM (``CachedRows``). ``ssd.py``
has a fourth: files behind a cache in host memory.
"""

import abc
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from mim_torchrec.embeddings.sharded.pages import READ_SOON, advise
from mim_torchrec.embeddings.table.quantize import DTYPES, decode, is_quantized, stored_width

CHUNK = 1 << 16


class RowStore(abc.ABC):
    """Rows of one table on one rank.

    Args:
        dtype: how vectors are stored, a key of ``quantize.DTYPES``.
        num_rows: rows of this rank.
        dim: length of a vector.

    ``filled`` says whether rows were loaded, restored or written; before, all are zero.
    """

    filled = False

    def __init__(self, dtype: str, num_rows: int, dim: int) -> None:
        self.dtype, self.num_rows, self.dim = dtype, num_rows, dim
        self.stored_width = stored_width(dtype, dim)

    @abc.abstractmethod
    def gather(self, rows: Tensor) -> Tensor:
        """Return rows (n,) int64 as they are stored, (n, stored_width)."""

    @abc.abstractmethod
    def write(self, rows: Tensor, stored: Tensor) -> None:
        """Replace rows (n,) int64, each at most once, by (n, stored_width)."""

    @abc.abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, some at a time, as they are stored."""

    def prefetch(self, rows: Tensor) -> None:  # noqa: B027  most stores have nothing to do
        """Bring rows (n,) int64 of a later lookup near; nothing is done for rows that are near already."""

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors (n, dim) of rows (n,): of int8 and int4 as float32, else in the type stored."""
        stored = self.gather(rows)
        return decode(stored, self.dtype) if is_quantized(self.dtype) else stored

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, wherever they are."""
        return self.num_rows * self.stored_width * DTYPES[self.dtype].itemsize


class DenseRows(RowStore):
    """Rows in one tensor, zeros at first; it is allocated when it is first asked for.

    Args:
        dtype: as in ``RowStore``.
        num_rows: likewise.
        dim: likewise.
        device: where the tensor is.
        managed: whether it is in managed (UVM) memory: host memory that a GPU reads as its own.
        tensor: the rows (num_rows, stored_width), where they exist already.
    """

    def __init__(
        self,
        dtype: str,
        num_rows: int,
        dim: int,
        device: torch.device,
        managed: bool = False,
        tensor: Tensor | None = None,
    ) -> None:
        super().__init__(dtype, num_rows, dim)
        self.device, self._managed = device, managed
        self._tensor = tensor
        self._bags = torch.empty(0, dtype=torch.int64)

    @property
    def tensor(self) -> Tensor:
        """All rows, (num_rows, stored_width)."""
        if self._tensor is None:
            shape, dtype = (self.num_rows, self.stored_width), DTYPES[self.dtype]
            if self._managed:
                like = torch.empty(0, dtype=dtype, device=self.device)
                self._tensor = torch.ops.fbgemm.new_unified_tensor(like, shape, False).zero_()
            else:
                self._tensor = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._tensor

    def move(self, device: torch.device) -> None:
        """Put the rows into the memory of another device; the meta device keeps none."""
        if device.type == "meta":
            self._tensor, self.filled = None, False
        elif self._tensor is not None:
            self._tensor = self._tensor.to(device)
        self.device = device

    def gather(self, rows: Tensor) -> Tensor:
        return self.tensor.index_select(0, rows)

    def vectors(self, rows: Tensor) -> Tensor:
        if self.device.type != "cpu" or not rows.numel():
            return super().vectors(rows)
        if self.dtype == "float32":  # this kernel prefetches rows
            return F.embedding_bag(rows, self.tensor, self._bags_of_one(rows.numel()), mode="sum")
        if is_quantized(self.dtype):
            ops = torch.ops.quantized
            is_int8 = self.dtype == "int8"
            kernel = (
                ops.embedding_bag_byte_rowwise_offsets if is_int8 else ops.embedding_bag_4bit_rowwise_offsets
            )
            # Arguments: no scaling by frequency, sum, not pruned.
            bags = self._bags_of_one(rows.numel())
            return kernel(self.tensor, rows, bags, False, 0, False, None, None, False)
        return self.gather(rows)

    def _bags_of_one(self, count: int) -> Tensor:
        """The numbers from 0 to ``count``, kept: making them takes a fiftieth of a lookup."""
        if self._bags.numel() < count:
            self._bags = torch.arange(count)
        return self._bags[:count]

    def write(self, rows: Tensor, stored: Tensor) -> None:
        self.tensor.index_copy_(0, rows.to(self.device), stored.to(self.device))
        self.filled = True

    def blocks(self) -> Iterator[Tensor]:
        yield from self.tensor.split(CHUNK)


class MappedRows(RowStore):
    """Rows in the files of a table: in the page cache, which all processes of a machine share.

    Rows that are written get pages of their own in this process; the files stay as they are.

    Args:
        dtype: as in ``RowStore``.
        num_rows: likewise.
        dim: likewise.
        spans: (first_row, rows) in ascending order, rows (n, stored_width); rows between them are zero.

    ``in_files`` are the rows that lie in files, in pieces (n, stored_width).
    """

    def __init__(self, dtype: str, num_rows: int, dim: int, spans: list[tuple[int, Tensor]]) -> None:
        super().__init__(dtype, num_rows, dim)
        self.in_files = [rows for _, rows in spans]
        self._spans: list[Tensor] = []
        starts, at = [], 0
        for first, rows in [*spans, (num_rows, torch.empty(0, 0))]:
            if first > at:
                starts.append(at)
                self._spans.append(torch.zeros(first - at, self.stored_width, dtype=DTYPES[dtype]))
            if rows.numel():
                starts.append(first)
                self._spans.append(rows)
            at = first + rows.shape[0]
        self._starts = torch.tensor(starts, dtype=torch.int64)
        self.filled = True

    @property
    def spans(self) -> list[Tensor]:
        """All rows in order, in the pieces that they are mapped in, each (n, stored_width)."""
        return self._spans

    def gather(self, rows: Tensor) -> Tensor:
        return gather_spans(self._spans, self._starts, rows) if self._spans else self._none()

    def write(self, rows: Tensor, stored: Tensor) -> None:
        rows, order = rows.sort()
        stored = stored[order]
        for span, first, part in self.parts(rows):
            span.index_copy_(0, rows[part] - first, stored[part])

    def blocks(self) -> Iterator[Tensor]:
        for span in self._spans:
            for block in span.split(CHUNK):
                advise(block, READ_SOON)
                yield block

    def parts(self, rows: Tensor) -> Iterator[tuple[Tensor, int, slice]]:
        """Yield the spans that ascending rows (n,) fall into: span, its first row, which of the rows."""
        yield from _parts(self._spans, self._starts, rows)

    def _none(self) -> Tensor:
        return torch.empty(0, self.stored_width, dtype=DTYPES[self.dtype])


def gather_spans(spans: list[Tensor], starts: Tensor, rows: Tensor) -> Tensor:
    """Return rows (n,) int64 of a table that lies in several tensors, as they are stored.

    Args:
        spans: all rows in order, each (n, stored_width), one or more.
        starts: the first row of each.
        rows: the rows asked for; they exist.
    """
    if len(spans) == 1:
        return spans[0].index_select(0, rows)
    if rows.numel() > 1 and not bool((rows[1:] >= rows[:-1]).all()):
        rows, order = rows.sort()
        out = spans[0].new_empty(rows.numel(), spans[0].shape[1])
        return out.index_copy_(0, order, gather_spans(spans, starts, rows))
    parts = [span.index_select(0, rows[part] - first) for span, first, part in _parts(spans, starts, rows)]
    return torch.cat(parts) if parts else spans[0].index_select(0, rows)


def _parts(spans: list[Tensor], starts: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, int, slice]]:
    """The spans that ascending rows (n,) fall into: span, its first row, which of the rows."""
    bounds = [*torch.searchsorted(rows, starts).tolist(), rows.numel()]
    for k, span in enumerate(spans):
        if bounds[k] < bounds[k + 1]:
            yield span, int(starts[k]), slice(bounds[k], bounds[k + 1])


class CachedRows(RowStore):
    """Rows in large and slow memory behind a direct-mapped cache in small and fast memory.

    A row has one slot of the cache, its number modulo the slots; a miss takes the slot.

    Args:
        backing: all rows.
        slots: rows of the cache.
        device: where the cache is.
    """

    def __init__(self, backing: DenseRows, slots: int, device: torch.device) -> None:
        super().__init__(backing.dtype, backing.num_rows, backing.dim)
        self.backing, self.filled = backing, backing.filled
        slots = max(1, min(slots, backing.num_rows))
        self._cache = torch.zeros(slots, self.stored_width, dtype=DTYPES[self.dtype], device=device)
        self._holds = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.hits = 0
        self.misses = 0

    def gather(self, rows: Tensor) -> Tensor:
        slot = rows % self._holds.numel()
        missing = (self._holds[slot] != rows).nonzero()[:, 0]
        self.misses += missing.numel()
        self.hits += rows.numel() - missing.numel()
        out = self._cache.index_select(0, slot)
        if missing.numel():
            fetched = self.backing.gather(rows[missing])
            out.index_copy_(0, missing, fetched)
            self._fill(slot[missing], rows[missing], fetched)
        return out

    def prefetch(self, rows: Tensor) -> None:
        slot = rows % self._holds.numel()
        missing = (self._holds[slot] != rows).nonzero()[:, 0]
        slot, rows = slot[missing], rows[missing]
        self._fill(slot, rows, self.backing.gather(rows))

    def write(self, rows: Tensor, stored: Tensor) -> None:
        self.backing.write(rows, stored)
        rows = rows.to(self._holds.device)
        slot = rows % self._holds.numel()
        slot = slot[self._holds[slot] == rows]
        self._holds[slot] = -1
        self.filled = True

    def blocks(self) -> Iterator[Tensor]:
        yield from self.backing.blocks()

    def _fill(self, slot: Tensor, rows: Tensor, fetched: Tensor) -> None:
        """Give each slot to one of the rows that want it: all of them say so, the slot keeps one."""
        self._holds[slot] = rows
        won = (self._holds[slot] == rows).nonzero()[:, 0]  # a repeated row wins with equal bytes
        self._cache[slot[won]] = fetched[won]


def make_rows(
    dtype: str, num_rows: int, dim: int, device: torch.device, compute_kernel: str, load_factor: float
) -> RowStore:
    """Allocate rows where a plan puts them.

    Args:
        dtype: how vectors are stored.
        num_rows: rows of this rank.
        dim: length of a vector.
        device: of the lookups.
        compute_kernel: "fused" (memory of the device), "fused_uvm" or "fused_uvm_caching" (GPU only).
        load_factor: rows of the cache per row, where there is a cache.

    Raises:
        ValueError: there is no such memory on the device.
    """
    if compute_kernel == EmbeddingComputeKernel.FUSED.value:
        return DenseRows(dtype, num_rows, dim, device)
    managed = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
    if compute_kernel not in managed or device.type != "cuda":
        raise ValueError(f"a frozen table on {device.type} has no memory kind {compute_kernel!r}")
    backing = DenseRows(dtype, num_rows, dim, device, managed=True)
    if compute_kernel == EmbeddingComputeKernel.FUSED_UVM.value:
        return backing
    return CachedRows(backing, int(load_factor * num_rows), device)
