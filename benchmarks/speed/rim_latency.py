"""From the arrival of an item to a lookup that has its vector: `make bench-rim-latency`.

RIM, a follower and a client that looks new ids up all the time are processes of their own. Items arrive one
by one at a steady rate and then in bursts, through files or a Redis stream; windows go through a log in a
directory or in Redis, into an embedded store or one in Redis. All clocks are the machine's monotonic one.
Taobao's display advertising reports a few seconds for this; the paper says "a short window time" (§3.5).
"""

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.benchmarks.measures.arrivals import Arrival, Feeder
from mim_torchrec.benchmarks.measures.encoders import encode_alone, make_encoder
from mim_torchrec.benchmarks.measures.turns import threads_of_torch
from mim_torchrec.data.shop import ShopConfig, make_shop
from mim_torchrec.embeddings.stores.main import main as store_command
from mim_torchrec.embeddings.stores.store import follow, open_store
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import check_sizes
from mim_torchrec.representation.export import TrainedEncoder

Store = Literal["embedded", "redis"]
Transport = Literal["log", "stream"]
DIM = 64
LOOK = 0.002  # seconds between two lookups of the client
TARGET_MS = 1000.0
PATIENCE = 120.0  # seconds until an item must have been found


@dataclass(frozen=True, kw_only=True)
class RIMLatencyConfig:
    """Time items on their way from arrival to lookup; write a report."""

    out: Path = Path("runs/rim_latency")
    """Directory of the report; what an earlier run has left there is removed."""
    stores: tuple[Store, ...] = ("embedded", "redis")
    """Where vectors are looked up."""
    transports: tuple[Transport, ...] = ("log", "stream")
    """`log`: items in files, windows in a directory; `stream`: both in Redis streams."""
    items: int = 300
    """Items that come one by one."""
    rate: float = 10.0
    """Items a second."""
    bursts: int = 5
    """Bursts after that."""
    burst: int = 20
    """Items of a burst."""
    base: int = 10_000
    """Rows of the base table."""
    vision: str = "efficientnet_lite0"
    """Vision tower, with random weights; what is timed does not depend on them."""
    image_size: int = 128
    """Height and width of images in pixels."""
    window_seconds: float | None = None
    """RIM's flag; by default, RIM's own."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What all measurements share."""

    items: list[Arrival]
    encoder: Path
    table: Path
    version: str
    encoder_alone_ms: float
    """To encode an item by itself, in this process."""


def make_items(config: RIMLatencyConfig) -> Made:
    """Items, an encoder and a base table."""
    count = config.items + config.bursts * config.burst
    shop, encoder = config.out / "shop", config.out / "encoder"
    make_shop(ShopConfig(out=shop, items=max(count, 200), users=20, requests=20, searches=5, browsing=100,
                         image_size=config.image_size))  # fmt: skip
    rows = pq.read_table(shop / "items", columns=["title", "image"]).to_pylist()[:count]
    version = make_encoder(encoder, [row["title"] for row in rows], DIM, config.vision, config.image_size)
    fed = [Arrival(item_id=config.base + number, **row) for number, row in enumerate(rows)]
    trained = TrainedEncoder(str(encoder), torch.device("cpu"))
    seconds = []
    for item in fed[: min(30, count)]:
        started = time.perf_counter()
        encode_alone(trained, *item.content())
        seconds.append(time.perf_counter() - started)
    table = config.out / "base"
    writer = TableWriter(table, table_version=version, dim=DIM, dtype="float16", encoder={}, spare_rows=count)
    writer.write_shard(torch.arange(config.base), torch.randn(config.base, DIM))
    writer.finish()
    return Made(items=fed, encoder=encoder, table=table, version=version,
                encoder_alone_ms=1000 * float(np.median(seconds)))  # fmt: skip


