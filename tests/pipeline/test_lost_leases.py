"""A process whose lease another one has taken over is refused by its name, and writes nothing more."""

import os
import re
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mlflow import MlflowClient

from mim_torchrec.csft import retrieve
from mim_torchrec.ctr import vocabularies
from mim_torchrec.ctr.main import main as train
from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.embeddings.remote.fetching import working_directory
from mim_torchrec.embeddings.remote.lease import StoreLease
from mim_torchrec.embeddings.remote.outputs import withdraw, written
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.remote.published import Publisher
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.pipeline import overview, submission
from mim_torchrec.pipeline.main import main
from mim_torchrec.pipeline.tracking import Tracker
from mim_torchrec.representation.export import main as export
from mim_torchrec.training.config import CheckpointConfig
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.lease import Lease, leased_for_all_ranks
from mim_torchrec.training.run_directory import RunDirectory
from tests.object_store import contents
from tests.pipeline.test_ctr_main import SMALL, write_dataset
from tests.pipeline.test_export_main import encoder, write_items  # noqa: F401
from tests.pipeline_steps import Steps, tagged
from tests.programs import small_shop
from tests.ranks import run_ranks

ONE = DistributedContext(0, 1, torch.device("cpu"))
SUCCESSOR = f"was replaced by process {os.getpid()} on .*Nothing more is written"


@pytest.fixture
def lose(monkeypatch):
    """Lets a call of a method or function end with another holder of a lease; returns that holder."""

    def prepare(owner, name: str, file: Path, also=lambda: None) -> Lease:
        successor, original = Lease(file, expiry=-3600), getattr(owner, name)

        def losing(*args, **words):
            result = original(*args, **words)
            monkeypatch.setattr(owner, name, original)
            successor.take()
            also()
            return result

        monkeypatch.setattr(owner, name, losing)
        return successor

    return prepare


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Steps(tmp_path)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_pipeline_ends_its_jobs_and_leaves_records_and_report_to_its_successor(steps, monkeypatch, lose):
    tag = uuid.uuid4().hex
    monkeypatch.setenv("TAG", tag)
    main(steps.write("[stages.a]\nstep = true\n"))
    found: dict[str, bytes] = {}
    fifo = steps.folder / "started"
    os.mkfifo(fifo)

    def started() -> None:
        assert fifo.read_text() == "ready"
        found.update(files(steps.out / "stages") | files(steps.out / "pipeline"))

    successor = lose(submission.Submitter, "submit", steps.out / "pipeline" / "lease.json", started)
    with pytest.raises(LeaseError, match=SUCCESSOR):
        main(steps.write(f'[stages.a]\nstep = true\nflags = {{ child = 1, ready = "{fifo}" }}\n'))
    assert tagged(tag) == []
    successor.check()
    left = files(steps.out / "stages") | files(steps.out / "pipeline")
    assert left == found and '"submitted"' in left["a.json"].decode()
    assert steps.report()["state"] == "done"
    successor.give_back()


def test_a_second_pipeline_leaves_that_of_the_first_as_it_is(steps):
    main(steps.write("[stages.a]\nstep = true\n"))
    first = Lease(steps.out / "pipeline" / "lease.json")
    first.take()
    before = files(steps.out)
    with pytest.raises(LeaseError, match="is written by process"):
        main(steps.write("[stages.b]\nstep = true\n"))
    assert files(steps.out) == before
    first.give_back()


def test_a_cancellation_leaves_records_to_its_successor(steps, monkeypatch, lose, capsys):
    main(steps.write("[stages.a]\nstep = true\n"))
    file = steps.out / "stages" / "a.json"
    file.write_text(file.read_text().replace('"done"', '"running"'))
    before = file.read_bytes()
    monkeypatch.setattr(overview, "PATIENCE", -1.0)
    successor = lose(submission, "cancel", steps.out / "pipeline" / "lease.json")
    with pytest.raises(LeaseError, match=SUCCESSOR):
        main(["cancel", str(steps.out)])
    assert file.read_bytes() == before
    successor.give_back()


def test_a_request_to_cancel_stays_until_the_process_that_is_asked_has_ended(steps, monkeypatch):
    main(steps.write("[stages.a]\nstep = true\n"))
    running, requests = Lease(steps.out / "pipeline" / "lease.json"), []
    running.take()

    def sleep(seconds: float) -> None:
        requests.append((steps.out / "pipeline" / "cancel").exists())
        if len(requests) == 3:
            running.give_back()

    monkeypatch.setattr(overview.time, "sleep", sleep)
    main(["cancel", str(steps.out)])
    assert requests == [True] * 3 and not (steps.out / "pipeline" / "cancel").exists()


