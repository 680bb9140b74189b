"""What `mim prepare` costs beside a bare query that reads and sorts the same columns: `make bench-prepare`.

Both run in processes of their own, in turns, with the same threads and the same limit of memory. The bare
query reads the columns that the mapping names, sorts the events by user and time, and writes them as Parquet,
which is the least that a preparation can do. On a smaller log DuckDB and Spark prepare the same data set, and
every row is compared.
"""

import dataclasses
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
from mim_torchrec.errors import check_sizes
from mim_torchrec.extras import needs
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.run import prepare

with needs("prepare"):
    import duckdb

TARGET = 3.0


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
    memory: str = "4GB"
    """Limit of the engines."""
    threads: int = 2
    """Threads of the engines."""
    rounds: int = 3
    """Turns of each, of which the median is taken."""


def in_a_process(work: Callable[..., Any], *words: Any) -> dict[str, float]:
    """Seconds and the largest resident memory (MiB) of a call in a new process, without its start.

    Raises:
        RuntimeError: the process failed.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (work, words))


def _timed(work: Callable[..., Any], words: tuple[Any, ...]) -> dict[str, float]:
    before = _peak_mib()
    started = time.perf_counter()
    work(*words)
    return {"seconds": time.perf_counter() - started, "peak_mib": _peak_mib(), "start_mib": before}


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


def measure(config: PrepareBenchConfig) -> dict[str, Any]:
    """The figures of the report."""
    log, out = config.out / "log", config.out / "prepared"
    for path in (log, out):
        shutil.rmtree(path, ignore_errors=True)
    events = write_large_log(log, config.impressions, config.days, config.users, config.items)
    options = PrepareConfig(
        mapping=log / "prepare.toml", out=out, memory=config.memory, threads=config.threads
    )
    seconds: dict[str, list[float]] = {"prepare": [], "bare": []}
    peaks: dict[str, list[float]] = {"prepare": [], "bare": []}
    for turn in range(config.rounds):
        for name in ("prepare", "bare") if turn % 2 else ("bare", "prepare"):
            if name == "prepare":
                found = in_a_process(run_prepare, options)
            else:
                found = in_a_process(
                    run_bare, log, config.out / "sorted.parquet", config.memory, config.threads
                )
            seconds[name].append(found["seconds"])
            peaks[name].append(found["peak_mib"])
            print(f"{name}: {found['seconds']:.1f} s, {found['peak_mib']:.0f} MiB", flush=True)
    requests = sum(len(pq.read_table(f, columns=["ts"])) for s in SPLITS for f in Dataset(out).requests(s))
    for path in (log, out):
        shutil.rmtree(path)
    (config.out / "sorted.parquet").unlink()
    spark = compare_engines(config) if config.spark_impressions else None
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(p / b for p, b in zip(seconds["prepare"], seconds["bare"], strict=True))
    targets = [target(f"prepare takes {TARGET:.0f} times as long as the bare query, or less", ratio,
                      ratio <= TARGET)]  # fmt: skip
    if spark is not None:
        targets.append(target("Spark and DuckDB give the same rows", float(spark["equal"]), spark["equal"]))
    return {
        "events": events,
        "requests": requests,
        "seconds": median["prepare"],
        "bare_seconds": median["bare"],
        "events_per_second": events / median["prepare"],
        "over_bare": ratio,
        "peak_mib": max(peaks["prepare"]),
        "bare_peak_mib": max(peaks["bare"]),
        "spark_equals_duckdb": None if spark is None else spark["equal"],
        "spark": spark,
        "turns": seconds,
        "targets": targets,
    }


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    rows = [
        ["mim prepare", f"{report['seconds']:.1f}", f"{report['peak_mib']:.0f}",
         f"{report['over_bare']:.2f}"],
        ["read, sort by user and time, write", f"{report['bare_seconds']:.1f}",
         f"{report['bare_peak_mib']:.0f}", "1.00"],
    ]  # fmt: skip
    text = [f"{report['events']:,} events to {report['requests']:,} requests, medians of seconds."]
    if report["spark"] is not None:
        spark = report["spark"]
        text.append(
            f"On {spark['events']:,} events Spark and DuckDB gave "
            f"{'the same' if spark['equal'] else 'DIFFERENT'} {spark['requests']:,} requests, in "
            f"{spark['seconds']['spark']:.0f} and {spark['seconds']['duckdb']:.0f} s."
        )
    return [
        Section("Beside the bare query", text, ["", "seconds", "peak MiB", "of the bare query"], rows),
        targets_section(report["targets"]),
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.prepare`."""
    config = tyro.cli(
        PrepareBenchConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    check_sizes(config, 1, "days", "users", "items", "threads", "rounds")
    check_sizes(config, 10_000, "impressions")
    check_sizes(config, 0, "spark_impressions")
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
