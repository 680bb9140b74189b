"""What chaos serves and asks: two models in a folder of releases, rows in Redis, and clients that never rest.

Scores are computed here before, from the tables themselves. Every answer of the server is compared with those
of the model that it names and of the vectors that were there, and its time with the deadline. On a busy
machine the clients themselves are held up: a thread beside them that has nothing to do tells by how much.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random

import psutil
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig

from mim_torchrec.benchmarks.chaos.machine import Machine
from mim_torchrec.benchmarks.chaos.stores import CHANGED, STATES, Stores, state_vectors
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.parameters import is_dense
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.serving.bundle import Bundle, save_bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import SECONDS
from mim_torchrec.serving.protocol import InferRequest, read_requests
from mim_torchrec.serving.releases import Release, Releases
from mim_torchrec.serving.scorer import Scorer

ITEMS, USERS, DIM, REQUESTS = 300, 50, 8, 20
DEADLINE = 1.0  # seconds
TOLERANCE = 1e-5
INFER, READY = "/v2/models/mim/infer", "/v2/health/ready"
MODELS = ("first", "second")
BROKEN = "broken"


def make_bundle(out: Path, seed: int) -> Bundle:
    """A bundle of random weights."""
    config = CTRConfig(data=out, out=out, ubm="din", table_version="random", embedding_dim=4, seed=seed)
    mm = EmbeddingConfig(name="mm", num_embeddings=1, embedding_dim=DIM,
                         feature_names=["candidate_mm", "behavior_mm"])  # fmt: skip
    rows = {"user_id": USERS, "item_id": ITEMS}
    built = build_model(config, dict.fromkeys(rows, 1), mm, torch.device("cpu"))
    dense = {name: value for name, value in built.state_dict().items() if is_dense(name)}
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(1 + count, 4, generator=generator) for name, count in rows.items()}
    tables: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
        name: (torch.arange(count), partial(made.__getitem__, name)) for name, count in rows.items()
    }
    return save_bundle(out, config, dense, tables, DIM)


class Served:
    """A server of two workers on a folder of releases whose rows are in Redis.

    Args:
        root: where everything lies.
        stores: hold the rows.
        machine: the server runs on.
        seed: of requests.

    Attributes:
        releases: the folder.
        bodies: requests, as they are sent.
        expected: by version of a model, for each state of the vectors the scores of every request.
        address: host and port.
    """

    def __init__(self, root: Path, stores: Stores, machine: Machine, seed: int) -> None:
        self.stores, self.releases = stores, Releases(root / "releases")
        generator = torch.Generator().manual_seed(seed)
        rest = torch.randn(ITEMS - CHANGED, DIM, generator=generator)
        tables = [root / f"table{state}" for state in range(STATES)]
        for state, path in enumerate(tables):
            writer = TableWriter(path, table_version="random", dim=DIM, dtype="float32", encoder={})
            writer.write_shard(torch.arange(ITEMS), torch.cat([state_vectors(state, DIM), rest]))
            writer.finish()
        self._bundles = {name: make_bundle(root / name, k) for k, name in enumerate(MODELS)}
        make_bundle(root / BROKEN, len(MODELS))
        self.bodies = [_message(Random(f"{seed} {k}")) for k in range(REQUESTS)]
        self.expected = {
            bundle.model_version: [self._scores(bundle, path) for path in tables]
            for bundle in self._bundles.values()
        }
        stores.fill(Table.open(tables[0]), list(self._bundles.values()))
        for name in (*MODELS, BROKEN):
            where = {"bundle": str(root / name), "table": str(tables[0]), "store": stores.primary.url}
            id_store = None if name == BROKEN else stores.cluster.url
            self.releases.stage(name, Release(**where, id_store=id_store))
        (dense,) = (root / BROKEN).glob("*.safetensors")
        os.truncate(dense, dense.stat().st_size // 2)
        self.releases.promote(MODELS[0])
        words = ["--release", str(self.releases.root), "--port", "0", "--workers", "2", "--threads", "1"]
        words += ["--limits.deadline-ms", str(1000 * DEADLINE), "--limits.store-timeout-ms", "100"]
        log = (root / "server.log").open("w")
        command = machine.command([sys.executable, "-m", "mim_torchrec.serving.main", *words])
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                                         env=machine.environment)  # fmt: skip
        log.close()
        assert self._process.stdout is not None  # it is a pipe
        line = self._process.stdout.readline()
        if "serving" not in line:
            self.end()
            raise RuntimeError(f"the server did not start: {(root / 'server.log').read_text()}")
        self.address = line.rpartition("//")[2].strip()

    @property
    def pid(self) -> int:
        """Process id of the parent of the workers."""
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """Their process ids."""
        pid = self._process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def worker_of(self, port: int) -> int:
        """Which worker has the connection that comes from a port; it waits until one has accepted it."""
        while True:
            for pid in self.workers:
                for one in psutil.Process(pid).net_connections("tcp"):
                    if one.raddr and one.raddr.port == port:
                        return pid

    def version(self, name: str) -> str:
        """The model of a release."""
        return self._bundles[name].model_version

    def kill_worker(self, rng: Random) -> None:
        """Kill one, and wait until another has taken its place."""
        before = set(self.workers)
        os.kill(rng.choice(sorted(before)), signal.SIGKILL)
        end = time.monotonic() + 30
        while len(now := set(self.workers)) < len(before) or now == before:
            if time.monotonic() > end:
                raise TimeoutError("no worker took the place of one that was killed")
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the parent."""
        self._process.send_signal(number)

    def late_by_its_own_clock(self) -> int:
        """Requests that the server itself says took longer than its longest class of times."""
        http = HTTPConnection(self.address, timeout=60)
        http.request("GET", "/metrics")
        lines = http.getresponse().read().decode().splitlines()
        http.close()
        counts = {'le="+Inf"': 0.0, f'le="{SECONDS[-1]}"': 0.0}
        for line in lines:
            for label in counts:
                if line.startswith("mim_request_seconds_bucket") and label in line:
                    counts[label] += float(line.split()[-1])
        everything, soon = counts.values()
        return round(everything - soon)

    def end(self) -> str | None:
        """End it; why that was not right, or None."""
        self._process.terminate()
        try:
            status = self._process.wait(10 * DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"the server had not ended {10 * DEADLINE:g} s after SIGTERM"
        return None if status == 0 else f"the server ended with status {status}"

    def _scores(self, bundle: Bundle, table: Path) -> list[list[float]]:
        scorer = Scorer(bundle, table)
        sent = [InferRequest.model_validate_json(body) for body in self.bodies]
        return [scorer.score(read_requests(one, scorer, Limits()))[0].scores.tolist() for one in sent]


@dataclass
class Tally:
    """What clients have seen.

    Attributes:
        answers: by status; 0 is a connection that broke.
        wrong: scores that are not those of the model that the answer names, and answers that are none.
        late: answers after the deadline, and after what held up this process meanwhile.
        held_up: answers after the deadline that were held up on the way.
        unexplained: answers 500, and connections that broke while no worker was killed.
        examples: some of what was not right, in words.
    """

    answers: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    late: int = 0
    held_up: int = 0
    unexplained: int = 0
    examples: list[str] = field(default_factory=list)


class Bystander:
    """A thread that has nothing to do but to note when it is not let run; use it as a context."""

    PERIOD = 0.02

    def __init__(self) -> None:
        self._held: deque[tuple[float, float]] = deque(maxlen=10_000)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._done.wait(self.PERIOD):
            now = time.monotonic()
            if (held := now - before - self.PERIOD) > self.PERIOD:
                self._held.append((now, held))
            before = now

    def held_up(self, since: float) -> float:
        """Seconds in which it was not let run, since a time of `time.monotonic`."""
        return sum(min(held, now - since) for now, held in list(self._held) if now > since)


class Clients:
    """Threads that ask without a pause; use it as a context.

    Args:
        served: whom they ask.
        count: of threads.
        seed: of what they ask.
        slack: seconds after the deadline in which an answer is not late: a busy machine adds them on the way.
    """

    def __init__(self, served: Served, count: int, seed: int, slack: float) -> None:
        self._slack, self._bystander = slack, Bystander()
        self._served, self._done, self._lock = served, threading.Event(), threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=(Random(f"{seed} {k}"),), daemon=True)
            for k in range(count)
        ]
        self.tally = Tally()
        self.breaks_are_expected = False

    def __enter__(self) -> "Clients":
        self._bystander.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._bystander.__exit__()

    def await_answers(self, count: int, limit: float = 30.0) -> None:
        """Wait until so many further requests were answered, or refused.

        Raises:
            TimeoutError: they were not.
        """
        with self._lock:
            until = self.tally.answers.total() + count
            if not self._lock.wait_for(lambda: self.tally.answers.total() >= until, limit):
                raise TimeoutError(f"{count} requests had no answer within {limit:g} s")

    def ask(self, number: int, http: HTTPConnection) -> tuple[int, str | None]:
        """Send a request and note its answer: the status, 0 for none, and the version of the model."""
        begun, first = time.monotonic(), self._served.stores.done
        try:
            http.request("POST", INFER, self._served.bodies[number])
            answer = http.getresponse()
            status, said = answer.status, answer.read()
        except (OSError, HTTPException) as error:
            http.close()
            status, said = 0, f"{type(error).__name__}: {error}".encode()
        took = time.monotonic() - begun
        states = range(first, self._served.stores.begun + 1)
        with self._lock:
            version = self._note(number, status, said, states)
            if took > DEADLINE + self._slack:
                self._note_late(status, took, self._bystander.held_up(begun))
            self._lock.notify_all()
        return status, version

    def _run(self, rng: Random) -> None:
        http = self.connection()
        while not self._done.is_set():
            status, _ = self.ask(rng.randrange(REQUESTS), http)
            if status != 200:
                self._done.wait(0.01)  # as clients back off
        http.close()

    def connection(self) -> HTTPConnection:
        """A connection of its own."""
        return HTTPConnection(self._served.address, timeout=30)

    def _note(self, number: int, status: int, said: bytes, windows: range) -> str | None:
        """Count an answer; returns the version of the model that it names."""
        tally, version, wrong = self.tally, None, ""
        tally.answers[status] += 1
        if status == 500 or (status == 0 and not self.breaks_are_expected):
            tally.unexplained += 1
            self._example(f"status {status}: {said[:300]!r}")
        if status != 200:
            return None
        try:
            body = json.loads(said)
            version = body["model_version"]
            (scores,) = [one["data"] for one in body["outputs"] if one["name"] == "score"]
            of_states = self._served.expected[version]
            rights = [of_states[state][number] for state in {seq % STATES for seq in windows}]
            if not any(_same(scores, right) for right in rights):
                older = [k for k, right in enumerate(of_states) if _same(scores, right[number])]
                wrong = f"wrong scores; windows {windows}, those of states {older}"
        except (ValueError, KeyError, TypeError) as error:  # a client goes on after an answer of any form
            wrong = f"{error!r} in {said[:300]!r}"
        if wrong:
            tally.wrong += 1
            self._example(f"request {number}: {wrong}")
        return version

    def _note_late(self, status: int, took: float, held_up: float) -> None:
        if took - held_up > DEADLINE + self._slack:
            self.tally.late += 1
        else:
            self.tally.held_up += 1
        self._example(f"status {status} after {took:.1f} s; a bystander was held up for {held_up:.1f} s")

    def _example(self, said: str) -> None:
        if len(self.tally.examples) < 10:
            self.tally.examples.append(said)


def _same(scores: list[float], right: list[float]) -> bool:
    return len(scores) == len(right) and all(
        abs(a - b) <= TOLERANCE for a, b in zip(scores, right, strict=True)
    )


def _message(rng: Random) -> bytes:
    columns = {
        "user_id": [rng.randrange(USERS)],
        "candidate_item_id": [rng.randrange(ITEMS) for _ in range(20)],
        "behavior_item_id": [rng.randrange(ITEMS) for _ in range(30)],
    }
    inputs = [
        {"name": name, "shape": [len(data)], "datatype": "INT64", "data": data}
        for name, data in columns.items()
    ]
    return json.dumps({"inputs": inputs}).encode()
