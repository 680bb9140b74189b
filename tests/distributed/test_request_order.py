"""Features of requests reach the tower in one order, on whichever ranks their tables lie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.ctr.task import CTRTask, load_model, save_model
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.training.distributed import distributed
from tests.ranks import run_ranks

REQUESTS, STEPS = 24, 5
ROWS = {"user_id": 90_000, "query_id": 100_000, "item_id": 50}
"""The planner puts the largest table on the first rank, so two ranks return queries before users."""
KINDS = ("plain", "shrunk")


def make_batch(step: int, first: int, last: int) -> RequestBatch:
    """Requests [first, last) of a step, with one candidate and one behavior each."""
    rng = np.random.default_rng(step)
    ids = {name: rng.integers(1, 50, REQUESTS) for name in ("user_id", "query_id", "candidate_item_id")}
    ids["behavior_item_id"] = rng.integers(1, 50, REQUESTS)
    labels = (ids["user_id"] + 3 * ids["query_id"]) % 5 < 2
    own = slice(first, last)
    return RequestBatch(
        sparse=KeyedJaggedTensor(
            keys=list(ids),
            values=torch.from_numpy(np.concatenate([values[own] for values in ids.values()])),
            lengths=torch.ones(len(ids) * (last - first), dtype=torch.int32),
        ),
        labels=torch.from_numpy(labels[own]).float(),
        request_ids=torch.arange(first, last),
    )


def mapper(kind: str) -> IdMapper:
    k = 4.0 if kind == "shrunk" else 0.0
    return IdMapper(
        {name: Vocabulary(torch.arange(1, n), n, torch.arange(n), k) for name, n in ROWS.items()}, None, 1.0
    )


def train(kind: str, folder: Path, context) -> dict[str, object]:
    config = CTRConfig(data=folder, out=folder, mim="off", recency="order", tower=(16, 8), sparse_lr=0.5)
    if kind == "shrunk":
        config = replace(config, id_shrinkage=4.0)
    model, optimizer = shard(build_model(config, ROWS, None, torch.device("meta")), config, context)
    task, mapped = CTRTask(model, optimizer, None, None, None, context, 0.0), mapper(kind)
    part = REQUESTS // context.world_size
    own = context.rank * part, (context.rank + 1) * part
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = task.training_forward(mapped(make_batch(step, *own)))
        loss.backward()
        optimizer.step()
    model.eval()

    def scores() -> np.ndarray:
        with torch.no_grad():
            logits = model(mapped(make_batch(STEPS, *own))).logits
        return np.concatenate(context.all_gather_objects(logits.numpy()))

    found = {"scores": scores()}
    save_model(model, folder / f"{kind}-{context.world_size}")
    load_model(model, folder / f"{kind}-1")
    looked_up = model.module.request_embeddings(make_batch(0, *own).sparse)
    return found | {"loaded": scores(), "order": list(looked_up.wait().keys())}


def train_all(folder: Path) -> dict[str, dict[str, object]]:
    with distributed(3) as context:
        return {kind: train(kind, folder, context) for kind in KINDS}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("request_order")
    return {world_size: run_ranks(train_all, world_size, folder)[0] for world_size in (1, 2)}


def test_two_ranks_look_up_in_another_order(results):
    orders = [results[n]["plain"]["order"] for n in (1, 2)]
    assert orders == [["user_id", "query_id"], ["query_id", "user_id"]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_predict_what_one_predicts(results, kind):
    np.testing.assert_allclose(results[2][kind]["scores"], results[1][kind]["scores"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_of_one_rank_predicts_the_same_on_two(results, kind):
    np.testing.assert_allclose(results[2][kind]["loaded"], results[1][kind]["scores"], atol=1e-5)
