"""Each stage with URLs of an object store for its data, its inputs and its results, against local runs."""

import json
import os
from pathlib import Path

import pytest

from mim_torchrec.csft.main import main as csft
from mim_torchrec.csft.retrieve import main as retrieve
from mim_torchrec.ctr.choosing import main as choose
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train_ctr
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.embeddings.remote.lease import StoreLease
from mim_torchrec.embeddings.remote.places import StoreError, Url
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.errors import OutputExists
from mim_torchrec.representation.export import main as export
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.bundling import main as bundle
from tests.object_store import contents, upload
from tests.programs import TINY_TOWERS, small_shop, words
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.slow

CSFT = {**TINY_TOWERS, "epochs": "2", "batch-size": "32"}
CTR = {"epochs": "2", "batch-size": "64", "dropout": "0.2", "checkpoint.every": "1", "log-every": "1"}
TIMED = {"seconds", "startup_seconds", "samples_per_s", "data_wait", "peak_memory_gib"}


def facts(data: bytes) -> dict:
    """JSON without what differs from run to run, and without where things lie."""
    found = json.loads(data)
    return {
        name: value for name, value in found.items() if name not in {*TIMED, "data", "model", "checkpoint"}
    }


def lines(data: bytes) -> list[dict]:
    found = [json.loads(line) for line in data.decode().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in found]


def train_on_rank(environment: dict[str, str], command: list[str]) -> None:
    os.environ.update(environment)  # the server that starts ranks has another
    train_ctr(command)


def train(command: list[str], ranks: int = 2) -> None:
    names = ("MIM_CACHE", *(name for name in os.environ if name.startswith("AWS_")))
    run_ranks(train_on_rank, ranks, {name: os.environ[name] for name in names}, command)


@pytest.fixture
def shop(tmp_path) -> Path:
    return small_shop(tmp_path, searches=60, requests=100, users=40)


def test_stages_give_the_bytes_of_local_runs(object_store, store_url, shop, tmp_path):
    small_shop_at(store_url)
    assert contents(f"{store_url}/shop") == {
        path.relative_to(shop).as_posix(): path.read_bytes() for path in shop.rglob("*") if path.is_file()
    }
    for at in (tmp_path, store_url):
        csft(words(f"{at}/shop", f"{at}/csft", CSFT))
        export(["--data", f"{at}/shop", "--encoder", f"{at}/csft/encoder", "--out", f"{at}/table"])
        command = words(f"{at}/shop", f"{at}/ctr", CTR, table=f"{at}/table")
        train(command)
        evaluate(["--model", f"{at}/ctr", "--out", f"{at}/evaluation", "--draws", "2"])
        bundle(["--run", f"{at}/ctr", "--out", f"{at}/bundle"])
        choose([f"{at}/ctr", "--out", f"{at}/choice"])
        retrieve(["--data", f"{at}/shop", "--encoder", f"{at}/csft/encoder", "--out", f"{at}/found"])

    ours = contents(f"{store_url}/csft")
    for file in ("encoder/model.safetensors", "encoder/config.json", "retrieval.json", "retrieval.png"):
        assert ours[file] == (tmp_path / "csft" / file).read_bytes(), file
    assert not [path for path in ours if path.startswith(("items/", "features/", "best/"))]

    table, remote = tmp_path / "table", contents(f"{store_url}/table")
    shards = [path.name for path in table.glob("*.safetensors")]
    assert sorted(remote) == sorted([*shards, "manifest.json"])
    assert all(remote[name] == (table / name).read_bytes() for name in shards)

    ours = contents(f"{store_url}/ctr")
    assert ours["predictions.parquet"] == (tmp_path / "ctr" / "predictions.parquet").read_bytes()
    assert lines(ours["history.jsonl"]) == lines((tmp_path / "ctr" / "history.jsonl").read_bytes())
    assert facts(ours["metrics.json"]) == facts((tmp_path / "ctr" / "metrics.json").read_bytes())
    assert json.loads(ours["config.json"])["data"] == f"{store_url}/shop"

    ours = contents(f"{store_url}/evaluation")
    assert ours["predictions.parquet"] == (tmp_path / "evaluation" / "predictions.parquet").read_bytes()
    assert facts(ours["metrics.json"]) == facts((tmp_path / "evaluation" / "metrics.json").read_bytes())
    assert json.loads(ours["metrics.json"])["checkpoint"] == f"{store_url}/ctr/best"
    assert json.loads(contents(f"{store_url}/choice")["best.json"])["run"] == f"{store_url}/ctr"
    assert (
        contents(f"{store_url}/found")["retrieval.png"] == (tmp_path / "found" / "retrieval.png").read_bytes()
    )

    local, fetched_bundle = Bundle.open(tmp_path / "bundle"), Bundle.open(Url(f"{store_url}/bundle"))
    assert fetched_bundle.model_version == local.model_version
    assert (
        contents(f"{store_url}/bundle")["dense.safetensors"]
        == (tmp_path / "bundle" / "dense.safetensors").read_bytes()
    )
    with pytest.raises(OutputExists):
        export(["--data", f"{store_url}/shop", "--encoder", f"{store_url}/csft/encoder",
                "--out", f"{store_url}/table"])  # fmt: skip


