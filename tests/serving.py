"""A small trained model with its bundle, its server, and requests as clients send them over HTTP."""

import copy
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn

from mim_torchrec.ctr.main import main as train
from mim_torchrec.data.schema import TIME
from mim_torchrec.serving.app import make_app
from mim_torchrec.serving.bundling import write_bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.inference import Inference
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.patience import PatientProtocol
from mim_torchrec.serving.service import Deployment, Service
from mim_torchrec.serving.spans import Spans
from tests.pipeline.test_ctr_main import SMALL

ROOT = Path(__file__).parents[1]
INFER = "/v2/models/mim/infer"
PATIENCE = 300.0  # seconds; httpx itself waits for five
get = functools.partial(httpx.get, timeout=PATIENCE)
post = functools.partial(httpx.post, timeout=PATIENCE)


def trained_bundle(folder: Path, name: str, *flags: str) -> Path:
    """Train on `folder/data` and `folder/table`; returns the run, whose bundle is in it."""
    out = folder / name
    words = ["--data", str(folder / "data"), "--out", str(out), *SMALL, *flags]
    train(words if "off" in flags else [*words, "--table", str(folder / "table")])
    write_bundle(out, out / "bundle")
    return out


def message(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request of the data set as the protocol has it."""
    values = {"user_id": [row["user_id"]], "query_id": [row["query_id"]], "request_ts": [row["ts"]],
              "behavior_ts": row["behavior_ts"]}  # fmt: skip
    for role in ("candidate", "behavior"):
        values[f"{role}_item_id"] = row[f"{role}_item_ids"]
        values[f"{role}_category"] = row[f"{role}_categories"]
    inputs = []
    for name, data in values.items():
        data = [pa.scalar(v, TIME).value for v in data] if name.endswith("_ts") else list(data)
        kind = "BYTES" if name.endswith("category") else "INT64"
        inputs.append({"name": name, "shape": [len(data)], "datatype": kind, "data": data})
    return {"inputs": inputs} | more


def messages(folder: Path) -> list[dict[str, Any]]:
    """The test requests of `folder/data`."""
    return [message(row) for row in pq.read_table(folder / "data" / "requests" / "test").to_pylist()]


def changed(message: dict, tensor: str, **words) -> dict:
    """The message with another tensor of a name."""
    made = copy.deepcopy(message)
    next(given for given in made["inputs"] if given["name"] == tensor).update(words)
    return made


def without(message: dict, name: str) -> dict:
    """The message without a tensor."""
    return {"inputs": [given for given in message["inputs"] if given["name"] != name]}


def output(body: dict[str, Any], name: str = "score") -> list[float]:
    """An output tensor of an answer."""
    return next(o["data"] for o in body["outputs"] if o["name"] == name)


def deployment(folder: Path, **words) -> Deployment:
    return Deployment(**({"bundle": folder / "run" / "bundle", "store": str(folder / "table")} | words))


DEFAULTS = Limits(deadline_ms=60_000, store_timeout_ms=30_000)
"""Machines that run tests are slow at times."""


def application(
    what: Deployment, limits: Limits = DEFAULTS, spans: Spans | None = None, page_of=None, **words
):
    metrics = Metrics(spans=spans)
    service = Service(what, 100, metrics, limits.store_timeout_ms / 1000)
    if page_of is not None:
        words["page"] = page_of(service)
    return make_app(Inference(service, metrics, limits, "mim"), **words), service


@contextmanager
def running(app) -> Iterator[str]:
    """The application behind a port, in a thread of this process; gives its address."""
    settings = uvicorn.Config(app, port=0, http=PatientProtocol, log_level="warning", lifespan="on")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    (listening,) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


COMMAND = ["-m", "mim_torchrec.serving.main", "--port", "0", "--threads", "1",
           "--limits.deadline-ms", "60000"]  # fmt: skip


def start(
    *words: str, python: str | None = None, errors: IO[str] | None = None, **variables: str
) -> tuple[subprocess.Popen, str]:
    """A server of its own, and its address.

    Args:
        words: its flags.
        python: another one than ours, as of `tests.forked`.
        errors: a file for its standard error.
        variables: of its environment.
    """
    server = subprocess.Popen([python or sys.executable, *COMMAND, *words], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=errors, env=os.environ | variables)  # fmt: skip
    line = server.stdout.readline()
    assert "serving mim" in line, line
    return server, line.split()[-1]
