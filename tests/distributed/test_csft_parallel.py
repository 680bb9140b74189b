"""Trained towers divided by FSDP2, in chunks and in bfloat16, beside DDP, whole batches and float32."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mim_torchrec.csft.main import main
from mim_torchrec.csft.task import Contrast, PairBatch, join_tokens
from mim_torchrec.encoders.checkpoint import load_encoder
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE
from mim_torchrec.training.history import read_history
from mim_torchrec.training.parallel import blocks
from tests.programs import TINY_TOWERS, small_shop, words
from tests.ranks import RankError, run_ranks

FLAGS = TINY_TOWERS | {
    "head.dropout": "0", "freeze-towers": "False", "epochs": "2", "batch-size": "64", "queue-batches": "2",
    "lr": "0.003", "log-every": "1",
}  # fmt: skip
TITLES = ["a red lamp", "blue vase", "a long rug of wool and silk", "lamp", "green chair", "a vase"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return small_shop(tmp_path_factory.mktemp("parallel"), items=151)


def command(data: Path, out: Path, **changes: str) -> list[str]:
    return words(data, out, FLAGS, **changes)


def result(out: Path) -> tuple[list[float], dict]:
    history = asdict(read_history(out / "history.jsonl"))
    return [entry["loss"] for entry in history["steps"]], json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def ddp(shop, tmp_path_factory) -> tuple[list[float], dict]:
    out = tmp_path_factory.mktemp("ddp") / "csft"
    run_ranks(main, 2, command(shop, out))
    return result(out)


def test_divided_towers_train_as_whole_ones(shop, ddp, tmp_path):
    out = tmp_path / "csft"
    run_ranks(main, 2, command(shop, out, parallel="fsdp"))
    losses, metrics = result(out)
    assert np.allclose(losses, ddp[0], rtol=1e-4, atol=1e-4)
    assert metrics["retrieval"]["mean_rank"] == pytest.approx(ddp[1]["retrieval"]["mean_rank"], rel=0.05)


def test_divided_towers_resume_where_they_were(shop, tmp_path):
    out = tmp_path / "csft"
    run_ranks(main, 2, command(shop, out, parallel="fsdp"))
    whole = result(out)
    # as if it had been interrupted after the first epoch
    for path in (out / "checkpoints").glob("epoch-0002-*"):
        path.rename(path.with_name(f"{path.name}.partial"))
    (out / "metrics.json").unlink()
    run_ranks(main, 2, command(shop, out, parallel="fsdp"))
    assert result(out)[0] == whole[0]
    assert result(out)[1]["encoder_version"] == whole[1]["encoder_version"]


def test_fsdp_without_trained_towers_is_refused(shop, tmp_path):
    with pytest.raises(ValueError, match="fsdp divides towers that are trained"):
        main(command(shop, tmp_path / "csft", parallel="fsdp", freeze_towers="True", init="random"))


def test_chunks_train_as_whole_batches(shop, ddp, tmp_path):
    out = tmp_path / "csft"
    run_ranks(main, 2, command(shop, out, chunk_size="20"))
    assert np.allclose(result(out)[0], ddp[0], rtol=1e-4, atol=1e-4)


def test_bfloat16_towers_learn_alike(shop, ddp, tmp_path):
    out = tmp_path / "csft"
    run_ranks(main, 2, command(shop, out, precision="bf16"))
    losses = result(out)[0]
    assert losses != ddp[0]
    assert np.allclose(losses, ddp[0], rtol=0.1)


def test_weights_that_are_gathered_in_bfloat16_learn_alike_and_are_kept_in_float32(shop, ddp, tmp_path):
    out = tmp_path / "csft"
    run_ranks(main, 2, command(shop, out, parallel="fsdp", precision="bf16", epochs="1"))
    losses = result(out)[0]
    assert losses != ddp[0][: len(losses)]
    assert np.allclose(losses, ddp[0][: len(losses)], rtol=0.1)
    towers = load_encoder(out / "encoder")
    assert {parameter.dtype for parameter in towers.parameters()} == {torch.float32}
    for weight in (towers.vision.model.blocks[0].mlp.fc1.weight, towers.head.image.weight):
        assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(("changes", "message"), [
    ({"chunk_size": "8", "freeze_towers": "True", "init": "random"}, "for towers that are trained"),
    ({"chunk_size": "0"}, "must be at least 1"),
    ({"chunk_size": "8", "vision__name": "test_resnet"}, "test_resnet has batch normalization"),
    ({"chunk_size": "8", "parallel": "fsdp"}, "needs --parallel ddp"),
])  # fmt: skip
def test_chunks_that_cannot_be_are_refused(shop, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(command(shop, tmp_path / "csft", **changes))


def test_a_loss_that_is_not_finite_leaves_the_ids_of_every_rank(shop, tmp_path):
    with pytest.raises(RankError, match="the loss is (nan|inf) in epoch"):
        run_ranks(main, 2, command(shop, tmp_path / "csft", lr="1e30"))
    table = pq.read_table(shop / "pairs")
    pairs = {*zip(table["query_id"].to_pylist(), table["item_id"].to_pylist(), strict=True)}
    for rank in range(2):
        bad = json.loads((tmp_path / "csft" / "bad_batch" / f"rank{rank}.json").read_text())
        assert len(bad["item_ids"]) == 64
        assert {*zip(bad["query_ids"], bad["item_ids"][:32], strict=True)} <= pairs
        assert bad["step"] >= 1


def encoder() -> ItemEncoder:
    torch.manual_seed(0)
    config = ItemEncoderConfig(
        vision=VisionEncoderConfig(name="test_vit", weights="random", image_size=32),
        text=TextEncoderConfig(name="bert-tiny", weights="random"),
        head=HeadConfig(dim=8, fusion_dim=4, hidden_dim=8, dropout=0.3),
    )
    return ItemEncoder.build(config, train_tokenizer(TITLES, 64))


def batch_of(model: ItemEncoder, gamma: bool) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (9, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return PairBatch(
        query=images[:3], query_text=model.text.tokenize(TITLES[:3]) if gamma else None, image=images[3:],
        text=model.text.tokenize(TITLES), item_row=torch.arange(6), query_row=torch.tensor([6, 7, 8]),
        pair=np.arange(3),
    )  # fmt: skip


def gradients(chunk_size: int | None, gamma: bool) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes of all distinct tensors that the forward pass has saved."""
    model = encoder()
    contrast = Contrast(model, MultiLevelInfoNCE(gamma=1.0 if gamma else 0.0), chunk_size=chunk_size)
    torch.manual_seed(7)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = contrast(batch_of(model, gamma))[0]
    loss.backward()
    found = {name: p.grad for name, p in contrast.named_parameters() if p.grad is not None}
    return float(loss.detach()), found, sum(saved.values())


@pytest.mark.parametrize("gamma", [False, True])
def test_chunks_give_the_gradient_of_the_whole_batch_from_less_that_is_saved(gamma):
    loss, expected, bytes_whole = gradients(None, gamma)
    chunked_loss, found, bytes_chunked = gradients(2, gamma)
    assert chunked_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name in expected:
        around_zero = 1e-6 + 1e-5 * float(expected[name].abs().max())  # sums that cancel
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=around_zero, msg=name)
    assert bytes_chunked < 0.5 * bytes_whole


def test_padding_of_joined_titles_changes_no_vector():
    model = encoder().eval()
    short, long = model.text.tokenize(["lamp"]), model.text.tokenize([TITLES[2]])
    together = model.text(join_tokens(short, long))
    apart = torch.cat([model.text(short), model.text(long)])
    assert torch.allclose(together, apart, atol=1e-5)


def test_blocks_are_those_of_the_architecture():
    model = encoder()
    assert len(list(blocks(model.vision))) == len(model.vision.model.blocks)
    assert len(list(blocks(model.text))) == 2