def client(store: str, log: str | None, version: str, ids: list[int], tell: Connection) -> None:
    """Look up what has not been found yet, over and over; tells when it found each item.

    Args:
        store: as of `open_store`.
        log: that this process itself follows into the store, None where another does.
        version: of both.
        ids: looked for.
        tell: gets a list of (item, seconds of the monotonic clock) whenever there are some, after "ready".
    """
    torch.set_num_threads(1)
    opened = open_store(store, version)
    if log is not None:
        words = (opened, open_log(log, version), threading.Event())
        threading.Thread(target=follow, args=words, daemon=True).start()
    missing = torch.tensor(ids, dtype=torch.int64)
    tell.send("ready")
    while missing.numel():
        # items come in this order, so those far behind need not be asked for
        asked = missing[:64]
        _, found = opened.lookup(asked)
        if found.any():
            now = time.monotonic()
            tell.send([(item, now) for item in asked[found].tolist()])
            missing = torch.cat([asked[~found], missing[64:]])
        time.sleep(LOOK)


@contextmanager
def running(words: list[str], says: Path) -> Iterator[subprocess.Popen]:
    """A program in a process of its own, until SIGTERM."""
    with says.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            if process.wait(PATIENCE) != 0:
                raise RuntimeError(f"{words[0]} ended with {process.returncode}: {says.read_text()[-2000:]}")


def measure_one(config: RIMLatencyConfig, made: Made, store: Store, transport: Transport) -> dict[str, Any]:
    """Latencies of one store and transport."""
    fed, encoder, table, version = made.items, made.encoder, made.table, made.version
    root = (config.out / f"{store}-{transport}").absolute()
    root.mkdir()
    server = RedisServer(root / "redis")
    try:
        at_log = str(root / "log") if transport == "log" else f"{server.url}#log"
        source = str(root / "new") if transport == "log" else f"{server.url}#items"
        at_store = str(table) if store == "embedded" else f"{server.url}#store"
        if store == "redis":
            store_command(["load", str(table), "--store", at_store])
        open_log(at_log, version, start=0)
        feeder = Feeder(source, fed)
        ours, theirs = multiprocessing.Pipe()
        follows = at_log if store == "embedded" else None
        looker = multiprocessing.get_context("spawn").Process(
            target=client, args=(at_store, follows, version, [f.item_id for f in fed], theirs), daemon=True
        )
        looker.start()
        rim = ["mim_torchrec.rim.main", "--source", source, "--encoder", str(encoder), "--table", str(table),
               "--log", at_log, "--out", str(root / "rim")]  # fmt: skip
        if config.window_seconds is not None:
            rim += ["--window-seconds", str(config.window_seconds)]
        follower = ["mim_torchrec.embeddings.stores.main", "follow", "--store", at_store, "--log", at_log,
                    "--table-version", version]  # fmt: skip
        with running(rim, root / "rim.txt"):
            if store == "redis":
                with running(follower, root / "follower.txt"):
                    arrived, found = arrive(config, feeder, ours, looker)
            else:
                arrived, found = arrive(config, feeder, ours, looker)
        looker.join(PATIENCE)
        counts = json.loads((root / "rim" / "rim.json").read_text())
    finally:
        server.kill()
    latency = 1000 * np.array([found[f.item_id] - arrived[k] for k, f in enumerate(fed)])
    steady, bursts = latency[1 : config.items], latency[config.items :]  # the first waits for RIM to start
    p50, p99 = np.percentile(steady, [50, 99])
    return {
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "encoder_ms": 1000 * counts["encode_seconds"] / counts["items"],
        "burst_p50_ms": float(np.percentile(bursts, 50)),
        "burst_p99_ms": float(np.percentile(bursts, 99)),
        "windows": counts["windows"],
        "publish_ms": 1000 * counts["publish_seconds"] / counts["windows"],
    }


