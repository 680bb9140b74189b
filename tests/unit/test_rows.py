"""Where rows are kept: each place gives the rows that a plain tensor would."""

import pytest
import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from mim_torchrec.embeddings.sharded.rows import CachedRows, DenseRows, MappedRows, make_rows
from mim_torchrec.embeddings.sharded.ssd import WAYS, SsdRows
from mim_torchrec.embeddings.table.quantize import DTYPES, decode, encode, row_bytes, stored_width

CPU = torch.device("cpu")
ROWS, DIM = 50, 8


def vectors(count=ROWS, seed=0):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def dense(stored, dtype):
    store = DenseRows(dtype, ROWS, DIM, CPU)
    store.write(torch.arange(ROWS), stored)
    return store


def mapped(stored, dtype):
    """Rows 0, 20 to 22 and 47 to 49 are in no span."""
    spans = [(1, stored[1:20].clone()), (23, stored[23:40].clone()), (40, stored[40:47].clone())]
    return MappedRows(dtype, ROWS, DIM, spans)


def cached(stored, dtype, slots=7):
    return CachedRows(dense(stored, dtype), slots, CPU)


def on_ssd(stored, dtype, sets=2):
    """A cache of 16 rows."""
    return SsdRows(mapped(stored, dtype), sets * WAYS * (row_bytes(dtype, DIM) + 8))


def with_gaps(stored):
    stored = stored.clone()
    for gap in (slice(0, 1), slice(20, 23), slice(47, 50)):
        stored[gap] = 0
    return stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [dense, mapped, cached, on_ssd])
@pytest.mark.parametrize("rows", [[], [3], [0, 49, 3, 3, 21, 23, 22, 40, 39, 1], list(range(50))])
def test_rows_are_found_in_any_order_and_repeated(make, dtype, rows):
    stored = with_gaps(encode(vectors(), dtype))
    rows = torch.tensor(rows, dtype=torch.int64)
    store = make(stored, dtype)
    for _ in range(2):  # the second time from a cache that is full
        assert torch.equal(store.gather(rows), stored[rows])
        expected = decode(stored[rows], dtype)
        assert torch.equal(store.vectors(rows).float(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [dense, mapped, cached, on_ssd])
def test_rows_that_are_written_are_found_and_no_others_change(make, dtype):
    stored = with_gaps(encode(vectors(), dtype))
    store = make(stored, dtype)
    store.gather(torch.arange(ROWS))
    rows = torch.tensor([48, 0, 21, 30, 45])
    stored[rows] = encode(vectors(5, seed=1), dtype)
    store.write(rows, stored[rows])
    assert torch.equal(store.gather(torch.arange(ROWS)), stored)
    assert torch.equal(torch.cat(list(store.blocks())), stored)


def test_writing_mapped_rows_leaves_those_that_were_not_asked_for_where_they_are():
    stored = encode(vectors(), "float16")
    store = mapped(stored, "float16")
    where = [span.data_ptr() for span in store._spans]
    store.write(torch.tensor([5, 49]), stored[:2])
    assert [span.data_ptr() for span in store._spans] == where


def test_the_bytes_of_a_store_are_those_of_its_rows():
    assert DenseRows("int8", 10, 128, CPU).nbytes == 10 * stored_width("int8", 128) == 1360


def test_a_cache_counts_hits_and_misses_and_keeps_no_more_rows_than_it_has_slots():
    store = cached(encode(vectors(), "float32"), "float32", slots=4)
    store.gather(torch.tensor([0, 1, 2, 3]))
    store.gather(torch.tensor([3, 2, 1, 0]))
    assert (store.hits, store.misses) == (4, 4)
    store.gather(torch.tensor([4, 8]))  # take the slot of 0, one after the other
    store.gather(torch.tensor([0]))
    assert (store.hits, store.misses) == (4, 7)


@pytest.mark.parametrize("kernel", [EmbeddingComputeKernel.FUSED_UVM, EmbeddingComputeKernel.DENSE])
def test_memory_that_a_cpu_does_not_have_is_refused(kernel):
    with pytest.raises(ValueError, match=f"on cpu has no memory kind '{kernel.value}'"):
        make_rows("float16", 4, 4, CPU, kernel.value, 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching"])
def test_every_memory_of_a_gpu_gives_the_rows(kernel, dtype):
    device = torch.device("cuda", 0)
    store = make_rows(dtype, ROWS, DIM, device, kernel, 0.2)
    stored = encode(vectors(), dtype)
    store.write(torch.arange(ROWS, device=device), stored.to(device))
    rows = torch.tensor([3, 49, 3, 0, 20])
    for _ in range(2):
        assert torch.equal(store.gather(rows.to(device)).cpu(), stored[rows])
