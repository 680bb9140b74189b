"""Two gloo ranks contrast as one process that sees every pair, and end a run together."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mim_torchrec.csft.main import main
from mim_torchrec.csft.task import Contrast, PairBatch
from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.encoders.checkpoint import load_encoder
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemHead
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE
from mim_torchrec.training.history import read_history
from tests.ranks import run_ranks

N, RANKS, IMAGE, TEXT = 6, 2, 9, 7
LEVELS = {"alpha": 0.5, "beta": 0.3, "gamma": 0.7}


def contrast(mask: bool) -> Contrast:
    torch.manual_seed(0)
    head = ItemHead(IMAGE, TEXT, HeadConfig(dim=5, fusion_dim=3, hidden_dim=8, dropout=0.0))
    return Contrast(head, MultiLevelInfoNCE(**LEVELS, mask_same_item=mask)).double()


def batch_of(pairs: np.ndarray) -> PairBatch:
    """Some of the RANKS x N pairs; item rows repeat, so that there is something to mask."""
    rng = np.random.default_rng(0)
    count = RANKS * N
    positive, negative = rng.integers(8, size=count), rng.integers(8, 12, size=count)
    query = rng.integers(-1, 8, size=count)
    image, text = (torch.from_numpy(rng.normal(size=(12, size))) for size in (IMAGE, TEXT))
    rows = np.concatenate([positive[pairs], negative[pairs]])
    return PairBatch(
        query=image[query[pairs]], query_text=text[query[pairs]], image=image[rows], text=text[rows],
        item_row=torch.from_numpy(rows), query_row=torch.from_numpy(query[pairs]),
        pair=pairs,
    )  # fmt: skip


def one_rank_of_two(mask: bool):
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(contrast(mask))
    loss, report = model(batch_of(np.arange(rank * N, (rank + 1) * N)))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    return float(loss.detach()), gradients, {name: float(value) for name, value in report.items()}


def everything(mask: bool):
    model = contrast(mask)
    loss, report = model(batch_of(np.arange(RANKS * N)))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return float(loss.detach()), gradients, {name: float(value) for name, value in report.items()}


@pytest.mark.parametrize("mask", [True, False])
def test_two_ranks_have_the_loss_and_the_gradients_of_one(mask):
    loss, gradients, report = everything(mask)
    ranks = run_ranks(one_rank_of_two, RANKS, mask)
    assert sum(rank[0] for rank in ranks) / RANKS == pytest.approx(loss, abs=1e-6)
    for name, value in report.items():
        assert sum(rank[2][name] for rank in ranks) / RANKS == pytest.approx(value, abs=1e-6), name
    for _, theirs, _ in ranks:
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_two_ranks_have_2np_minus_1_negatives():
    for _, _, report in run_ranks(one_rank_of_two, RANKS, False):
        assert report["negatives"] == 2 * N * RANKS - 1


def stage(data: str, out: str, *more: str):
    flags = {
        "data": data, "out": out, "item-cache": str(Path(out).parent / "items"),
        "vision.name": "test_convnext", "vision.weights": "random", "vision.image-size": "32",
        "text.name": "bert-tiny", "text.weights": "random",
        "head.dim": "8", "head.fusion-dim": "4", "head.dropout": "0",
        "epochs": "2", "batch-size": "32", "temperature": "0.2",
    }  # fmt: skip
    main([word for name, value in flags.items() for word in (f"--{name}", value)] + list(more))


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    data = tmp_path_factory.mktemp("csft") / "shop"
    make_shop(["--out", str(data), "--items", "200", "--users", "30", "--requests", "60",
          "--searches", "131", "--browsing", "200", "--categories", "3", "--image-size", "32"])  # fmt: skip
    return str(data)


@pytest.mark.parametrize("options", [
    ["--freeze-towers", "True"],
    ["--freeze-towers", "False"],
    ["--queue-batches", "2", "--queue-start-step", "1", "--hard-negatives", "False"],
    ["--loss", "cross_entropy"],
    ["--loss", "cross_entropy", "--interest-signal", "category"],
], ids=" ".join)  # fmt: skip
def test_two_ranks_train_the_same_encoder_as_one(shop, tmp_path, options):
    histories = []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        run_ranks(stage, world_size, shop, str(out), *options)
        histories.append(asdict(read_history(out / "history.jsonl")))
    losses = [[entry["loss"] for entry in history["steps"]] for history in histories]
    pairs = 2 * 131 if "category" in options else 131  # of clicks and purchases, or of purchases
    assert len(losses[0]) == 2 * (math.floor(pairs * 0.95) // 32)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    one, two = (load_encoder(tmp_path / name / "encoder") for name in ("1", "2"))
    for (name, ours), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=1e-2, msg=name)
