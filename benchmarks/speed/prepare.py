"""What `mim prepare` costs beside a bare query that reads and sorts the same columns: `make bench-prepare`.

Both run in processes of their own, in turns, with the same threads and the same limit of memory. The bare
query reads the columns that the mapping names, sorts the events by user and time, and writes them as Parquet,
which is the least that a preparation can do. Smaller logs of the same kind show whether rate and memory
depend on the size. On a small log DuckDB and Spark prepare the same data set, and every row is compared.

    python -m mim_torchrec.benchmarks.speed.prepare --impressions 100000000 --users 5000000 --items 1000000 \\
        --memory 4GB --rounds 1

prepares a hundred million impressions. The log is written day by day, so that it needs no memory.
"""

import dataclasses
import importlib
import multiprocessing
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.speed.raw_log import write_large_log
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.embeddings.listing import data_files
from mim_torchrec.errors import OptionError, check_sizes
from mim_torchrec.extras import needs
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.run import prepare

with needs("prepare"):
    import duckdb

TARGET = 3.0
SLOWER = 0.9
"""Of the rate of the smallest log, at least, at any other size."""


@dataclass(frozen=True, kw_only=True)
class PrepareBenchConfig:
    """Prepare a raw log and time it beside a bare query."""

    out: Path = Path("runs/prepare")
    """Directory of the report and of the logs, which are removed."""
    impressions: int = 4_000_000
    """Impressions of the log, ten a request; clicks and purchases come on top."""
    days: int = 30
    """Length of the log."""
    users: int = 200_000
    """Users."""
    items: int = 100_000
    """Items."""
    spark_impressions: int = 100_000
    """Impressions of the log that Spark prepares too; 0 leaves Spark out."""
    fractions: tuple[float, ...] = (0.25, 0.5)
    """Logs of these fractions of --impressions are prepared too, to see how rate and memory grow."""
    memory: str = "1GB"
    """Limit of the engines."""
    threads: int = 2
    """Threads of the engines."""
    rounds: int = 3
    """Turns of each, of which the median is taken."""


