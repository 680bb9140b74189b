"""The benchmark of a table on an SSD: what it reports, and that it refuses a run with too much memory."""

import mmap
from dataclasses import replace

import pytest
import torch

from mim_torchrec.benchmarks.measures.page_cache import drop_pages, resident_bytes
from mim_torchrec.benchmarks.speed.table_tiers import (
    TierSizes,
    measure_tiers,
    tiers_section,
    write_table,
)
from mim_torchrec.embeddings.table.format import Table

pytestmark = pytest.mark.slow

SIZES = TierSizes(rows=200_000, dim=64, requests=64, behaviors=5, steps=3, turns=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiers") / "table"
    write_table(path, SIZES.rows, SIZES.dim)
    return path


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_each_variant_keeps_to_the_memory_it_has(path, one_thread):
    report = measure_tiers(path, SIZES)
    assert report["limit_bytes"] * 5 == report["table_bytes"] == 200_000 * 128
    variants = report["variants"]
    assert list(variants) == ["memory", "ssd", "ssd_without_prefetch", "mapped"]
    for name in ("ssd", "ssd_without_prefetch", "mapped"):
        assert 0 < variants[name]["bytes_in_memory"] <= report["limit_bytes"]
        assert report[f"{name}_vs_memory"] > 0
    assert variants["ssd"]["hit_rate"] == 1  # all were prefetched
    assert 0 < variants["ssd_without_prefetch"]["hit_rate"] < 1
    rows_read = [variants[name]["rows_read_per_step"] for name in ("ssd", "ssd_without_prefetch")]
    assert rows_read[0] == pytest.approx(rows_read[1], rel=0.2)
    assert len(tiers_section(report).rows) == 4


def test_a_run_with_more_of_the_table_in_memory_than_its_limit_is_refused(path, one_thread):
    with pytest.raises(RuntimeError, match="MB of the table are in memory, the limit is 5 MB"):
        measure_tiers(path, replace(SIZES, requests=2000, behaviors=20))


def test_dropped_pages_are_counted_as_absent_and_read_again(path):
    table = Table.open(path, verify=False)
    files = [path / shard.file for shard in table.manifest.shards]
    mapped = [rows for _, rows in table.spans(1, 1 + SIZES.rows)]
    before = [rows.clone() for rows in mapped]
    assert resident_bytes(mapped) == sum(
        -(-(rows.data_ptr() % mmap.PAGESIZE + rows.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        for rows in mapped
    )
    drop_pages(files, mapped)
    assert resident_bytes(mapped) == 0
    assert all(map(torch.equal, mapped, before))
