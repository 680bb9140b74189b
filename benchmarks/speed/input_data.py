"""Random data sets in the form of request logs, of any size and with row groups of any size."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mim_torchrec.data.schema import SPLITS
from mim_torchrec.data.writing import lists
from mim_torchrec.embeddings.table.format import TableWriter

DAY = 86_400 * 1_000_000
FILE_ROWS = 250_000


@dataclass(frozen=True, kw_only=True)
class InputSizes:
    """Of the requests and their ids."""

    behaviors: int = 50
    """Behaviors of a request."""
    candidates: int = 4
    """Candidates of a request."""
    items: int = 100_000
    """Items; their ids are 63-bit hashes."""
    users: int = 200_000
    """Users."""
    categories: int = 300
    """Categories, by their names."""


def item_ids(sizes: InputSizes) -> np.ndarray:
    """(items,) int64."""
    return np.unique(np.random.default_rng(0).integers(0, 2**63 - 1, 2 * sizes.items))[: sizes.items]


def request_table(sizes: InputSizes, count: int, seed: int) -> pa.Table:
    """Requests with full histories in the order of time; popular items are drawn more often."""
    rng, ids = np.random.default_rng(seed), item_ids(sizes)
    names = pa.array([f"category {k:04d}" for k in range(sizes.categories)])
    now = 20_000 * DAY + rng.integers(0, 30 * DAY, count)

    def drawn(each: int) -> tuple[np.ndarray, pa.Array]:
        items = (rng.random(count * each) ** 2 * sizes.items).astype(np.int64)
        return ids[items], names.take(pa.array(items % sizes.categories))

    behaviors, candidates = np.full(count, sizes.behaviors), np.full(count, sizes.candidates)
    ages = np.sort(rng.integers(1, 90 * DAY, (count, sizes.behaviors)), axis=1)[:, ::-1]
    of_behaviors, of_candidates = drawn(sizes.behaviors), drawn(sizes.candidates)
    time = pa.timestamp("us")
    return pa.table({
        "request_id": np.arange(count) + seed * 10**9,
        "user_id": rng.integers(0, sizes.users, count),
        "ts": pa.array(now).cast(time),
        "behavior_item_ids": lists(of_behaviors[0], behaviors, pa.int64()),
        "behavior_categories": lists(of_behaviors[1], behaviors, pa.string()),
        "behavior_ts": lists((now[:, None] - ages).reshape(-1), behaviors, time),
        "candidate_item_ids": lists(of_candidates[0], candidates, pa.int64()),
        "candidate_categories": lists(of_candidates[1], candidates, pa.string()),
        "labels": lists(rng.integers(0, 2, count * sizes.candidates), candidates, pa.int8()),
    })  # fmt: skip


def write_requests(folder: Path, sizes: InputSizes, count: int, row_group: int, seed: int = 0) -> list[Path]:
    """Write requests into files of `FILE_ROWS`, as `mim` writes them; kept where they are there already."""
    files = []
    for part, start in enumerate(range(0, count, FILE_ROWS)):
        files.append(folder / f"part-{part:05d}.parquet")
        if not files[-1].exists():
            folder.mkdir(parents=True, exist_ok=True)
            table = request_table(sizes, min(FILE_ROWS, count - start), 1000 * seed + part)
            pq.write_table(table, files[-1], row_group_size=row_group, compression="zstd")
    return files


def write_dataset(root: Path, sizes: InputSizes, count: int, row_group: int) -> Path:
    """A data set of so many training requests, and a tenth of them to validate and to test on."""
    for seed, split in enumerate(SPLITS):
        requests = count if split == "train" else max(count // 10, 100)
        write_requests(root / "requests" / split, sizes, requests, row_group, seed)
    items = root / "items" / "part-00000.parquet"
    if not items.exists():
        items.parent.mkdir(parents=True)
        ids = item_ids(sizes)
        names = [f"category {k % sizes.categories:04d}" for k in range(len(ids))]
        listed = pa.array(19_000 * DAY + np.arange(len(ids))).cast(pa.timestamp("us"))
        pq.write_table(pa.table({"item_id": ids, "category": names, "listed_at": listed}), items)
    return root


def write_vectors(path: Path, sizes: InputSizes, dim: int) -> Path:
    """A multi-modal table of random vectors of all items, in fp16."""
    if not path.exists():
        writer = TableWriter(path, table_version="random", dim=dim, dtype="float16", encoder={})
        ids = torch.from_numpy(item_ids(sizes))
        writer.write_shard(ids, torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(0)))
        writer.finish(None)
    return path