def arrive(
    config: RIMLatencyConfig, feeder: Feeder, pipe: Connection, looker: BaseProcess
) -> tuple[list[float], dict[int, float]]:
    """Let items arrive; returns when each did, in order, and when each was found, by id.

    The first one comes alone, and the others once it was found: then all processes are at work.
    """
    arrived: list[float] = []
    found: dict[int, float] = {}

    def put(through: int) -> None:
        before = feeder.fed
        feeder.feed(through)
        arrived.extend([time.monotonic()] * (feeder.fed - before))

    def listen(enough: int, until: float) -> None:
        while len(found) < enough and (left := until - time.monotonic()) > 0:
            if pipe.poll(left):
                message = pipe.recv()
                if message != "ready":
                    found.update(message)
        if not looker.is_alive() and len(found) < enough:
            raise RuntimeError(f"the client died with {looker.exitcode}")

    def wait_for(enough: int) -> None:
        listen(enough, time.monotonic() + PATIENCE)
        if len(found) < enough:
            raise RuntimeError(f"only {len(found)} of {enough} items were found within {PATIENCE:.0f} s")

    put(1)
    wait_for(1)
    due = time.monotonic()
    for number in range(1, config.items):
        put(number + 1)
        due += 1 / config.rate
        listen(config.items + 1, due)
    wait_for(config.items)
    for number in range(config.bursts):
        put(config.items + (number + 1) * config.burst)
        wait_for(config.items + (number + 1) * config.burst)
    return arrived, found


def measure(config: RIMLatencyConfig) -> dict[str, Any]:
    """All figures of the report."""
    made = make_items(config)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    report: dict[str, Any] = {"encoder_alone_ms": made.encoder_alone_ms}
    targets = []
    for store in config.stores:
        for transport in config.transports:
            one = measure_one(config, made, store, transport)
            print(f"{store}, {transport}: p50 {one['p50_ms']:.0f} ms, p99 {one['p99_ms']:.0f} ms, encoder "
                  f"{one['encoder_ms']:.1f} ms an item; bursts of {config.burst}: p50 "
                  f"{one['burst_p50_ms']:.0f}, p99 {one['burst_p99_ms']:.0f}", flush=True)  # fmt: skip
            for name, value in one.items():
                figures.setdefault(name, {}).setdefault(store, {})[transport] = value
            past = one["p99_ms"] - one["encoder_ms"]
            claim = f"{store} store, {transport}: p99 past encoding at most {TARGET_MS:.0f} ms"
            targets.append(target(claim, past, past <= TARGET_MS))
            past = one["burst_p99_ms"] - config.burst * one["encoder_ms"]
            claim = f"{store} store, {transport}, bursts of {config.burst}: p99 past encoding them, likewise"
            targets.append(target(claim, past, past <= TARGET_MS))
    return report | figures | {"targets": targets}


def sections(config: RIMLatencyConfig, report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    names = {"p50_ms": "p50", "p99_ms": "p99", "encoder_ms": "encoder, an item", "publish_ms":
             "appending a window", "burst_p50_ms": "burst, p50", "burst_p99_ms": "burst, p99"}  # fmt: skip
    rows = [
        [store, transport, *(f"{report[name][store][transport]:.1f}" for name in names)]
        for store in config.stores
        for transport in config.transports
    ]
    return [
        Section("Milliseconds from arrival to lookup", columns=["store", "transport", *names.values()],
                rows=rows, text=[f"{config.items} items at {config.rate:g} a second, then {config.bursts} "
                                 f"bursts of {config.burst}."]),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.rim_latency`."""
    config = tyro.cli(RIMLatencyConfig, args=argv, description=__doc__)
    check_sizes(config, 1, "items", "bursts", "burst", "base", "image_size")
    if config.out.exists():
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True)
    with threads_of_torch(1):
        report = measure(config)
    report["config"] = dataclasses.asdict(config)
    summary = f"An item by itself takes the encoder {report['encoder_alone_ms']:.1f} ms."
    write_pages(report, "New items", summary, sections(config, report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
