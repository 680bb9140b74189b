"""What runs and pipelines leave on disk, for `disk_faults`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from mim_torchrec.benchmarks.harness.fault_injection import ABSENT, Writer
from mim_torchrec.csft.image_search import write as write_retrieval
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.predictions import PredictionFile
from mim_torchrec.ctr.vocabularies import load_vocabularies, scan_vocabularies
from mim_torchrec.data.query_images import QueryImages
from mim_torchrec.data.schema import PAIRS, REQUESTS, Dataset
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.embeddings.remote.fetching import CACHE, fetched
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.pipeline.records import DONE, RUNNING, Record, Records
from mim_torchrec.pipeline.spec import Pipeline
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.config import CheckpointConfig
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.history import History, HistoryFile, read_history
from mim_torchrec.training.lease import Lease
from mim_torchrec.training.model_record import check_model_record, write_model_record
from mim_torchrec.training.run_directory import RunDirectory
from mim_torchrec.training.sharded_state import damage, save_state, seal
from mim_torchrec.training.shared_directory import shared_atomic_directory
from mim_torchrec.training.state import TrainingState

ONE = DistributedContext(0, 1, torch.device("cpu"))


def tree(folder: Path) -> object:
    """Names and digests of everything in a directory, or the digest of a file."""
    if not folder.exists():
        return ABSENT
    if folder.is_file():
        return hashlib.sha256(folder.read_bytes()).hexdigest()
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def run_writers() -> Iterator[Writer]:
    """What a run leaves."""

    def state(value: float) -> TrainingState:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters())
        return TrainingState(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))

    def checkpoints(root: Path) -> Checkpoints:
        return Checkpoints(
            root / "checkpoints", CheckpointConfig(keep=1, asynchronous=False), {}, ONE, {"m": 1}
        )

    def save(step: int) -> Callable[[Path], None]:
        return lambda root: checkpoints(root).save(state(step), 0, step, {"step": step})

    def restored(root: Path) -> object:
        into = state(-1.0)
        found = checkpoints(root).restore(into)
        return found, float(into._model.get_parameter("weight").detach().sum())

    def best(value: float) -> Callable[[Path], None]:
        def write(root: Path) -> None:
            with shared_atomic_directory(root / "best", ONE) as folder:
                save_state({"w": torch.full((4,), value)}, folder)
                write_model_record(folder, {"value": value})
                seal(folder)

        return write

    def read_best(root: Path) -> object:
        if (problem := damage(root / "best")) is not None:
            raise ValueError(problem)
        value = json.loads((root / "best" / "model.json").read_text())["model"]["value"]
        check_model_record(root / "best", {"value": value})
        return value

    def results(value: int) -> Callable[[Path], None]:
        def write(root: Path) -> None:
            run = RunDirectory(root)
            file = PredictionFile(run.predictions, ONE)
            for _ in file.written([{"score": np.full(100, float(value))}]):
                pass
            run.write_results({"auc": value}, ONE, file.joined())

        return write

    def read_results(root: Path) -> object:
        metrics, predictions = RunDirectory(root).read_results()
        return metrics["auc"], pq.read_table(predictions)["score"][0].as_py()

    def promotable(root: Path) -> None:
        for name, value in (("encoder", "old"), ("best", "new")):
            (root / name).mkdir()
            (root / name / "w").write_text(value)

    def history(steps: int) -> Callable[[Path], None]:
        def write(root: Path) -> None:
            file = HistoryFile(root / "h", History(num_steps=steps - 1))
            file.add_step({"step": steps, "epoch": 0, "loss": 1.0}, flush=True)
            file.sync()
            file.close()

        return write

    def lease(root: Path) -> None:
        mine = Lease(root / "lease.json", expiry=0.0)  # who was killed here has the number of this process
        mine.take()
        mine.give_back()
        (root / "ended").touch()

    def retrieval(value: int) -> Callable[[Path], None]:
        return lambda root: write_retrieval({"recall": value}, Image.new("RGB", (4, 4)), root)

    yield Writer("checkpoint", save(1), save(2), restored)
    yield Writer("best weights", best(1.0), best(2.0), read_best)
    yield Writer("config.json", lambda r: RunDirectory(r).begin({"lr": 1}, CheckpointConfig(), ONE),
                 lambda r: RunDirectory(r).begin({"lr": 2}, CheckpointConfig(), ONE),
                 lambda r: RunDirectory(r).read_config())  # fmt: skip
    yield Writer("metrics and predictions", results(1), results(2), read_results)
    yield Writer("encoder of a finished run", promotable,
                 lambda r: RunDirectory(r).promote_best("encoder", ONE),
                 lambda r: (r / "encoder" / "w").read_text())  # fmt: skip
    yield Writer("history", history(1), history(2), lambda r: len(read_history(r / "h").steps))
    yield Writer("lease", lambda r: None, lease, lambda r: (r / "ended").exists())
    yield Writer("retrieval", retrieval(1), retrieval(2),
                 lambda r: (json.loads((r / "retrieval.json").read_text()),
                            Image.open(r / "retrieval.png").size))  # fmt: skip


def input_writers() -> Iterator[Writer]:
    """What a run makes of its inputs: ids, an index, copies of what lies in an object store."""

    def data(root: Path) -> None:
        row = {"request_id": 1, "user_id": 5, "behavior_item_ids": [3], "candidate_item_ids": [4, 6],
               "labels": [0, 1]}  # fmt: skip
        pairs = [{"query_id": k, "item_id": k, "query_image": b"i"} for k in range(3)]
        with DatasetWriter(root / "data", name="d", source={}) as writer:
            for folder, rows, schema in (("requests/train", [row], REQUESTS), ("pairs", pairs, PAIRS)):
                fields = [field for field in schema if field.name in rows[0]]
                writer.write(folder, pa.Table.from_pylist(rows, pa.schema(fields)))

    def ids(root: Path) -> object:
        config = CTRConfig(data=root / "data", out=root / "run", mim="off", id_cache=root / "ids")
        return scan_vocabularies(Dataset(root / "data"), config, ONE, resumes=False)

    def found_ids(root: Path) -> object:
        if not RunDirectory(root / "run").vocabulary.exists():
            return ABSENT
        return {name: one.ids.tolist() for name, one in load_vocabularies(root / "run").items()}

    def index(root: Path) -> object:
        files = Dataset(root / "data").pairs()
        return QueryImages([(file, 0) for file in files], root / "index")

    def publish(root: Path) -> None:
        for name in ("a", "sub/b"):
            (Url("memory://faults/table") / name).write_bytes(name.encode() * 3000)

    def fetch(root: Path) -> None:
        with mock.patch.dict(os.environ, {CACHE: str(root / "cache")}):
            fetched("memory://faults/table")

    def copies(root: Path) -> object:
        return [tree(folder) for folder in root.glob("cache/fetched/*/table")]

    yield Writer("ids of the requests", data, ids, found_ids)
    yield Writer("index of query images", data, index, lambda r: tree(r / "index" / "pairs.arrow"))
    yield Writer("fetched input", publish, fetch, copies)


def pipeline_writers() -> Iterator[Writer]:
    """What `mim pipeline` knows of its stages."""

    def records(state: str) -> Callable[[Path], None]:
        def write(root: Path) -> None:
            own = Records(root)
            own.begin(
                Pipeline.model_validate({"name": "p", "stages": {"shop": {"command": f"shop {state}"}}})
            )
            own.write("shop", Record(digest=state, fingerprint={}, state=state, scheduler="s", mark="m"))

        return write

    def read(root: Path) -> object:
        own = Records(root)
        record = own.read("shop")
        own.pipeline()
        return None if record is None else (record.state, record.digest)

    yield Writer("records of a pipeline", records(RUNNING), records(DONE), read)
