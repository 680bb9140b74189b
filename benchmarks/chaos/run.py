"""Chaos over one transport: processes killed and started again until all is done, and what is left."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from mim_torchrec.benchmarks.chaos import workers
from mim_torchrec.benchmarks.chaos.faults import Faults, insist
from mim_torchrec.benchmarks.chaos.inputs import Inputs
from mim_torchrec.benchmarks.chaos.verify import Audit, Findings, verify_dead_letter, verify_log, verify_rows
from mim_torchrec.benchmarks.chaos.workers import FAILED, GAP, RANKS, VERSION, Place, Workers
from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.benchmarks.measures.arrivals import Feeder
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.redis_address import locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log

SPANS = {"rim": 0.8, "store": 1.0, "embedded": 1.0, "rank": 4.0}
"""Seconds of work within which a process is killed; one in five is killed within those after its start."""
PATIENCE = 20.0  # seconds until a process is at work
DRIP = 25.0  # arrivals a second that are fed at least


@dataclass
class Outcome:
    """What came of chaos over one transport."""

    kills: Counter[str] = field(default_factory=Counter)
    at_work: Counter[str] = field(default_factory=Counter)
    """Kills of processes that had published or applied a window, or taken a step, since they were started."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Processes that ended with the error that they had to end with."""
    faults: Counter[str] = field(default_factory=Counter)
    log: Findings = field(default_factory=Findings)
    readers: dict[str, Findings] = field(default_factory=dict)
    watermarks: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    jobs: int = 0
    windows: int = 0
    left_behind: int = 0
    """Files that were being written when RIM was killed; nobody reads them."""
    seconds: float = 0.0


