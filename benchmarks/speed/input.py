"""What the input of a CTR model costs: reading, waiting for it, and starting up. `make bench-input`.

Requests with full histories are written with row groups of several sizes. The reader, with the mapping of
ids to embedding rows, takes turns with a scan by PyArrow that reads the same columns and does nothing with
them; both are counted in seconds of the CPU. The scan is what a file opened with the defaults of PyArrow
does: text comes as text, where the reader has the dictionaries of the file, and both decompress. Neither
verifies checksums here, because the files have none. Memory is measured in processes of their own, which
have read nothing before, as what is private to them beyond what they had. Two readers are those of two
ranks, in two processes; two raw scans in two processes, each of every other row group, say what the machine
gives to two of anything.

`data_wait` is the fraction of the time of training steps that the loop waits for a batch, of the demo's
model with one thread that reads ahead. `startup` is what `mim ctr` does until it has its first batch, for
training parts of growing size in turns, each of which fills two buffers of one size; the scan of ids, which
reads all of them, is measured beside it, and so is a start that finds the ids of an earlier one
(`--id-cache`).
"""

import dataclasses
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.memory import peak_private_bytes, private_bytes
from mim_torchrec.benchmarks.measures.turns import in_turns, seconds_by_name, threads_of_torch
from mim_torchrec.benchmarks.speed.input_data import (
    InputSizes,
    write_dataset,
    write_requests,
    write_vectors,
)
from mim_torchrec.ctr.config import parse
from mim_torchrec.ctr.main import main as train
from mim_torchrec.ctr.main import prepare
from mim_torchrec.data.id_scan import count_ids, scan_ids
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.errors import OptionError, check_sizes
from mim_torchrec.training.distributed import distributed
from mim_torchrec.training.history import read_history
from mim_torchrec.training.run_directory import RunDirectory

CPU_TARGET, WAIT_TARGET, READERS_TARGET, STARTUP_TARGET, MEMORY_TARGET = 1.5, 0.02, 1.8, 0.10, 1.25
STARTS = 5
LIKE_FOR_LIKE = 20_000
"""Row group that the target of the CPU is of."""


@dataclass(frozen=True, kw_only=True)
class InputConfig(InputSizes):
    """Measure what the input of a CTR model costs, and write a report."""

    out: Path = Path("runs/input")
    """Directory of the data and the report."""
    requests: int = 250_000
    """Requests that are read."""
    row_groups: tuple[int, ...] = (1000, LIKE_FOR_LIKE, 122_880)
    """Rows of the row groups."""
    batch_size: int = 1024
    """Candidates in a batch."""
    buffer_rows: int = 65_536
    """Requests in the buffer where memory is measured."""
    rounds: int = 5
    """Timed rounds; in each, the reader and the scan read all requests once."""
    startup_requests: int = 100_000
    """Training requests of the smallest start."""
    startup_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Multiples of these."""
    train_requests: int = 20_000
    """Training requests of the run whose waiting is measured; as many as the demo has."""
    epochs: int = 2
    """Epochs of that run."""
    dim: int = 128
    """Size of its multi-modal vectors."""


def make_reader(config: InputConfig, files: Sequence[Path], **options: Any) -> RequestReader:
    """The reader that `mim ctr` trains with."""
    batch_size = config.batch_size // options.get("world_size", 1)
    return RequestReader(files, batch_size=batch_size, shuffle=True, drop_remainder=True, **options)


def make_mapper(ids: dict[str, np.ndarray]) -> IdMapper:
    """Of ids by the name of their vocabulary."""
    return IdMapper({name: Vocabulary.build(own) for name, own in ids.items()}, None, 1.0)


def consume(reader: RequestReader, mapper: IdMapper) -> int:
    """Read and map an epoch; returns its requests."""
    return sum(batch.num_requests for batch in reader.batches(mapper=mapper))


def raw_scan(files: Sequence[Path], columns: Sequence[str], rank: int = 0, world_size: int = 1) -> None:
    """Let PyArrow read columns of a rank's row groups, one after another, on this thread."""
    for file in files:
        parquet = pq.ParquetFile(file)
        for group in range(rank, parquet.num_row_groups, world_size):
            parquet.read_row_group(group, columns=list(columns), use_threads=False)