def small_shop_at(url: str) -> None:
    from mim_torchrec.data.shop import main as make_shop

    sizes = {"items": 150, "searches": 60, "requests": 100, "users": 40, "seed": 0, "browsing": 300,
             "categories": 3, "image-size": 32}  # fmt: skip
    make_shop(["--out", f"{url}/shop", *(w for k, v in sizes.items() for w in (f"--{k}", str(v)))])


def test_a_run_goes_on_from_the_store_in_an_empty_cache(object_store, store_url, shop, tmp_path, monkeypatch):
    local = tmp_path / "whole"
    command = words(shop, local, CTR, mim="off")
    train(command)
    command = words(shop, f"{store_url}/run", CTR, mim="off")
    object_store.refuse = r"/checkpoints/epoch-0001-step-00000001/state/\.metadata"
    with pytest.raises(RankError, match="access denied"):
        train(command)
    object_store.refuse = None
    left = contents(f"{store_url}/run")
    newest = max(path.split("/")[1] for path in left if path.startswith("checkpoints/"))
    assert newest == "epoch-0001-step-00000000"
    assert "metrics.json" not in left

    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "another-host"))
    train(command)
    ours = contents(f"{store_url}/run")
    assert ours["predictions.parquet"] == (local / "predictions.parquet").read_bytes()
    assert lines(ours["history.jsonl"]) == lines((local / "history.jsonl").read_bytes())
    assert len({path.split("/")[1] for path in ours if path.startswith("checkpoints/")}) == 2


def test_a_second_run_is_refused_by_the_name_of_the_first(object_store, store_url, shop):
    lease = StoreLease(Url(f"{store_url}/run"))
    lease.take()
    try:
        with pytest.raises(LeaseError, match=f"{store_url}/run is written by process {os.getpid()}"):
            train_ctr(words(shop, f"{store_url}/run", CTR, mim="off"))
    finally:
        lease.give_back()


def test_what_other_tools_put_there_is_read(object_store, store_url, shop, tmp_path):
    upload(shop, f"{store_url}/shop")
    files = Dataset(f"{store_url}/shop").items()
    assert [file.name for file in files] == [file.name for file in Dataset(shop).items()]
    csft(words(f"{store_url}/shop", tmp_path / "csft", CSFT, epochs="1"))
    export(["--data", str(shop), "--encoder", str(tmp_path / "csft" / "encoder"), "--out",
            str(tmp_path / "table")])  # fmt: skip
    upload(tmp_path / "table", f"{store_url}/table")
    assert Table.open(f"{store_url}/table").manifest == Table.open(tmp_path / "table").manifest
    with pytest.raises(OutputExists, match="by other means"):
        train_ctr(words(shop, f"{store_url}/table", CTR, mim="off"))


def test_a_refused_put_leaves_the_bundle_before(object_store, store_url, shop, tmp_path):
    train_ctr(words(shop, tmp_path / "run", CTR, mim="off", epochs="1"))
    bundle(["--run", str(tmp_path / "run"), "--out", f"{store_url}/bundle"])
    before = contents(f"{store_url}/bundle")
    train_ctr(words(shop, tmp_path / "other", CTR, mim="off", epochs="1", seed="1"))
    object_store.refuse = r"/tables/item_id/manifest"
    with pytest.raises(StoreError, match="access denied"):
        bundle(["--run", str(tmp_path / "other"), "--out", f"{store_url}/bundle"])
    assert contents(f"{store_url}/bundle") == before
    assert Bundle.open(f"{store_url}/bundle").load()[0] is not None
