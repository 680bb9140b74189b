"""The processes that chaos kills, each doing its real work: RIM, followers of a log, ranks that train.

They come from a fork server that has loaded everything once, so that one is at work a moment after it was
started. What a process says goes to a file of its own.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

import mim_torchrec.ctr.main as ctr
from mim_torchrec.ctr.assembly import Assembled
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.windows import LiveWindows
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.stores.main import main as store_command
from mim_torchrec.embeddings.stores.store import follow
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.embeddings.windows.window import Window, WindowGap
from mim_torchrec.rim.main import main as rim_command

RANKS = 2
GAP, VERSION, FAILED = 3, 4, 5  # exit statuses
TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything lies.

    Args:
        root: directory of this run.
        source: of RIM.
        log: of windows.
        store: URL of the store in Redis.
        shop: dataset that is trained on.
        encoder: directory.
        base: directory of the first base table.
        version: table_version of everything.
    """

    root: Path
    source: str
    log: str
    store: str
    shop: Path
    encoder: Path
    base: Path
    version: str


def context() -> multiprocessing.context.ForkServerContext:
    """Where workers come from."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["mim_torchrec.benchmarks.chaos.workers"])
    return made


def warm_up() -> None:
    """Wait until the fork server has loaded everything."""
    process = context().Process(target=torch.get_num_threads)
    process.start()
    process.join()


class Workers:
    """Processes that live and die together.

    Args:
        name: of their file of messages.
        place: as given to `work`.
        work: defined at the top of a module.
        arguments: of each process, after the place.
    """

    starting = threading.Lock()  # the fork server is asked by one at a time

    def __init__(
        self, name: str, place: Place, work: Callable[..., None], arguments: Sequence[tuple[Any, ...]] = ((),)
    ) -> None:
        self._says = [place.root / "workers" / f"{name}-{number}.log" for number in range(len(arguments))]
        self._says[0].parent.mkdir(parents=True, exist_ok=True)
        for file in self._says:
            file.write_text("")
        made = context()
        self._processes = [
            made.Process(target=_run, args=(work, file, place, *words), daemon=True)
            for file, words in zip(self._says, arguments, strict=True)
        ]
        with self.starting:
            for process in self._processes:
                process.start()

    def wait(self, seconds: float | None) -> int | None:
        """Wait until a process fails or all have ended; their exit status, None if they still run."""
        left = wait([p.sentinel for p in self._processes], seconds)
        codes = [p.exitcode for p in self._processes if p.sentinel in left]
        if not left:
            return None
        if any(codes):
            self._end()
            # one that lost its peer fails otherwise than the first did
            return next(code for code in (GAP, VERSION, *codes) if code and code in
                        [p.exitcode for p in self._processes])  # fmt: skip
        for process in self._processes:
            process.join(TIMEOUT.total_seconds())
        return next((p.exitcode for p in self._processes if p.exitcode), 0)

    def kill(self, rng: Random) -> bool:
        """SIGKILL one of the processes, then the others, as a launcher does; whether it still ran."""
        first = rng.choice(self._processes)
        first.kill()
        first.join()
        self._end()
        return first.exitcode == -signal.SIGKILL

    def terminate(self) -> int | None:
        """SIGTERM all; the exit status."""
        for process in self._processes:
            process.terminate()
        return self.wait(TIMEOUT.total_seconds())

    def says(self) -> str:
        """What the first process has written."""
        return self._says[0].read_text(errors="replace")

    def has_said(self, words: str) -> bool:
        """Whether the first process has written these words."""
        return words in self.says()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _run(work: Callable[..., None], says: Path, *arguments: Any) -> None:
    """The life of a process: errors become exit statuses."""
    with says.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except (WindowGap, VersionMismatch) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(GAP if isinstance(error, WindowGap) else VERSION)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        sys.exit(FAILED)


def rim(place: Place, *more: str) -> None:
    """``mim rim``."""
    rim_command(["--source", place.source, "--encoder", str(place.encoder), "--table", str(place.base),
                 "--log", place.log, "--out", str(place.root / "rim"), "--window-items", "16",
                 "--window-seconds", "0.1", "--batch-size", "8", *more])  # fmt: skip


def follower(place: Place) -> None:
    """``mim store follow``."""
    store_command(["follow", "--store", place.store, "--log", place.log, "--table-version", place.version])


class _Told:
    """An embedded store that tells where it begins and which windows it has applied."""

    def __init__(self, store: EmbeddedStore, tell: Connection) -> None:
        self.table_version, self.dim, self.lookup = store.table_version, store.dim, store.lookup
        self._store, self._tell = store, tell
        self._sending = threading.Lock()

    @property
    def seq(self) -> int:
        return self._store.seq

    def apply(self, window: Window) -> bool:
        applied = self._store.apply(window)
        self.tell(("applied", self.seq))
        return applied

    def tell(self, message: tuple[Any, ...]) -> None:
        with self._sending:
            self._tell.send(message)


def embedded(place: Place, table: Path, tell: Connection) -> None:
    """A serving machine: an embedded store that follows the log, while ids are looked up."""
    store = _Told(EmbeddedStore.open(table, place.version), tell)
    store.tell(("begun", store.seq))  # its base may hold every window there will be

    def answer() -> None:
        while True:
            vectors, found = store.lookup(torch.tensor(tell.recv(), dtype=torch.int64))
            store.tell(("rows", store.seq, vectors.numpy(), found.numpy()))

    threading.Thread(target=answer, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    follow(store, open_log(place.log, place.version), stop)


def rank(place: Place, table: Path, out: Path, group: Path, number: int, epochs: int) -> None:
    """A rank of ``mim ctr --windows``; at its end it leaves its rows beside the results."""
    sizes = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    check = ctr.check_table

    def leave_rows(
        config: CTRConfig, assembled: Assembled, windows: LiveWindows | None
    ) -> dict[str, str | int | None]:
        table, index = assembled.table, assembled.index
        assert assembled.frozen is not None and windows is not None  # MIM with --windows
        assert table is not None and index is not None
        _, frozen = find_frozen(assembled.frozen, "mm")
        rows = torch.cat([block.clone() for block in frozen.store.blocks()])
        facts = {"first": frozen.first_row, "rows": rows, "seq": windows.seq,
                 "table": str(table.path), "index": index.saved()}  # fmt: skip
        torch.save(facts, out / f"rows-{number}.pt")
        return check(config, assembled, windows)

    ctr.check_table = leave_rows  # what a run leaves of its table otherwise is a digest
    store = dist.FileStore(str(group), RANKS)
    dist.init_process_group("gloo", store=store, rank=number, world_size=RANKS, timeout=TIMEOUT)
    ctr.main(["--data", str(place.shop), "--table", str(table), "--out", str(out), "--windows", place.log,
              "--windows-every", "5", "--epochs", str(epochs), "--batch-size", "64", "--embedding-dim", "4",
              "--attention", "8", "--tower", "16", "--log-every", "5", "--checkpoint.every", "10",
              "--checkpoint.asynchronous", "False"])  # fmt: skip
    dist.destroy_process_group()