def test_a_pipeline_writes_nothing_more_into_mlflow(steps, lose):
    uri = f"sqlite:///{steps.folder}/mlflow.db"
    successor = lose(Tracker, "_find_parent", steps.out / "pipeline" / "lease.json")
    with pytest.raises(LeaseError, match=SUCCESSOR):
        main([*steps.write("[stages.a]\nstep = true\n"), "--mlflow", uri])
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("steps")
    assert experiment is not None
    assert [run.info.run_name for run in client.search_runs([experiment.experiment_id])] == ["steps"]
    successor.give_back()


@pytest.mark.parametrize("point", ["write_shard", "__init__"])
def test_an_export_writes_no_shard_and_no_table_more(tmp_path, encoder, lose, point):  # noqa: F811
    data, out = write_items(tmp_path / "data"), tmp_path / "table"
    successor = lose(TableWriter, point, Path(f"{out}.lease.json"))
    with pytest.raises(LeaseError, match=SUCCESSOR):
        export(["--data", str(data), "--encoder", str(encoder[0]), "--batch-size", "4", "--shard-rows", "6",
                "--out", str(out)])  # fmt: skip
    assert not out.exists()
    shards = sorted(path.name for path in tmp_path.glob("table.partial/shard-*"))
    assert shards == (["shard-00000-00000.safetensors"] if point == "write_shard" else [])
    successor.check()
    successor.give_back()


def look_on_both_ranks(file: Path) -> tuple[bool, str]:
    context = DistributedContext(dist.get_rank(), 2, torch.device("cpu"))
    with leased_for_all_ranks(file, context) as lease:
        lease.check()
        context.barrier()
        successor = Lease(file, expiry=-3600)
        if not context.is_main:
            successor.take()
        context.barrier()
        try:
            lease.check()
            return False, ""
        except LeaseError as error:
            said = str(error)
        context.barrier()
        if not context.is_main:
            successor.give_back()
        return True, said


def test_every_rank_sees_that_the_lease_of_rank_0_is_lost(tmp_path):
    found = run_ranks(look_on_both_ranks, 2, tmp_path / "lease.json")
    assert [lost for lost, _ in found] == [True, True]
    assert all(re.search("was replaced by process", said) for _, said in found)


def test_a_run_from_scratch_removes_nothing_of_its_successor(tmp_path):
    run, successor = RunDirectory(tmp_path), Lease(tmp_path / "lease.json", expiry=-3600)
    with pytest.raises(LeaseError, match=SUCCESSOR), run.writing(ONE):
        run.metrics.write_text("{}")
        successor.take()
        run.begin({"lr": 1}, CheckpointConfig(), ONE)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "lease.json"}
    successor.give_back()


def test_training_writes_no_vocabulary_of_its_successor(tmp_path, lose):
    write_dataset(tmp_path / "data")
    successor = lose(vocabularies, "_scan", tmp_path / "run" / "lease.json")
    with pytest.raises(LeaseError, match=SUCCESSOR):
        train(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *SMALL, "--mim", "off"])
    assert not (tmp_path / "run" / "vocabulary").exists()
    successor.give_back()


def test_a_search_writes_no_report_of_its_successor(tmp_path, encoder, lose):  # noqa: F811
    shop = small_shop(tmp_path / "shop", items=200, searches=400)
    successor = lose(retrieve, "find", tmp_path / "run" / "lease.json")
    with pytest.raises(LeaseError, match=SUCCESSOR):
        retrieve.main(["--data", str(shop), "--encoder", str(encoder[0]), "--out", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("retrieval.*"))
    successor.give_back()


def test_what_was_uploaded_for_long_is_not_published_over_a_successor(store_url, monkeypatch):
    url, successor, upload = Url(store_url), StoreLease(Url(store_url), expiry=-3600), Publisher.upload_all

    def lasting(self, root, leave_out=()):
        upload(self, root, leave_out)
        successor.take()

    monkeypatch.setattr(Publisher, "upload_all", lasting)
    with pytest.raises(LeaseError, match=SUCCESSOR), written(url) as folder:
        folder.mkdir()
        (folder / "a").write_bytes(b"late")
    assert contents(store_url) == {}
    assert (working_directory(url) / "a").read_bytes() == b"late"  # it may be that of the successor
    successor.check()
    successor.give_back()


def test_what_a_successor_published_is_not_withdrawn(store_url, monkeypatch):
    url, successor, take = Url(store_url), StoreLease(Url(store_url), expiry=-3600), StoreLease.take
    with written(url) as folder:
        folder.mkdir()
        (folder / "a").write_bytes(b"there")

    def losing(self):
        take(self)
        if self is not successor:
            successor.take()

    monkeypatch.setattr(StoreLease, "take", losing)
    with pytest.raises(LeaseError, match=SUCCESSOR):
        withdraw(url)
    assert contents(store_url) == {"a": b"there"}
    successor.give_back()
