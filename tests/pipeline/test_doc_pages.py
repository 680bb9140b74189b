"""Every command and program in the tutorials runs, in the order of the page."""

import json
from pathlib import Path

import pytest
import torch

from mim_torchrec.benchmarks.harness.redis_server import free_port
from mim_torchrec.csft.main import main as csft
from mim_torchrec.ctr.main import main as train
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.representation.export import main as export
from tests.doc_pages import run_page
from tests.pipeline.test_ctr_main import SMALL
from tests.programs import TINY_TOWERS, small_shop, words

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with a tiny result in the layout of `make demo`."""
    root = tmp_path_factory.mktemp("checkout")
    demo = root / "runs" / "demo"
    demo.mkdir(parents=True)
    shop = small_shop(demo)
    csft(words(shop, demo / "csft", TINY_TOWERS, epochs="1", batch_size="64"))
    export(["--data", str(shop), "--encoder", str(demo / "csft" / "encoder"), "--out", str(demo / "table")])
    ids = Table.open(demo / "table").row_index().ids
    plain = TableWriter(demo / "table-plain", table_version="plain", dim=8, encoder={})
    plain.write_shard(ids, torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(0)))
    plain.finish()
    for run, table in (("mim", "table"), ("plain", "table-plain")):
        train(["--data", str(shop), "--table", str(demo / table), "--out", str(demo / "ctr" / run), *SMALL])
    return root


def test_new_items_and_serving(checkout, forked, redis_server):
    port = free_port()
    out = run_page("new_items_and_serving.md", checkout, forked, {
        "mim serve": f"mim serve --port {port}",
        "localhost:8080": f"localhost:{port}",
        "redis://127.0.0.1:6379": redis_server.url,
    })  # fmt: skip
    assert json.loads((checkout / "runs" / "rim" / "rim.json").read_text())["items"] == 200
    # 150 items of the table, 200 new ones, and the two deleted ones, which this table does not have
    assert '"rows": 352, "missing": 0, "surplus": 0, "wrong": 0' in out
    answer, _ = json.JSONDecoder().raw_decode(out[out.index('{"model_name"') :])
    scores = {tensor["name"]: tensor["data"] for tensor in answer["outputs"]}
    assert all(0 < score < 1 for score in scores["score"]) and any(scores["content_contribution"])
    assert answer["parameters"]["unknown_vector"] == 0
    assert '"missing": 200' in out and "monday is current again" in out


def test_readme_looks_vectors_up(checkout, forked):
    assert "torch.Size([2, 16])" in run_page("../README.md", checkout, forked)


def test_pipeline(forked, tmp_path):
    printed = run_page("pipeline.md", tmp_path, forked)
    assert "base: done" in printed and "validation: done" in printed
    report = json.loads((tmp_path / "runs" / "small" / "pipeline" / "report.json").read_text())
    assert report["state"] == "done" and report["stages"]["twin"]["metrics"]["auc"] > 0


def test_quickstart(forked, tmp_path):
    run_page("quickstart.md", tmp_path, forked)
    metrics = json.loads((tmp_path / "runs" / "mim" / "metrics.json").read_text())
    assert metrics["table"] is not None
    assert list((tmp_path / "runs" / "mim-validation").iterdir())


def test_own_data(forked, tmp_path):
    run_page("tutorials/own_data.md", tmp_path, forked)
    auc = {run: json.loads((tmp_path / "runs" / run / "metrics.json").read_text())["auc"]
           for run in ("my-base", "my-mim")}  # fmt: skip
    assert auc["my-mim"] > auc["my-base"]


def test_your_own_logs(forked, tmp_path):
    port = free_port()
    printed = run_page("tutorials/your_own_data.md", tmp_path, forked, {
        "mim serve": f"mim serve --port {port}",
        "localhost:8080": f"localhost:{port}",
    })  # fmt: skip
    assert "'too_young_for_their_label'" in printed
    assert json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())["auc"] > 0.6
    answer, _ = json.JSONDecoder().raw_decode(printed[printed.index('{"model_name"') :])
    assert [len(tensor["data"]) for tensor in answer["outputs"]] == [5]


def test_updates_of_a_frozen_table(forked, tmp_path):
    run_page("frozen_tables_manual.md", tmp_path, forked)


def test_a_frozen_table_in_a_torchrec_model(forked, tmp_path):
    assert run_page("frozen_tables.md", tmp_path, forked).count("loss 0.") == 2


def test_a_new_behavior_model(forked, tmp_path):
    run_page("tutorials/behavior_model.md", tmp_path, forked)
    config = json.loads((tmp_path / "runs" / "dot-attention" / "config.json").read_text())
    assert config["ubm"] == "my_models:DotAttentionOptions" and config["ubm_options"] == {"scale": 1.0}


def test_a_cluster(forked, tmp_path):
    out = run_page("cluster.md", tmp_path, forked, {"localhost:29400": f"localhost:{free_port()}"})
    assert out.count("--nproc_per_node 8") >= 1 and "FAIL" not in out
    assert "2 ranks summed a number on cpu" in out
    assert (
        out.count("apiVersion: batch.volcano.sh/v1alpha1") == 2 and out.count("apiVersion: batch/v1\n") == 1
    )
    for run in ("two-ranks", "two-nodes"):
        metrics = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())
        assert (metrics["mim"], metrics["world_size"]) == ("off", 2)
    assert not (tmp_path / "runs" / "slurm").exists()
