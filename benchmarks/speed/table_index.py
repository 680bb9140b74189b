"""What an item index costs: lookups beside `np.searchsorted`, windows of new items at any age, memory.

Part of `make bench-frozen-table`. The ids of the table are spread over 63 bits. A batch asks for a million of
them: by Zipf's law (exponent 1, items in random order), so that they repeat as they do in requests, and
uniformly, where almost none repeats. Seconds are those of the process's clock.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section
from mim_torchrec.benchmarks.speed.frozen_model import take_turns
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.training.distributed import distributed

WINDOW = 10_000  # items
GROUP = 10  # windows whose median is taken
SHARD = 1 << 22  # rows


@dataclass(frozen=True, kw_only=True)
class IndexSizes:
    """How large the index is.

    Args:
        items: of the table on the disk.
        batch: ids that are looked up at once.
        rounds: turns of which the median is taken.
    """

    items: int
    batch: int = 1_000_000
    rounds: int = 3

    @property
    def windows(self) -> int:
        """Windows of 10,000 new items each: 1.1 million items, fewer where the table is small."""
        return max(2 * GROUP, min(110, self.items // 500_000))


def write_ids(path: Path, sizes: IndexSizes) -> None:
    """Write a table of random ids, ascending, with one number each and spare rows for the windows."""
    writer = TableWriter(path, table_version="random", dim=1, encoder={}, spare_rows=sizes.windows * WINDOW)
    rng, gap, last = np.random.default_rng(0), 2**63 // sizes.items, -(2**62)
    for start in tqdm(range(0, sizes.items, SHARD), desc="write ids", unit="shard", disable=None):
        count = min(SHARD, sizes.items - start)
        ids = last + np.cumsum(rng.integers(1, gap, count))
        writer.write_shard(torch.from_numpy(ids), torch.ones(count, 1))
        last = int(ids[-1])
    writer.finish()


def asked(ids: Tensor, sizes: IndexSizes, kind: str, rng: np.random.Generator) -> Tensor:
    """A batch of ids (batch,), "zipf" or "uniform"."""
    if kind == "zipf":
        rank = np.exp(rng.random(sizes.batch) * np.log(len(ids))).astype(np.uint64)  # density 1 / rank
        place = (rank * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(16)) % np.uint64(len(ids))
    else:
        place = rng.integers(0, len(ids), sizes.batch)
    return ids[torch.from_numpy(place.astype(np.int64))]


def measure_rows(path: Path, sizes: IndexSizes) -> dict[str, dict[str, float]]:
    """Seconds of a lookup of a batch, and of `np.searchsorted` of the same ids in one array, by kind."""
    torch.set_num_threads(1)
    with distributed(0):
        table, rng = Table.open(path, verify=False), np.random.default_rng(1)
        ids, found = table.row_index().ids, {}
        index = ItemIndex.of(Table.open(path, verify=False))
        everything = ids.numpy()
        for kind in ("zipf", "uniform"):
            batch = asked(ids, sizes, kind, rng)
            wanted = batch.numpy()
            assert torch.equal(index.rows(batch), 1 + torch.from_numpy(np.searchsorted(everything, wanted)))
            runs: dict[str, Callable[[], Any]] = {
                "rows": partial(index.rows, batch),
                "searchsorted": partial(np.searchsorted, everything, wanted),
            }
            seconds = take_turns(runs, sizes.rounds, clock=time.process_time)
            found[kind] = seconds | {"distinct": len(batch.unique()) / len(batch)}
        return found


def measure_windows(path: Path, sizes: IndexSizes) -> dict[str, Any]:
    """Seconds of each window of new items, and the memory that the index has added to this rank's share."""
    torch.set_num_threads(1)
    with distributed(0):
        rng = np.random.default_rng(2)
        new = np.unique(rng.integers(-(2**63), -(2**62), 2 * sizes.windows * WINDOW))
        new = torch.from_numpy(rng.permutation(new)[: sizes.windows * WINDOW]).split(WINDOW)
        dist.barrier()
        before = proportional_bytes()
        index = ItemIndex.of(Table.open(path, verify=False))
        seconds = []
        for seq, window in enumerate(new, 1):
            dist.barrier()
            started = time.process_time()
            index.add(window, seq)
            seconds.append(time.process_time() - started)
        started = time.process_time()
        index.add(new[0][:1000])
        known = time.process_time() - started
        dist.barrier()
        used = proportional_bytes() - before
        dist.barrier()  # until all have counted what they share
        return {"seconds": seconds, "known_seconds": known, "bytes": used, "items": len(index)}