def in_a_process(work: Callable[..., Any], *words: Any) -> dict[str, float]:
    """What a call needs in a new process, without its start.

    Returns:
        `seconds`, `cpu` (seconds of all threads), `peak_mib` (resident memory at most), `start_mib` (before).

    Raises:
        RuntimeError: the process failed.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (work, words))


def _timed(work: Callable[..., Any], words: tuple[Any, ...]) -> dict[str, float]:
    for name in ("ibis.backends.duckdb", "pandas"):  # which Ibis and PyArrow import when they are first used
        importlib.import_module(name)
    before = _peak_mib()
    started, cpu = time.perf_counter(), time.process_time()
    work(*words)
    return {
        "seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu,
        "peak_mib": _peak_mib(), "start_mib": before,
    }  # fmt: skip


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_prepare(config: PrepareConfig) -> None:
    """Prepare in the place of an earlier result."""
    shutil.rmtree(config.out, ignore_errors=True)
    prepare(config)


def run_bare(log: Path, out: Path, memory: str, threads: int) -> None:
    """Read the columns that the mapping names, sort them, write them."""
    spill = out.with_suffix(".spill")
    connection = duckdb.connect(
        config={"memory_limit": memory, "threads": threads, "temp_directory": str(spill)}
    )
    files = [str(file) for file in data_files(log / "events")]
    query = "SELECT event, user_id, item_id, ts, search_id FROM read_parquet(?) ORDER BY user_id, ts"
    connection.execute(f"COPY ({query}) TO '{out}' (FORMAT parquet)", [files])
    connection.close()


def rows_of(out: Path) -> pa.Table:
    """All requests of a data set, in order of id."""
    files = [file for split in SPLITS for file in Dataset(out).requests(split)]
    return pa.concat_tables(pq.read_table(file, partitioning=None) for file in files).sort_by("request_id")


def compare_engines(config: PrepareBenchConfig) -> dict[str, Any]:
    """Prepare one log by both engines and compare every row."""
    log = config.out / "small-log"
    events = write_large_log(log, config.spark_impressions, 5, 5000, 2000)
    found = {}
    for engine in ("duckdb", "spark"):
        options = PrepareConfig(mapping=log / "prepare.toml", out=config.out / f"small-{engine}",
                                engine=engine, memory=config.memory, threads=config.threads)  # fmt: skip
        found[engine] = in_a_process(run_prepare, options)["seconds"]
    ours, theirs = (rows_of(config.out / f"small-{engine}") for engine in ("duckdb", "spark"))
    equal = ours.equals(theirs)
    for name in ("small-log", "small-duckdb", "small-spark"):
        shutil.rmtree(config.out / name)
    return {"events": events, "requests": len(ours), "equal": equal, "seconds": found}


def options_of(config: PrepareBenchConfig, log: Path) -> PrepareConfig:
    """Options of `mim prepare` for a log."""
    return PrepareConfig(mapping=log / "prepare.toml", out=config.out / "prepared", memory=config.memory,
                         threads=config.threads)  # fmt: skip


def in_turns(config: PrepareBenchConfig) -> dict[str, Any]:
    """Preparation of the whole log and the bare query in turns."""
    log, sorted_file = config.out / "log", config.out / "sorted.parquet"
    events = write_large_log(log, config.impressions, config.days, config.users, config.items)
    options = options_of(config, log)
    turns: dict[str, list[dict[str, float]]] = {"prepare": [], "bare": []}
    for turn in range(config.rounds):
        for name in ("prepare", "bare") if turn % 2 else ("bare", "prepare"):
            if name == "prepare":
                found = in_a_process(run_prepare, options)
            else:
                found = in_a_process(run_bare, log, sorted_file, config.memory, config.threads)
            turns[name].append(found)
            print(f"{name}: {found['seconds']:.1f} s, {found['cpu']:.1f} s of CPU, "
                  f"{found['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
    requests = sum(
        pq.read_metadata(file).num_rows for split in SPLITS for file in Dataset(options.out).requests(split)
    )
    for path in (log, options.out):
        shutil.rmtree(path)
    sorted_file.unlink()
    return {"events": events, "requests": requests, "turns": turns}


def at_size(config: PrepareBenchConfig, impressions: int) -> dict[str, float]:
    """Preparation of a smaller log."""
    log = config.out / "log"
    events = write_large_log(log, impressions, config.days, config.users, config.items)
    found = in_a_process(run_prepare, options_of(config, log))
    for path in (log, config.out / "prepared"):
        shutil.rmtree(path)
    return {"events": events} | found


def growth(sizes: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Events a second of CPU and memory by size.

    Args:
        sizes: impressions → `events`, `cpu`, `peak_mib`, `start_mib`.

    Returns:
        `sizes`, and `rate`, the lowest rate of a larger log over that of the smallest.
    """
    rows = {
        str(size): {
            "events": one["events"], "events_per_cpu_second": one["events"] / one["cpu"],
            "peak_mib": one["peak_mib"], "added_mib": one["peak_mib"] - one["start_mib"],
        }
        for size, one in sorted(sizes.items())
    }  # fmt: skip
    first, *others = (row["events_per_cpu_second"] for row in rows.values())
    return {"sizes": rows, "rate": min(others, default=first) / first}