def cpu_over_raw(config: InputConfig, files: Sequence[Path]) -> dict[str, float]:
    """CPU seconds of the reader and of the scan, and the median over the rounds of their ratio."""
    reader, mapper = make_reader(config, files), make_mapper(scan_ids(files))

    def read(turn: int) -> None:
        reader.set_epoch(turn)
        consume(reader, mapper)

    ours, raw = in_turns([read, lambda _: raw_scan(files, reader.columns)], config.rounds, 1)
    return {
        "reader_s": statistics.median(ours), "raw_s": statistics.median(raw),
        "ratio": statistics.median(a / b for a, b in zip(ours, raw, strict=True)),
    }  # fmt: skip


def peak_mib(config: InputConfig, files: Sequence[Path], ids: dict[str, np.ndarray]) -> float:
    """Private memory that an epoch takes beyond what there was before it, in MiB.

    The ids of the files are given, because a scan leaves memory behind that the reader would then take.
    """
    reader, mapper = make_reader(config, files, buffer_rows=config.buffer_rows), make_mapper(ids)
    before = private_bytes()
    with peak_private_bytes() as peak:
        consume(reader, mapper)
        return (peak() - before) / 2**20


def seconds_of_turns(ready: list[Barrier], work: Callable[[int], Any]) -> list[float]:
    """Seconds of turns that all ranks begin together, without the first."""
    seconds = []
    for turn, barrier in enumerate(ready):
        barrier.wait()
        started = time.perf_counter()
        work(turn)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def read_as_rank(config: InputConfig, files: Sequence[Path], rank: int, ready: list[Barrier]) -> list[float]:
    """Seconds of epochs of one of several ranks."""
    reader = make_reader(config, files, rank=rank, world_size=ready[0].parties)
    mapper = make_mapper(scan_ids(files))

    def read(turn: int) -> None:
        reader.set_epoch(turn)
        consume(reader, mapper)

    return seconds_of_turns(ready, read)


def scan_as_rank(config: InputConfig, files: Sequence[Path], rank: int, ready: list[Barrier]) -> list[float]:
    """Seconds of raw scans of the row groups of one of several ranks."""
    columns = make_reader(config, files).columns
    return seconds_of_turns(ready, lambda _: raw_scan(files, columns, rank, ready[0].parties))


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), program.log_to_stderr) as pool:
        return pool.submit(work, *arguments).result()


def side_by_side(
    config: InputConfig, files: Sequence[Path], work: Callable[..., list[float]]
) -> dict[str, float]:
    """Seconds in which one rank, and two ranks side by side, do work, such as `read_as_rank`."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    with spawn.Manager() as manager:
        for ranks in (1, 2):
            ready = [manager.Barrier(ranks) for _ in range(1 + config.rounds)]
            with ProcessPoolExecutor(ranks, spawn, program.log_to_stderr) as pool:
                running = [pool.submit(work, config, files, rank, ready) for rank in range(ranks)]
                slowest = map(max, zip(*(one.result() for one in running), strict=True))
                found[ranks] = statistics.median(slowest)
    return {"one_s": found[1], "two_s": found[2], "ratio": found[1] / found[2]}


def run_stage(config: InputConfig, data: Path, out: Path, *flags: str) -> Path:
    """Train the demo's model from scratch."""
    if out.exists():
        shutil.rmtree(out)
    train(["--data", str(data), "--out", str(out), "--dot-product-features", "True",
           "--content-pooling", "mean", "--lr", "1e-3", "--batch-size", str(config.batch_size),
           "--log-every", "5", *flags])  # fmt: skip
    return out


