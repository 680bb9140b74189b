"""``mim store``: load a table into a parameter store, apply a window log to it, compare the two."""

import json
import signal
from dataclasses import dataclass
from threading import Event
from typing import Annotated

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.remote.places import Place
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import catch_up, follow, open_store
from mim_torchrec.embeddings.table.quantize import decode
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.windows.compact import changes
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import Status

CHUNK = 10_000


@dataclass(frozen=True, kw_only=True)
class Load:
    """Write a table into Redis or Valkey; it replaces an older base table of the same table_version."""

    table: tyro.conf.Positional[Place]
    """The base table's directory."""
    store: str
    """URL: redis://, rediss:// (TLS) or unix://. +cluster after the scheme selects a cluster. #NAME is the
    name of all keys: rediss+cluster://user@host:6379#shop."""

    def run(self) -> None:
        table = Table.open(self.table)
        with Progress(table.manifest.rows, "load", "row", scale=True) as bar:
            store = RedisStore.load(self.store, table, progress=bar.update)
        print(f"{table.manifest.rows} rows of table_version {store.table_version}, windows up to {store.seq}")


@dataclass(frozen=True, kw_only=True)
class Follow:
    """Apply the windows of a log to a store as they come, until SIGTERM.

    The store is the record of what was applied, so that it may be killed and started again at any time, and
    several may follow one log into one store.
    """

    store: str
    """URL of the store, see mim store load."""
    log: str
    """Directory or URL of the window log."""
    table_version: str
    """Version of the store and of the log."""
    once: bool = False
    """End when all existing windows have been applied."""

    def run(self) -> None:
        store = open_store(self.store, self.table_version)
        windows = open_log(self.log, self.table_version, start=store.seq)
        if self.once:
            catch_up(store, windows)
        else:
            stop = Event()
            for number in program.heeded(signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            follow(store, windows, stop)
        print(f"windows applied up to {store.seq}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Compare every row of a store with a table and the windows of a log; exit status 3 if any differs."""

    table: tyro.conf.Positional[Place]
    """The base table's directory."""
    store: str
    """URL of the store, see mim store load, or directory of another table."""
    log: str | None = None
    """Directory or URL of the window log that the store followed."""

    def run(self) -> None:
        table = Table.open(self.table)
        manifest = table.manifest
        store = open_store(self.store, manifest.table_version)
        changed: dict[int, torch.Tensor | None] = {}
        seq = manifest.seq
        if self.log is not None:
            changed, seq = changes(open_log(self.log, manifest.table_version), manifest)
        ids = torch.cat([table.row_index().ids, torch.tensor(sorted(changed), dtype=torch.int64)]).unique()
        missing = wrong = surplus = 0
        for part in ids.split(CHUNK):
            stored, expected = table.find(part)
            for at, item in enumerate(part.tolist()):
                if item in changed:
                    vector = changed[item]
                    expected[at] = vector is not None
                    stored[at] = 0 if vector is None else vector
            vectors, found = store.lookup(part)
            missing += int((expected & ~found).sum())
            surplus += int((found & ~expected).sum())
            both = expected & found
            wrong += int((vectors[both] != decode(stored[both], manifest.dtype)).any(1).sum())
        report = {"rows": ids.numel(), "missing": missing, "surplus": surplus, "wrong": wrong,
                  "seq": store.seq, "log_seq": seq}  # fmt: skip
        print(json.dumps(report))
        if missing or surplus or wrong or store.seq != seq:
            raise SystemExit(Status.DATA)


Command = (
    Annotated[Load, tyro.conf.subcommand("load")]
    | Annotated[Follow, tyro.conf.subcommand("follow")]
    | Annotated[Check, tyro.conf.subcommand("check")]
)


def main(argv: list[str] | None = None) -> None:
    """Run ``mim store`` with the arguments ``argv`` (``None``: those of the process)."""
    tyro.cli(Command, args=argv, prog="mim store").run()


if __name__ == "__main__":
    program.run(main)