class Chaos:
    """One run.

    Args:
        inputs: what is fed and trained on.
        place: where everything lies.
        server: Redis.
        quotas: kills by kind of process, the keys of SPANS.
        pause: seconds between two faults, at most.
        epochs: of a training job.
        limit: seconds until what still goes on is itself an error: somebody waits for what never comes.
        seed: of kills and faults.

    Raises:
        TimeoutError: after `limit`, with the names of those that had not ended.
    """

    def __init__(
        self, inputs: Inputs, place: Place, server: RedisServer, quotas: dict[str, int], pause: float,
        epochs: int, limit: float, seed: str,
    ) -> None:  # fmt: skip
        self._inputs, self._place, self._quotas = inputs, place, quotas
        self._pause, self._epochs, self._limit, self._seed = pause, epochs, limit, seed
        self.outcome = Outcome()
        self._audit = Audit(inputs.base_ids, inputs.base_vectors)
        self._log = insist(lambda: open_log(place.log, place.version, start=0))
        RedisStore.load(place.store, Table.open(place.base))
        self._faults = Faults(place, self._audit, server, Random(f"{seed} faults"))
        self._fed, self._published, self._over = threading.Event(), threading.Event(), threading.Event()
        fed = {arrival.item_id for arrival in inputs.arrivals if not arrival.bad}
        self._ids = sorted({*fed, *inputs.base_ids.tolist()})
        self._told = 0  # the last window that the embedded store has told of
        self._rows: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._ended: list[tuple[Path, int]] = []  # training jobs

    def run(self) -> Outcome:
        """Kill until all quotas are met, let everything come to its end, and compare."""
        started = time.monotonic()
        end = started + self._limit
        works = {"rim": self._rim, "store": self._store, "embedded": self._embedded, "rank": self._train}
        threads = {kind: threading.Thread(target=self._guarded, args=(kind, work), daemon=True)
                   for kind, work in works.items()}  # fmt: skip
        feeder, rng = Feeder(self._place.source, self._inputs.arrivals), Random(f"{self._seed} pauses")
        feeder.feed(min(64, len(self._inputs.arrivals)))
        for thread in threads.values():
            thread.start()
        total, due = sum(self._quotas.values()), time.monotonic()
        while (not self._are_killed() and time.monotonic() < end
               and all(thread.is_alive() for thread in threads.values())):  # fmt: skip
            share = sum(self.outcome.kills.values()) / max(total, 1) * len(self._inputs.arrivals)
            drip = DRIP * (time.monotonic() - started)
            through = int(max(share, drip))
            insist(partial(feeder.feed, through))
            if time.monotonic() >= due:
                self._guarded("fault", self._faults.step)
                due = time.monotonic() + rng.uniform(0, self._pause)
            time.sleep(0.1)
        insist(lambda: feeder.feed(len(self._inputs.arrivals)))
        self._fed.set()
        self._join({"rim": threads["rim"]}, end)
        insist(lambda: self._audit.follow(self._log))
        self._published.set()
        self._join(threads, end)
        self._compare()
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _join(self, threads: dict[str, threading.Thread], end: float) -> None:
        for thread in threads.values():
            thread.join(max(end - time.monotonic(), 0.0))
        going = [kind for kind, thread in threads.items() if thread.is_alive()]
        if going:
            self._over.set()
            raise TimeoutError(f"after {self._limit:.0f} s still at work: {', '.join(going)}; killed "
                               f"{dict(self.outcome.kills)}, problems {self.outcome.problems}")  # fmt: skip

    def _are_killed(self) -> bool:
        return all(self.outcome.kills[kind] >= quota for kind, quota in self._quotas.items())

    def _guarded(self, kind: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.outcome.problems.append(f"{kind}: {error!r}")

    def _life(
        self, kind: str, group: Workers, rng: Random, is_at_work: Callable[[], bool], ends: bool = False
    ) -> int | None:
        """Let a process live for a random time, if it is still to be killed; its status, None if killed.

        One that is not to be killed lives until it ends by itself, if it does (`ends`), else until all is
        fed (RIM) or published.
        """
        if self._over.is_set():
            group.kill(rng)
            raise RuntimeError("no time left")
        if self.outcome.kills[kind] < self._quotas[kind]:
            code, waits = None, time.monotonic() + (PATIENCE if rng.random() < 0.8 else 0.0)
            while code is None and time.monotonic() < waits and not is_at_work():
                code = group.wait(0.05)
            if code is None:
                code = group.wait(rng.uniform(0, SPANS[kind]))
            if code is None:
                if group.kill(rng):
                    self.outcome.kills[kind] += 1
                    self.outcome.at_work[kind] += is_at_work()
                return None
        else:
            end, code = self._fed if kind == "rim" else self._published, None
            while code is None and not self._over.is_set():
                if not ends and end.is_set() and self._is_done(kind):
                    break
                code = group.wait(0.05)
            if code is None:
                code = group.terminate()
                if code == -signal.SIGTERM:  # it had not begun
                    return 0
        if code in (GAP, VERSION):
            self.outcome.refusals[f"{kind}: {'gap' if code == GAP else 'other version'}"] += 1
            time.sleep(0.05)  # a launcher waits, too
        elif code == FAILED and "RedisUnavailable" in group.says():
            self.outcome.refusals[f"{kind}: server away at the start"] += 1
        elif code != 0:
            self.outcome.problems.append(f"{kind} ended with {code}: {group.says()[-2000:]}")
            if len(self.outcome.problems) > 10:
                raise RuntimeError("too many problems")
        return code

    def _is_done(self, kind: str) -> bool:
        """Whether a reader has applied all windows."""
        if kind == "store":
            return self._seq_of_store() >= self._audit.seq
        return kind == "rim" or (self._told >= self._audit.seq and kind in self._rows)

    def _rim(self) -> None:
        rng = Random(f"{self._seed} rim")
        while not self._fed.is_set():
            group = Workers("rim", self._place, workers.rim)
            self._life("rim", group, rng, partial(group.has_said, "window "))
        code = None
        while code != 0:
            group = Workers("rim", self._place, workers.rim, [("--once",)])
            code = self._life("rim", group, rng, lambda: True, ends=True)

    def _store(self) -> None:
        rng = Random(f"{self._seed} store")
        code: int | None = None
        while code != 0:
            before = self._seq_of_store()
            group = Workers("store", self._place, workers.follower)
            code = self._life("store", group, rng, partial(self._has_applied_more, before))
            if code == GAP:
                insist(lambda: RedisStore.load(self._place.store, Table.open(self._faults.bases[-1])))

    def _seq_of_store(self) -> int:
        return insist(lambda: RedisStore.open(self._place.store, self._place.version).seq)

    def _has_applied_more(self, seq: int) -> bool:
        return self._seq_of_store() > seq

    def _embedded(self) -> None:
        rng = Random(f"{self._seed} embedded")
        code: int | None = None
        while code != 0:
            # one in four begins at a base that may be too old
            base = self._faults.bases[-1 if code == GAP or rng.random() > 0.25 else 0]
            ours, theirs = workers.context().Pipe()
            self._told = 0
            self._rows.pop("embedded", None)
            told: list[int] = []
            listener = threading.Thread(target=self._listen, args=(ours, told), daemon=True)
            group = Workers("embedded", self._place, workers.embedded, [(base, theirs)])
            theirs.close()
            listener.start()
            code = self._life("embedded", group, rng, partial(bool, told))
            listener.join()

    def _listen(self, pipe: Any, told: list[int]) -> None:
        """Hear what an embedded store has applied; look all rows up when it has everything."""
        asked = False
        try:
            while True:
                if self._published.is_set() and not asked and self._told >= self._audit.seq:
                    pipe.send(self._ids)
                    asked = True
                if not pipe.poll(0.05):
                    continue
                kind, seq, *rows = pipe.recv()
                self._told = seq
                if kind == "applied":
                    told.append(seq)
                if kind == "rows":
                    vectors, found = (torch.from_numpy(part) for part in rows)
                    self._rows["embedded"] = (seq, vectors, found)
        except (EOFError, OSError):
            pipe.close()

    def _train(self) -> None:
        rng, starts = Random(f"{self._seed} rank"), 0
        while not (self._published.is_set() and self._ended and self._ended[-1][1] == self._audit.seq):
            if self.outcome.kills["rank"] >= self._quotas["rank"]:
                self._published.wait()
            out = self._place.root / "jobs" / str(len(self._ended))
            out.mkdir(parents=True, exist_ok=True)
            starts += 1
            meeting = self._place.root / f"group-{starts}"
            words = [(self._faults.bases[-1], out, meeting, number, self._epochs) for number in range(RANKS)]
            group = Workers("rank", self._place, workers.rank, words)
            if self._life("rank", group, rng, partial(group.has_said, "step/s"), True) == 0:
                seq = json.loads((out / "metrics.json").read_text())["table"]["seq_after"]
                self._ended.append((out, seq))

    def _compare(self) -> None:
        """Compare everything that is left."""
        outcome, audit, place = self.outcome, self._audit, self._place
        outcome.windows, outcome.faults, outcome.jobs = audit.seq, self._faults.counts, len(self._ended)
        outcome.problems += self._faults.problems
        outcome.log = verify_log(audit.windows, self._inputs)
        lines = (place.root / "rim" / "dead-letter.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line]
        outcome.readers["dead_letter"] = verify_dead_letter([e["place"] for e in entries], self._inputs,
                                                          [e["item_id"] for e in entries])  # fmt: skip
        final = audit.state(audit.seq)
        store = RedisStore.open(place.store, place.version)
        at = locate(place.store)
        keys = connect(at).scan_iter(match=f"{{{at.name}:*", count=1000)
        rows = sum(len(key.partition(b"}")[2]) == 8 for key in keys)  # the others are not of rows
        outcome.readers["store"] = verify_rows(store.lookup, final, "store in Redis", rows)
        outcome.watermarks = {"log": self._log.last_seq(), "store": store.seq}
        if "embedded" in self._rows:
            seq, vectors, found = self._rows["embedded"]
            asked = torch.tensor(self._ids)

            def looked_up(ids: Tensor) -> tuple[Tensor, Tensor]:
                places = torch.searchsorted(asked, ids)
                return vectors[places], found[places]

            outcome.readers["embedded"] = verify_rows(looked_up, final, "embedded store")
            outcome.watermarks["embedded"] = seq
        trained = Findings()
        for out, seq in self._ended:
            trained.add(verify_trained(out, audit.state(seq), seq))
            outcome.watermarks["training"] = seq
        outcome.readers["training"] = trained
        for name in ("log", "store", "embedded", "training"):
            if outcome.watermarks.get(name) != audit.seq:
                reached = outcome.watermarks.get(name)
                outcome.problems.append(f"watermark of {name}: {reached}, not {audit.seq}")
        if isinstance(self._log, WindowLog):
            outcome.left_behind = sum(p.name.startswith(".") for p in Path(place.log).iterdir())


def verify_trained(out: Path, state: dict[int, Tensor | None], seq: int) -> Findings:
    """Compare the rows that the ranks of a training job have left with what the log says."""
    parts = [torch.load(out / f"rows-{number}.pt", weights_only=False) for number in range(RANKS)]
    # ranks hold parts of the table, or one of them all of it
    table = torch.cat([part["rows"] for part in sorted(parts, key=lambda part: part["first"])])
    index = ItemIndex.of(Table.open(parts[0]["table"], verify=False))
    index.restore(parts[0]["index"])

    def lookup(ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = index.rows(ids)
        return table[rows].float(), rows > 0

    held = int((table != 0).any(1).sum())
    found = verify_rows(lookup, state, f"training, {out.name}", held)
    for part in parts:
        if part["seq"] != seq:
            found.note("wrong", f"{out.name}: a rank has applied {part['seq']}, not {seq}")
    return found