def proportional_bytes() -> int:
    """Resident memory of this process, what it shares with others divided among them (Linux's Pss)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Pss")


def measure_index(launch: Callable[..., list[Any]], folder: Path, sizes: IndexSizes) -> dict[str, Any]:
    """Measure an index on one and on two ranks.

    Args:
        launch: runs a function on ranks, see `frozen_table.launch`.
        folder: for the table, which is removed afterwards.
        sizes: how large.

    Returns:
        `add_ratio`: the slowest ten windows in a row over the first ten, medians;
        `rows_vs_searchsorted`: of Zipf-distributed ids; `bytes_per_id`: of both ranks together, and the
        figures behind them.
    """
    path = folder / "index_table"
    if path.exists():
        shutil.rmtree(path)
    write_ids(path, sizes)
    rows = launch(1, measure_rows, path, sizes, keep=True)[0]
    ranks = launch(2, measure_windows, path, sizes)
    shutil.rmtree(path)
    slowest = [max(each) for each in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    groups = [statistics.median(slowest[at : at + GROUP]) for at in range(0, len(slowest), GROUP)]
    ratio = {kind: each["rows"] / each["searchsorted"] for kind, each in rows.items()}
    return {
        "items": sizes.items,
        "add_ratio": max(groups) / groups[0],
        "first_window_seconds": groups[0],
        "last_window_seconds": groups[-1],
        "known_1000_seconds": max(rank["known_seconds"] for rank in ranks),
        "rows_vs_searchsorted": ratio["zipf"],
        "rows_vs_searchsorted_uniform": ratio["uniform"],
        "rows": rows,
        "bytes_per_id": sum(rank["bytes"] for rank in ranks) / ranks[0]["items"],
    }


def index_targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of the index at full size, and what was found."""
    limits = {
        "add_ratio": ("10,000 new items at any age take 2 times as long as at first, or less", 2.0),
        "rows_vs_searchsorted": ("a lookup takes 0.4 of the time of np.searchsorted or less, Zipf", 0.4),
        "rows_vs_searchsorted_uniform": ("the same, distinct ids", 0.4),
        "bytes_per_id": ("an index takes less than 9 bytes an id, two ranks together", 9.0),
    }
    return [target(claim, report[name], report[name] <= limit) for name, (claim, limit) in limits.items()]


def index_section(report: dict[str, Any]) -> Section:
    """The table of the report."""
    return Section(
        f"Item index of {report['items']:,} ids",
        text=[
            f"{report['bytes_per_id']:.2f} bytes an id on two ranks together. Windows of 10,000 new items: "
            f"{1000 * report['first_window_seconds']:.1f} ms at first, "
            f"{1000 * report['last_window_seconds']:.1f} ms at the end, at most {report['add_ratio']:.2f} "
            f"times the first; 1,000 known items {1000 * report['known_1000_seconds']:.1f} ms."
        ],
        columns=["a million ids", "distinct", "lookup (ms)", "np.searchsorted (ms)", "of np.searchsorted"],
        rows=[
            [kind, f"{each['distinct']:.2f}", f"{1000 * each['rows']:.0f}",
             f"{1000 * each['searchsorted']:.0f}", f"{each['rows'] / each['searchsorted']:.2f}"]
            for kind, each in report["rows"].items()
        ],
    )  # fmt: skip
