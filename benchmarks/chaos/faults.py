"""What chaos does besides killing: windows twice, out of order or of another encoder, bases
folded and windows forgotten under readers, a server that goes away. Each has one right answer.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TypeVar

import torch

from mim_torchrec.benchmarks.chaos.inputs import DIM, DTYPE
from mim_torchrec.benchmarks.chaos.verify import Audit, verify_rows
from mim_torchrec.benchmarks.chaos.workers import Place
from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import catch_up
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.table.quantize import decode
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.redis_address import RedisUnavailable
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.embeddings.windows.window import Window, WindowGap

OTHER_VERSION = "another encoder"
AWAY = 60.0  # seconds without the server, at most
Value = TypeVar("Value")


def insist(action: Callable[[], Value]) -> Value:
    """Do something as soon as the server answers, which it must within AWAY."""
    end = time.monotonic() + AWAY
    while True:
        try:
            return action()
        except RedisUnavailable:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


class Faults:
    """Does one thing after the other, and notes what was answered wrongly.

    Args:
        place: where everything lies.
        audit: reads windows before they are forgotten.
        server: that goes away.
        rng: what comes next.

    Attributes:
        counts: how often each was done.
        problems: answers that were not right, in words.
        bases: tables that windows were folded into, the newest last.
    """

    def __init__(self, place: Place, audit: Audit, server: RedisServer, rng: Random) -> None:
        self._place, self._audit, self._server, self._rng = place, audit, server, rng
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.bases = [place.base]
        self._seqs = [0]
        self._kinds: list[tuple[Callable[[], None], float]] = [
            (self._append_again, 4), (self._deliver_again, 4), (self._skip, 2),
            (self._deliver_other_version, 2),
            (self._open_stale, 2), (self._fold_and_forget, 2), (self._restart_server, 0.5),
        ]  # fmt: skip
        if isinstance(self._log(), WindowLog):
            self._kinds.append((self._plant_other_version, 2))

    def step(self) -> None:
        """Do one of them, once there are windows."""
        insist(lambda: self._audit.follow(self._log()))
        if self._audit.seq > 0:
            kinds, weights = zip(*self._kinds, strict=True)
            self._rng.choices(kinds, weights)[0]()

    def _log(self):
        return insist(lambda: open_log(self._place.log, self._place.version, start=0))

    def _store(self) -> RedisStore:
        return insist(lambda: RedisStore.open(self._place.store, self._place.version))

    def _note(self, kind: str, is_right: bool, what: str) -> None:
        self.counts[kind] += 1
        if not is_right:
            self.problems.append(f"{kind}: {what}")

    def _refuses(self, kind: str, error: type[Exception], action: Callable[[], object]) -> None:
        try:
            answer = insist(action)
        except error:
            self._note(kind, True, "")
        else:
            self._note(kind, False, f"{answer} in place of {error.__name__}")

    def _append_again(self) -> None:
        """A window that the log has, from one who does not know that."""
        window = self._rng.choice(self._audit.windows)
        vectors = decode(window.vectors, window.dtype)
        log = self._log()
        seq = insist(lambda: log.append(window.window_id, window.ids, vectors, dtype=window.dtype,
                                        removed=window.removed))  # fmt: skip
        self._note("windows appended again", seq == window.seq, f"{window.seq} got number {seq}")

    def _deliver_again(self) -> None:
        """A window that the store has."""
        store = self._store()
        seq = insist(lambda: store.seq)
        if seq:
            window = self._rng.choice(self._audit.windows[:seq])
            applied = insist(lambda: store.apply(window))
            self._note("windows delivered again", not applied, f"window {window.seq} was applied after {seq}")

    def _skip(self) -> None:
        """A window whose predecessors are missing."""
        window, store = self._rng.choice(self._audit.windows), self._store()
        ahead = replace(window, seq=insist(lambda: store.seq) + self._rng.randint(10_000, 20_000))
        self._refuses("gaps delivered", WindowGap, lambda: store.apply(ahead))

    def _deliver_other_version(self) -> None:
        """A window of another encoder, and one who opens the log for that."""
        window, store = self._rng.choice(self._audit.windows), self._store()
        external = replace(window, seq=insist(lambda: store.seq) + 1, table_version=OTHER_VERSION)
        self._refuses("other versions delivered", VersionMismatch, lambda: store.apply(external))
        self._refuses("other versions at the log", VersionMismatch,
                      lambda: open_log(self._place.log, OTHER_VERSION, start=0))  # fmt: skip

    def _open_stale(self) -> None:
        """A reader that begins at the first base, when the log has forgotten what follows that."""
        log = self._log()
        if insist(log.first_seq) > 1:
            reader = EmbeddedStore.open(self._place.base)
            self._refuses("readers of a base too old", WindowGap, lambda: catch_up(reader, log))
            reader = EmbeddedStore.open(self.bases[-1])
            insist(lambda: catch_up(reader, log))
            insist(lambda: self._audit.follow(log))
            found = verify_rows(reader.lookup, self._audit.state(reader.seq), "reader of the newest base")
            self._note("readers of the newest base", not found.examples, "; ".join(found.examples))

    def _fold_and_forget(self) -> None:
        """Fold windows into a new base; forget those before it, or before the last one."""
        out, log = self._place.root / "bases" / str(len(self.bases)), self._log()
        out.parent.mkdir(exist_ok=True)
        seq = insist(lambda: compact(self.bases[-1], self._place.log, out)).seq
        insist(lambda: self._audit.follow(log))
        table = Table.open(out)
        ids = table.row_index().ids.tolist()
        there = {item for item, vector in self._audit.state(seq).items() if vector is not None}
        self._note("bases folded", set(ids) == there, f"{out} has other items than windows up to {seq}")
        self.bases.append(out)
        self._seqs.append(seq)
        through = seq if self._rng.random() < 0.3 else self._seqs[-2]
        self.counts["windows forgotten"] += insist(lambda: log.forget(through))

    def _plant_other_version(self) -> None:
        """A file of another encoder in the place of the next window, until somebody takes it away."""
        root = Path(self._place.log)
        log = WindowLog(root, self._place.version)
        seq = log.last_seq() + 1
        window = Window.of(torch.tensor([1]), torch.ones(1, DIM), table_version=OTHER_VERSION, seq=seq,
                           window_id=f"{OTHER_VERSION} {seq}", dtype=DTYPE)  # fmt: skip
        waiting, path = root / ".planted", root / f"{seq:016d}.safetensors"
        waiting.write_bytes(window.to_bytes())
        try:
            os.link(waiting, path)
        except FileExistsError:
            return  # RIM was faster
        finally:
            waiting.unlink()
        reader = EmbeddedStore.open(self.bases[-1])
        self._refuses("other versions in the log", VersionMismatch, lambda: catch_up(reader, log))
        self._note("windows before a external one", reader.seq == seq - 1, f"{reader.seq} is not {seq - 1}")
        time.sleep(self._rng.uniform(0.1, 0.5))
        behind = log.last_seq() - seq
        self._note("other versions that nobody went on behind", behind == 0, f"{behind} windows behind it")
        path.unlink()

    def _restart_server(self) -> None:
        """The server of the store, and of the stream, dies and is started again."""
        self._server.kill()
        self._server.start()
        self.counts["servers killed"] += 1
