"""What a window costs at the age of production: `make bench-windows`.

A log at ten, ten thousand and a million windows, all but the last few of them forgotten, as compaction leaves
it; a store and an index with the new items of as many windows. Appending to the log, asking for its head,
applying to the store and adding to the index take turns over the ages.
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.turns import in_turns
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.embeddings.windows.forgotten import ForgottenNames
from mim_torchrec.embeddings.windows.log import FORGOTTEN, WindowLog
from mim_torchrec.embeddings.windows.progress import name_of
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import check_sizes

VERSION, DIM = "v1", 16
MOST = 2.0
FORGOTTEN_AT_ONCE = 1000  # windows between two compactions
KEPT = 8  # windows that a log has at the beginning
CLAIMS = {"append": "appending a window", "head": "the number of the newest window",
          "apply": "applying a window to the embedded store", "index_add": "adding its items to an index",
          "open": "opening a log and asking for its head"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WindowsConfig:
    """Time windows at several ages of a log; write a report."""

    out: Path = Path("runs/windows")
    """Directory of the report."""
    ages: tuple[int, ...] = (10, 10_000, 1_000_000)
    """Windows that there were before; the last is compared with the first."""
    items: int = 100
    """Items of a window."""
    most_items: int = 600_000
    """New items that the windows of an age have together, at most."""
    rounds: int = 1000
    """Windows that are timed at each age."""


def make_log(folder: Path, age: int, config: WindowsConfig) -> WindowLog:
    """A log with so many windows, of which it has forgotten all but the last few."""
    log = WindowLog(folder, VERSION, start=0)
    names = ForgottenNames(folder / FORGOTTEN, 0)
    last = max(age - KEPT, 0)
    for start in range(1, last + 1, FORGOTTEN_AT_ONCE):
        stop = min(start + FORGOTTEN_AT_ONCE, last + 1)
        names.add({seq: window_name(seq) for seq in range(start, stop)})
    for seq in range(last + 1, age + 1):
        log.append(window_name(seq), torch.arange(config.items), torch.ones(config.items, DIM))
    assert log.last_seq() == age
    return log


def window_name(seq: int) -> str:
    """The name of a window of a topic of two partitions."""
    return name_of({"items/0": str(50 * seq), "items/1": str(49 * seq)})


def make_window(seq: int, ids: torch.Tensor) -> Window:
    """A window of vectors that need not be told apart."""
    return Window.of(ids, torch.ones(ids.numel(), DIM), table_version=VERSION, seq=seq, window_id=f"w{seq}")


def measure(config: WindowsConfig) -> dict[str, Any]:
    """All figures of the report."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randperm(config.most_items + config.items * (config.rounds + 1), generator=generator) + 1

    with TemporaryDirectory() as name:
        folder = Path(name)
        writer = TableWriter(folder / "table", table_version=VERSION, dim=DIM, dtype="float16", encoder={},
                             spare_rows=len(pool))  # fmt: skip
        writer.write_shard(torch.zeros(1, dtype=torch.int64), torch.ones(1, DIM))
        writer.finish()
        table = Table.open(folder / "table")
        logs = [make_log(folder / f"log{age}", age, config) for age in config.ages]
        sizes = [min(age * config.items, config.most_items) for age in config.ages]
        stores, indices = [EmbeddedStore(table) for _ in sizes], [ItemIndex.of(table) for _ in sizes]
        for size, store, index in zip(sizes, stores, indices, strict=True):
            store.apply(make_window(1, pool[:size].sort().values))
            index.add(pool[:size])

        def fresh(size: int, turn: int) -> torch.Tensor:
            """Items of a window: half are new, half were there."""
            half = config.items // 2
            start = size + turn * half
            old = pool[
                torch.randint(size, (config.items,), generator=generator).unique()[: config.items - half]
            ]
            return torch.cat([pool[start : start + half], old])

        turns = range(config.rounds + 1)
        items = [[fresh(size, turn) for turn in turns] for size in sizes]
        windows = [[make_window(turn + 2, ids) for turn, ids in enumerate(own)] for own in items]
        vectors = torch.ones(config.items, DIM)

        ids = torch.arange(config.items)

        def append(log: WindowLog, age: int, turn: int) -> None:
            log.append(window_name(age + 1 + turn), ids, vectors)

        def head(log: WindowLog, _: int) -> None:
            log.last_seq()

        def reopen(log: WindowLog, _: int) -> None:
            WindowLog(log.root, VERSION).last_seq()

        def apply(store: EmbeddedStore, own: list[Window], turn: int) -> None:
            store.apply(own[turn])

        def add(index: ItemIndex, own: list[torch.Tensor], turn: int) -> None:
            index.add(own[turn])

        steps: dict[str, list[Callable[[int], object]]] = {
            "head": [partial(head, log) for log in logs],
            "open": [partial(reopen, log) for log in logs],
            "append": [partial(append, *both) for both in zip(logs, config.ages, strict=True)],
            "apply": [partial(apply, *both) for both in zip(stores, windows, strict=True)],
            "index_add": [partial(add, *both) for both in zip(indices, items, strict=True)],
        }
        found: dict[str, dict[str, float]] = {}
        for step, of_ages in steps.items():
            rounds = config.rounds if step in ("apply", "index_add") else min(config.rounds, 100)
            seconds = in_turns(of_ages, rounds, warmup=1)
            found[step] = {
                str(age): 1e6 * (statistics.fmean(own) if step == "apply" else statistics.median(own))
                for age, own in zip(config.ages, seconds, strict=True)
            }
        names = {str(age): (log.root / FORGOTTEN).stat().st_size for age, log in
                 zip(config.ages, logs, strict=True) if (log.root / FORGOTTEN).exists()}  # fmt: skip
    first, last = str(config.ages[0]), str(config.ages[-1])
    ratios = {f"{step}_ratio": by_age[last] / by_age[first] for step, by_age in found.items()}
    report = {"microseconds": found, "bytes_of_names": names, **ratios}
    claims = [(f"{CLAIMS[step]} takes at most {MOST:.0f} times at {last} windows what it takes at {first}",
               ratios[f"{step}_ratio"]) for step in CLAIMS if step != "open"]  # fmt: skip
    report["targets"] = [target(claim, ratio, ratio <= MOST) for claim, ratio in claims]
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.windows`."""
    config = tyro.cli(WindowsConfig, args=argv, description=__doc__)
    check_sizes(config, 1, "items", "most_items", "rounds")
    config.out.mkdir(parents=True, exist_ok=True)
    report = measure(config)
    report["config"] = dataclasses.asdict(config)
    rows = [[CLAIMS[step], *(f"{value:.0f}" for value in by_age.values()), f"{report[f'{step}_ratio']:.2f}"]
            for step, by_age in report["microseconds"].items()]  # fmt: skip
    for row in rows:
        print("  ".join(row), flush=True)
    text = [
        "CPU time of one window, microseconds: the median, and the mean where some windows merge what others "
        "left. Half of a window's items are new. A log has forgotten all but its last windows. Opening a log "
        "reads the names that it keeps, at most a thousand and those of its windows."
    ]
    table = Section("A window at several ages", text=text, rows=rows,
                    columns=["", *(f"{age} windows" for age in config.ages), "last / first"])  # fmt: skip
    pages = [table, targets_section(report["targets"])]
    write_pages(report, "Windows at the age of production", "CPU time by the number of windows before.",
                pages, {}, config.out)  # fmt: skip


if __name__ == "__main__":
    program.run(main)
