"""Two gloo ranks train the same CTR model as one: same start, same losses, same predictions."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.ciubm.ubm.registry import find_model
from mim_torchrec.ctr.config import PRESETS, CTRConfig
from mim_torchrec.ctr.sharding import build_model, set_sparse_iterations, shard, sparse_iterations
from mim_torchrec.ctr.shrinkage import input_scale, set_scale
from mim_torchrec.ctr.task import CTRTask, load_model, save_model
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.load import load_table, table_digest
from mim_torchrec.embeddings.table.format import Table, TableWriter
from mim_torchrec.training.batch_norm import GlobalBatchNorm1d
from mim_torchrec.training.distributed import distributed
from tests.ranks import run_ranks

STEPS, REQUESTS, ITEMS, MM_DIM = 50, 12, 40, 8
UBMS = ("dien", "bst", "sim", "twin")
SHARDINGS = ("table_wise", "row_wise", "column_wise")
RUNS = (
    "base",
    "mim",
    "features",
    *(SHRUNK := ("shrunk", "kept", "recommended")),
    *UBMS,
    *(f"{kind}:{way}" for kind in ("base", "mim") for way in SHARDINGS),
)
"""Models, some with the way that the planner has to divide their tables."""
EXCHANGES = ("mim:table_wise:fp16", "mim:row_wise:bf16")
"""Likewise, with the precision in which embeddings are exchanged."""
ROWS = {"user_id": 10, "item_id": ITEMS, "category": 5, "interests": 7, "candidate_brand": 6,
        "behavior_action": 4}  # fmt: skip
"""Rows of the embedding tables."""


def make_requests(step: int, first: int, last: int, with_mm: bool, with_features: bool = False):
    """Requests [first, last) of the global batch of a step; ids are rows already."""
    rng = np.random.default_rng(step)
    keys = ["user_id", "candidate_item_id", "behavior_item_id", "candidate_category", "behavior_category"]
    keys += ["candidate_mm", "behavior_mm"] if with_mm else []
    keys += ["interests", "candidate_brand", "behavior_action"] if with_features else []
    values: dict[str, list[int]] = {key: [] for key in keys}
    lengths: dict[str, list[int]] = {key: [] for key in keys}
    labels: list[float] = []
    for request in range(REQUESTS):
        user, candidates = rng.integers(10), rng.integers(ITEMS, size=rng.integers(1, 6))
        behaviors = rng.integers(ITEMS, size=rng.integers(0, 9))
        clicked = (candidates % 2 == user % 2).astype(float)
        if not first <= request < last:
            continue
        labels += clicked.tolist()
        columns = {"user_id": np.array([user]), "interests": behaviors[:3] % 7}
        columns["candidate_brand"], columns["behavior_action"] = candidates % 6, behaviors % 4
        for role, ids in (("candidate", candidates), ("behavior", behaviors)):
            columns[f"{role}_item_id"] = columns[f"{role}_mm"] = ids
            columns[f"{role}_category"] = ids % 5
        for key in keys:
            values[key] += columns[key].tolist()
            lengths[key].append(len(columns[key]))
    count = last - first
    dense = {"request_dense": torch.arange(first, last)[:, None] / (1.0 + step),
             "candidate_dense": torch.tensor(values["candidate_item_id"])[:, None].cos(),
             "behavior_dense": torch.tensor(values["behavior_item_id"])[:, None].sin(),
             "second_labels": torch.tensor(labels) * (torch.tensor(values["candidate_item_id"]) % 3 > 0),
             "weights": 0.5 + torch.tensor(values["candidate_item_id"]) % 3}  # fmt: skip
    return RequestBatch(
        sparse=KeyedJaggedTensor(
            keys=keys,
            values=torch.tensor([v for key in keys for v in values[key]]),
            lengths=torch.tensor([n for key in keys for n in lengths[key]]),
        ),
        labels=torch.tensor(labels),
        request_ids=torch.arange(count),
        request_ts=None,
        behavior_ts=None,
        **(dense if with_features else {}),
    )


def make_vocabularies() -> dict[str, Vocabulary]:
    """Of rows, as if row k had been shown k times."""
    return {
        name: Vocabulary(torch.arange(1, n), n, torch.arange(n), 0.0 if name == "category" else 4.0)
        for name, n in ROWS.items()
    }


def shrunk(batch: RequestBatch, with_mm: bool = False) -> RequestBatch:
    """The batch with factors of rows, and with rows of the multi-modal table."""
    index = ItemIndex(torch.arange(1, ITEMS), capacity=ITEMS - 1) if with_mm else None
    mapped = IdMapper(make_vocabularies(), index, 1.0)(batch)
    ids = batch.sparse.values()
    assert torch.equal(mapped.sparse.values()[: len(ids)], ids)
    return mapped


def train(name: str, folder: Path, context) -> dict[str, object]:

    kind, way, exchange, *_ = [*name.split(":"), "", ""]
    with_mm, with_features = kind in ("mim", "recommended"), kind in ("features", "shrunk", "kept")
    given = kind == "mim", with_features  # of a shrunk model, the mapper brings rows of vectors
    shrink = partial(shrunk, with_mm=with_mm) if kind in SHRUNK else lambda batch: batch
    ubm = name if name in UBMS else "din"
    small = {"heads": 2, "top_k": 3, "max_positions": 4, "attention": (8,), "attention_activation": "dice"}
    model = find_model(ubm)
    config = CTRConfig(
        ubm=ubm, ubm_options=model(**{f.name: small[f.name] for f in fields(model) if f.name in small}),
        recency="order", data=folder, out=folder, mim="on" if with_mm else "off", embedding_dim=8,
        tower=(16, 8), seed=3, lr=1e-2, sparse_lr=0.1, dot_product_features=True, content_projection="linear",
        content_dim=6, sharding=(way,) if way else SHARDINGS[:2],
        exchange_precision=exchange or "fp32",
        sparse_optimizer="adagrad" if way == "column_wise" else "rowwise_adagrad",
        # DIEN's negatives are drawn from the rank's own histories
        aux_weight=0.0 if name == "dien" else 1.0,
        sparse_features=("interests", "candidate_brand", "behavior_action") if with_features else (),
        second_label="purchase" if with_features else None,
        dense_features=("age", "candidate_price", "behavior_price") if with_features else (),
        id_shrinkage=4.0 if kind in SHRUNK else 0.0, normalize_ids=kind != "shrunk",
        id_shrinkage_of={"category": 0.0} if kind in SHRUNK else {}, keep_shrinkage=kind == "kept",
    )  # fmt: skip
    if kind == "recommended":  # without lists of ids, whose weights would be exchanged
        config = replace(config, **PRESETS["recommended"] | {"id_shrinkage": 4.0, "lr": 1e-2})
    table = Table.open(folder / "table") if with_mm else None
    mm = frozen_config(table, ["candidate_mm", "behavior_mm"], name="mm") if table else None
    built = build_model(config, ROWS, mm, torch.device("meta"))
    if config.keep_shrinkage:
        set_scale(built, input_scale(built, make_vocabularies()))
    model, optimizer = shard(built, config, context)
    task = CTRTask(model, optimizer, None, None, None, context, config.aux_weight)
    digests = []
    if table:
        load_table(model.module.mm_embeddings, table, "mm")
        digests.append(table_digest(model.module.mm_embeddings))
    cut = REQUESTS // 3  # an uneven share for each rank
    bounds = {1: [(0, REQUESTS)], 2: [(0, cut), (cut, REQUESTS)]}[context.world_size][context.rank]
    losses = []
    for step in range(STEPS):
        batch = shrink(make_requests(step, *bounds, *given))
        optimizer.zero_grad()
        loss, _ = task.training_forward(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(np.mean(context.all_gather_objects(loss.item()))))
    model.eval()
    with torch.no_grad():
        logits = model(shrink(make_requests(STEPS, *bounds, *given))).logits
    scores = np.concatenate(context.all_gather_objects(logits.numpy()))
    save_model(model, folder / f"{name}-{context.world_size}")
    load_model(model, folder / f"{name}-1")
    with torch.no_grad():
        logits = model(shrink(make_requests(STEPS, *bounds, *given))).logits
    loaded = np.concatenate(context.all_gather_objects(logits.numpy()))
    if table:
        digests.append(table_digest(model.module.mm_embeddings))
    trainable = [parameter for parameter, _ in model.named_parameters() if "mm_embeddings" in parameter]
    # what fused Adam, which has GPU kernels only, counts: the tables' own counters exist for all optimizers
    set_sparse_iterations(model, 41)
    state = task.state.local()
    set_sparse_iterations(model, 0)
    task.state.load_local(state)
    return {
        "losses": losses,
        "scores": scores,
        "loaded": loaded,
        "digests": digests,
        "frozen_parameters": trainable,
        "iterations": sparse_iterations(model),
        "sharding": model.plan.plan["item_embeddings"]["item_id"].sharding_type,
    }


def batch_norm(context) -> torch.Tensor:
    """Output, input gradient and running statistics; with two ranks the first has no row at all."""
    x, upstream = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    mine = slice(0, 7) if context.world_size == 1 or context.rank == 1 else slice(0, 0)
    norm = GlobalBatchNorm1d(3)
    rows = x[mine].clone().requires_grad_()
    out = norm(rows)
    (out * upstream[mine]).sum().backward()
    parts = context.all_gather_objects((out.detach(), rows.grad))
    statistics = torch.stack([norm.running_mean, norm.running_var])
    return torch.cat([torch.cat([o for o, _ in parts]), torch.cat([g for _, g in parts]), statistics])


def train_all(folder: Path) -> dict:
    with distributed(3) as context:
        results = {name: train(name, folder, context) for name in (*RUNS, *EXCHANGES)}
        return results | {"batch_norm": batch_norm(context), "world_size": context.world_size}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("ctr_ranks")
    vectors = torch.randn(ITEMS - 1, MM_DIM, generator=torch.Generator().manual_seed(1))
    writer = TableWriter(folder / "table", table_version="v1", dim=MM_DIM, dtype="float16", encoder={})
    writer.write_shard(torch.arange(1, ITEMS), vectors)
    writer.finish(None)
    return {world_size: run_ranks(train_all, world_size, folder)[0] for world_size in (1, 2)}


def test_the_runs_had_the_ranks_they_are_compared_by(results):
    assert [results[n]["world_size"] for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_loss_curve_of_one(results, name):
    one, two = (np.array(results[n][name]["losses"]) for n in (1, 2))
    np.testing.assert_allclose(two, one, atol=1e-4)


@pytest.mark.parametrize("name", EXCHANGES)
def test_embeddings_that_travel_in_half_the_bytes_train_nearly_the_same(results, name):
    exact, two = (np.array(results[2][each]["losses"]) for each in (name.rpartition(":")[0], name))
    assert (two != exact).any()
    np.testing.assert_allclose(two[:5], exact[:5], atol=2e-3)
    np.testing.assert_allclose(two, exact, atol=0.05)  # roundings add up


@pytest.mark.parametrize("name", EXCHANGES)
def test_one_rank_exchanges_and_rounds_nothing(results, name):
    assert results[1][name]["losses"] == results[1][name.rpartition(":")[0]]["losses"]


@pytest.mark.parametrize("way", SHARDINGS)
@pytest.mark.parametrize("kind", ["base", "mim"])
def test_tables_are_divided_as_asked_for_and_whole_on_one_rank(results, kind, way):
    assert results[2][f"{kind}:{way}"]["sharding"] == way
    assert results[1][f"{kind}:{way}"]["sharding"] == "table_wise"


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls(results, name):
    losses = results[1][name]["losses"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_predict_what_one_predicts(results, name):
    np.testing.assert_allclose(results[2][name]["scores"], results[1][name]["scores"], atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_load_the_checkpoint_of_one(results, name):
    np.testing.assert_allclose(results[2][name]["loaded"], results[1][name]["scores"], atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_leaves_the_frozen_table_unchanged(results, world_size):
    before, after = results[world_size]["mim"]["digests"]
    assert before == after


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_frozen_table_is_not_a_parameter(results, world_size):
    assert results[world_size]["mim"]["frozen_parameters"] == []


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_holds_the_count_of_the_tables_optimizers(results, world_size, name):
    assert results[world_size][name]["iterations"] == 41


def test_batch_norm_of_uneven_ranks_is_that_of_one(results):
    torch.testing.assert_close(results[2]["batch_norm"], results[1]["batch_norm"], atol=1e-5, rtol=1e-4)
