"""The comparison with FuxiCTR through its `main`, on a few requests; what is fast is not asked here."""

import json

import pytest
import torch

from mim_torchrec.benchmarks.measures.training_steps import make_batch
from mim_torchrec.benchmarks.measures.turns import in_turns
from mim_torchrec.benchmarks.speed import fuxictr_models
from mim_torchrec.benchmarks.speed.ctr_throughput import MODELS, ThroughputConfig, main

pytestmark = pytest.mark.slow


SMALL = ["--dims", "4", "--candidates", "1", "2", "--batch-size", "8", "--users", "20", "--items", "50",
         "--categories", "5", "--mm-dim", "8", "--batches", "2", "--rounds", "2", "--warmup", "1",
         "--attention", "4", "--tower", "8", "4", "--top-k", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("throughput")
    threads = torch.get_num_threads()
    main(["--out", str(out), *SMALL])
    assert torch.get_num_threads() == threads
    assert "FuxiCTR" in (out / "report.html").read_text()
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("part", ["models", "models_2_candidates"])
def test_every_model_has_its_figures_by_dim(report, part):
    assert list(report[part]) == list(MODELS)
    for by_dim in report[part].values():
        assert set(by_dim["4"]) == {"ours", "fuxictr", "ratio"}
        assert min(by_dim["4"].values()) > 0


def test_what_mim_adds_is_counted(report):
    overhead = report["mim_overhead"]
    expected = overhead["mim_gflops_per_sample"] / overhead["base_gflops_per_sample"] - 1
    assert overhead["flops"] == pytest.approx(expected) and expected > 0


def test_every_target_is_compared_with_its_figure(report):
    met = {entry["claim"]: entry["met"] for entry in report["targets"]}
    assert len(met) == len(MODELS) + 2
    assert met["din, dim 4: at least 2.0 times FuxiCTR's samples per CPU-second"] == (
        report["models"]["din"]["4"]["ratio"] >= 2
    )


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_get_the_same_samples(name):
    config = ThroughputConfig(batch_size=12, items=50, categories=5, users=20, max_behaviors=50)
    batch = make_batch(config, 3, 0, mm=False)
    users, items, mask = fuxictr_models.to_batch(batch, name)
    sparse = batch.sparse
    rows = {column: ids.view(12, -1) for column, ids in items.items()}
    histories = sparse["behavior_item_id"].to_dense()
    for k in range(12):
        request = k // 3
        assert rows["item_id"][k, :-1][mask[k].bool()].tolist() == histories[request].tolist()
        assert rows["item_id"][k, -1] == sparse["candidate_item_id"].values()[k]
        assert rows["category"][k, -1] == sparse["candidate_category"].values()[k]
        assert users["user_id"][k] == sparse["user_id"].values()[request]
        assert not rows["item_id"][k, :-1][~mask[k].bool()].any()


def test_steps_take_turns_and_the_first_rounds_are_not_counted():
    called = []
    seconds = in_turns([lambda k: called.append(("a", k)), lambda k: called.append(("b", k))], 2, 1)
    assert [len(times) for times in seconds] == [2, 2]
    assert called == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