def measure(config: PrepareBenchConfig) -> dict[str, Any]:
    """The figures of the report."""
    for name in ("log", "prepared"):
        shutil.rmtree(config.out / name, ignore_errors=True)
    whole = in_turns(config)
    turns = whole["turns"]
    median = {
        name: {key: statistics.median(one[key] for one in own) for key in ("seconds", "cpu")}
        for name, own in turns.items()
    }
    ratio = {
        key: statistics.median(p[key] / b[key] for p, b in zip(turns["prepare"], turns["bare"], strict=True))
        for key in ("seconds", "cpu")
    }
    peak = max(turns["prepare"], key=lambda one: one["peak_mib"])
    sizes = {config.impressions: {"events": whole["events"], "cpu": median["prepare"]["cpu"],
                                  "peak_mib": peak["peak_mib"], "start_mib": peak["start_mib"]}}  # fmt: skip
    for fraction in config.fractions:
        size = int(config.impressions * fraction)
        sizes[size] = at_size(config, size)
    scale = growth(sizes)
    spark = compare_engines(config) if config.spark_impressions else None
    most = max(row["added_mib"] for row in scale["sizes"].values())
    limit = options_of(config, config.out).memory_bytes() / 2**20
    targets = [
        target(f"prepare takes {TARGET:.0f} times as long as the bare query, or less", ratio["seconds"],
               ratio["seconds"] <= TARGET),
        target(f"events a second of CPU, at any size over the smallest: {SLOWER} or more", scale["rate"],
               scale["rate"] >= SLOWER),
        target(f"memory beyond that of the start, MiB: at most {config.memory}", most, most <= limit),
    ]  # fmt: skip
    if spark is not None:
        targets.append(target("Spark and DuckDB give the same rows", float(spark["equal"]), spark["equal"]))
    return {
        "events": whole["events"],
        "requests": whole["requests"],
        "seconds": median["prepare"]["seconds"],
        "bare_seconds": median["bare"]["seconds"],
        "events_per_second": whole["events"] / median["prepare"]["seconds"],
        "over_bare": ratio["seconds"],
        "over_bare_cpu": ratio["cpu"],
        "peak_mib": peak["peak_mib"],
        "bare_peak_mib": max(one["peak_mib"] for one in turns["bare"]),
        "scale": scale,
        "spark_equals_duckdb": None if spark is None else spark["equal"],
        "spark": spark,
        "turns": turns,
        "targets": targets,
    }


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    rows = [
        ["mim prepare", f"{report['seconds']:.1f}", f"{report['peak_mib']:.0f}",
         f"{report['over_bare']:.2f}", f"{report['over_bare_cpu']:.2f}"],
        ["read, sort by user and time, write", f"{report['bare_seconds']:.1f}",
         f"{report['bare_peak_mib']:.0f}", "1.00", "1.00"],
    ]  # fmt: skip
    text = [f"{report['events']:,} events to {report['requests']:,} requests, medians of seconds."]
    if report["spark"] is not None:
        spark = report["spark"]
        text.append(
            f"On {spark['events']:,} events Spark and DuckDB gave "
            f"{'the same' if spark['equal'] else 'DIFFERENT'} {spark['requests']:,} requests, in "
            f"{spark['seconds']['spark']:.0f} and {spark['seconds']['duckdb']:.0f} s."
        )
    by_size = [
        [f"{one['events']:,}", f"{one['events_per_cpu_second']:,.0f}", f"{one['peak_mib']:.0f}",
         f"{one['added_mib']:.0f}"]
        for one in report["scale"]["sizes"].values()
    ]  # fmt: skip
    return [
        Section("Beside the bare query", text,
                ["", "seconds", "peak MiB", "of the bare query", "of its CPU seconds"], rows),
        Section("By size", columns=["events", "events a second of CPU", "peak MiB", "beyond the start, MiB"],
                rows=by_size),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.prepare`."""
    config = tyro.cli(
        PrepareBenchConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    check_sizes(config, 1, "days", "users", "items", "threads", "rounds")
    check_sizes(config, 10_000, "impressions")
    check_sizes(config, 0, "spark_impressions")
    if any(not 0 < one < 1 for one in config.fractions):
        raise OptionError("--fractions are between 0 and 1")
    config.out.mkdir(parents=True, exist_ok=True)
    report = measure(config)
    report["config"] = dataclasses.asdict(config)
    summary = (
        f"{config.impressions:,} impressions of {config.users:,} users and {config.items:,} items over "
        f"{config.days} days; {config.threads} threads, at most {config.memory} for the engine."
    )
    write_pages(report, "Preparation of raw logs", summary, sections(report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