def waiting(config: InputConfig) -> dict[str, float]:
    """Mean `data_wait` of the log of training, with a thread that reads ahead and without."""
    root = config.out / "waiting"
    data = write_dataset(root / "data", config, config.train_requests, 1000)
    table = write_vectors(root / "table", config, config.dim)
    found = {}
    for name, depth in (("data_wait", "4"), ("data_wait_without_prefetch", "0")):
        out = run_stage(config, data, root / "run", "--table", str(table), "--epochs", str(config.epochs),
                        "--prefetch", depth)  # fmt: skip
        steps = read_history(out / "history.jsonl").steps
        waits = [step["data_wait"] for step in steps if "data_wait" in step and step["step"] > 1]
        found[name] = statistics.mean(waits)
    return found


def start(config: InputConfig, data: Path, out: Path, *flags: str) -> None:
    """What `mim ctr` does until it has its first batch."""
    if out.exists():
        shutil.rmtree(out)
    # of all sizes two buffers are full: the second is filled when the first batch is there, and waited for
    rows = max(min(config.buffer_rows, config.startup_requests // 2), 1)
    settings = parse(
        ["--data", str(data), "--out", str(out), "--mim", "off", "--buffer-rows", str(rows), *flags]
    )
    run = RunDirectory(settings.out)
    with distributed(0) as context, run.writing(context):
        batches = iter(prepare(settings, run, context).task.batches(0))
        next(batches)
        del batches


def start_up(config: InputConfig) -> dict[str, dict[str, float]]:
    """By the size of the training part: seconds of a start, of the scan of ids, and of a start without it."""
    runs: dict[str, Callable[[], Any]] = {}
    for size in config.startup_sizes:
        root = config.out / f"startup-{size}"
        data = write_dataset(root / "data", config, size * config.startup_requests, LIKE_FOR_LIKE)
        files = sorted((data / "requests" / "train").iterdir())
        again = partial(start, config, data, root / "run", "--id-cache", str(root / "ids"))
        runs |= {f"{size} seconds": partial(start, config, data, root / "run"),
                 f"{size} scan": partial(count_ids, files), f"{size} beyond_scan": again}  # fmt: skip
    found: dict[str, dict[str, float]] = {str(size): {} for size in config.startup_sizes}
    for key, seconds in seconds_by_name(runs, STARTS).items():
        of_size, name = key.split()
        found[of_size][name] = statistics.median(seconds)
    return found


def measure(config: InputConfig) -> dict[str, Any]:
    """All figures of the report."""
    cpu, memory = {}, {}
    for rows in config.row_groups:
        files = write_requests(config.out / f"requests-{rows}", config, config.requests, rows)
        cpu[str(rows)] = cpu_over_raw(config, files)
        memory[str(rows)] = apart(peak_mib, config, files, scan_ids(files))
        print(f"row groups of {rows:7,}: {cpu[str(rows)]['ratio']:.2f} times the CPU of a raw scan, "
              f"{memory[str(rows)]:.0f} MiB", flush=True)  # fmt: skip
    like = config.row_groups[min(1, len(config.row_groups) - 1)]
    files = write_requests(config.out / f"requests-{like}", config, config.requests, like)
    together, scans = (side_by_side(config, files, work) for work in (read_as_rank, scan_as_rank))
    waits, startup = waiting(config), start_up(config)
    report: dict[str, Any] = {
        "reader": {
            "cpu_over_raw": {rows: figures["ratio"] for rows, figures in cpu.items()},
            "cpu_seconds": cpu,
            "peak_mib": max(memory.values()),
            "peak_mib_by_row_group": memory,
            "two_over_one": together["ratio"],
            "two": together,
            "two_raw_over_one": scans["ratio"],
            "two_raw": scans,
        },
        **waits,
        "startup": {size: figures["seconds"] for size, figures in startup.items()},
        "startup_parts": startup,
        "startup_growth": growth(startup),
    }
    report["targets"] = targets(config, report)
    return report


def growth(startup: dict[str, dict[str, float]]) -> float:
    """The largest growth of a start, beyond its scan, from one size to the next."""
    beyond = [figures["beyond_scan"] for figures in startup.values()]
    return max((after / before - 1 for before, after in zip(beyond, beyond[1:], strict=False)), default=0.0)


def targets(config: InputConfig, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the figures are to show."""
    reader = report["reader"]
    memory = list(reader["peak_mib_by_row_group"].values())
    spread = max(memory) / max(memory[min(1, len(memory) - 1)], 1.0)
    found = []
    if str(LIKE_FOR_LIKE) in reader["cpu_over_raw"]:
        ratio = reader["cpu_over_raw"][str(LIKE_FOR_LIKE)]
        found.append(
            target(f"reader and mapping, shuffled, row groups of {LIKE_FOR_LIKE:,}: at most {CPU_TARGET} "
                   "times the CPU of a raw scan", ratio, ratio <= CPU_TARGET)
        )  # fmt: skip
    return [
        *found,
        target(f"the loop waits for data at most {WAIT_TARGET:.0%} of the time, one thread reading ahead",
               report["data_wait"], report["data_wait"] <= WAIT_TARGET),
        target(f"two readers deliver at least {READERS_TARGET} times what one does", reader["two_over_one"],
               reader["two_over_one"] >= READERS_TARGET),
        target(f"with a buffer of {config.buffer_rows:,} requests, no row groups need more than "
               f"{MEMORY_TARGET} times the memory of those of {config.row_groups[min(1, len(memory) - 1)]:,}",
               spread, spread <= MEMORY_TARGET),
        target(f"a start on twice the data takes at most {STARTUP_TARGET:.0%} longer, beyond the scan of ids",
               report["startup_growth"], report["startup_growth"] <= STARTUP_TARGET),
    ]  # fmt: skip


def sections(config: InputConfig, report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    reader = report["reader"]
    rows = [
        [f"{int(size):,}", f"{cpu['reader_s']:.2f}", f"{cpu['raw_s']:.2f}", f"{cpu['ratio']:.2f}",
         f"{reader['peak_mib_by_row_group'][size]:.0f}"]
        for size, cpu in reader["cpu_seconds"].items()
    ]  # fmt: skip
    starts = [
        [f"{int(size) * config.startup_requests:,}", *(f"{figures[name]:.2f}" for name in figures)]
        for size, figures in report["startup_parts"].items()
    ]
    return [
        Section(
            "The reader beside a raw scan",
            text=[f"{config.requests:,} requests of {config.behaviors} behaviors and {config.candidates} "
                  f"candidates. Memory is with a buffer of {config.buffer_rows:,} requests. Two readers "
                  f"together deliver {reader['two_over_one']:.2f} times what one does; two raw scans, which "
                  f"share nothing but the machine, {reader['two_raw_over_one']:.2f} times."],
            columns=["rows of a row group", "reader and mapping, CPU s", "raw scan, CPU s", "ratio", "MiB"],
            rows=rows,
        ),
        Section(
            "Waiting for data",
            text=[f"{report['data_wait']:.2%} of the time of training steps with one thread reading ahead, "
                  f"{report['data_wait_without_prefetch']:.2%} without."],
        ),
        Section(
            "Starting up",
            columns=["training requests", "until the first batch, s", "scan of ids, s", "without it, s"],
            rows=starts,
        ),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.input`."""
    config = tyro.cli(InputConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(config, 1, "rounds", "requests", "buffer_rows", "epochs")
    if not config.row_groups or not config.startup_sizes:
        raise OptionError("--row-groups and --startup-sizes need at least one size")
    with threads_of_torch(1):
        report = measure(config)
    report["config"] = dataclasses.asdict(config)
    summary = (
        f"CPU seconds of reading {config.requests:,} requests over those of a raw scan; memory, waiting and "
        "start-up beside it."
    )
    write_pages(report, "The input of a CTR model", summary, sections(config, report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
