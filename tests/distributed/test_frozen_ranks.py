"""A frozen table beside trainable ones in one model, on 1 and on 2 gloo ranks."""

import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.load import LoadReport, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.sharder import FrozenEmbeddingCollectionSharder
from mim_torchrec.embeddings.table.format import (
    ChecksumMismatch,
    NonFiniteVector,
    Table,
    TableError,
    TableWriter,
)
from tests.ranks import TIMEOUT

DIM, ITEMS, USERS = 4, 11, 5
ITEM, MM, USER = ["candidate", "behavior"], ["candidate_mm", "behavior_mm"], ["user"]


class Model(nn.Module):
    """Scores each behavior by its id and by its content, and each request by its user."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        meta = torch.device("meta")
        item = EmbeddingConfig(name="item", num_embeddings=ITEMS + 1, embedding_dim=DIM, feature_names=ITEM)
        user = EmbeddingBagConfig(name="user", num_embeddings=USERS, embedding_dim=DIM, feature_names=USER)
        self.item = EmbeddingCollection(tables=[item], device=meta)
        self.user = EmbeddingBagCollection(tables=[user], device=meta)
        self.mm = FrozenEmbeddingCollection([frozen_config(table, MM)])
        self.dense = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, dict[str, Tensor]]:
        item, mm, user = self.item(features), self.mm(features), self.user(features)
        found = {key: mm[key].values() for key in MM}
        by_item = [self.dense(item[a].values() * (1 + found[b])).sum() for a, b in zip(ITEM, MM, strict=True)]
        return sum(by_item) + self.dense(user.values()).sum(), found


def write_table(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    writer = TableWriter(path, table_version="v1", dim=DIM, encoder={})
    ids = torch.arange(ITEMS) * 7 - 20
    for part in (ids[:5], ids[5:]):
        writer.write_shard(part, torch.randn(part.numel(), DIM, generator=generator))
    writer.finish()
    return path


def batch(table: Table, rank: int, world_size: int, step: int) -> tuple[KeyedJaggedTensor, dict[str, Tensor]]:
    """Return ragged requests (with repeated and unknown ids; every third step the last rank has none)."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    requests = 3 + rank
    lengths = torch.randint(0, 4, (2, requests), generator=generator)
    if step % 3 == 2 and rank == world_size - 1:
        lengths.zero_()
    known = torch.cat([table.row_index().ids, torch.tensor([999])])
    ids = known[torch.randint(0, ITEMS + 1, (int(lengths.sum()),), generator=generator)]
    users = torch.randint(0, USERS, (requests,), generator=generator)
    rows = table.row_index().rows(ids)
    features = KeyedJaggedTensor(
        keys=ITEM + MM + USER,
        values=torch.cat([rows, rows, users]),
        lengths=torch.cat([lengths.flatten(), lengths.flatten(), torch.ones(requests, dtype=torch.int64)]),
    )
    split = int(lengths[0].sum())
    return features, dict(zip(MM, (ids[:split], ids[split:]), strict=True))


def build(table: Table) -> DistributedModelParallel:
    torch.manual_seed(0)
    model = Model(table)
    apply_optimizer_in_backward(RowWiseAdagrad, model.item.parameters(), {"lr": 0.1})
    apply_optimizer_in_backward(RowWiseAdagrad, model.user.parameters(), {"lr": 0.1})
    sharders = [
        EmbeddingCollectionSharder(),
        EmbeddingBagCollectionSharder(),
        FrozenEmbeddingCollectionSharder(),
    ]
    spread = row_wise(compute_kernel="fused")
    last = table_wise(rank=dist.get_world_size() - 1, compute_kernel="fused")
    plan = {
        name: construct_module_sharding_plan(
            module, {name: how}, sharder=sharder, local_size=dist.get_world_size(), device_type="cpu"
        )
        for (name, how), module, sharder in zip(
            {"item": spread, "user": last, "mm": spread}.items(),
            (model.item, model.user, model.mm),
            sharders,
            strict=True,
        )
    }
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=sharders
    )


def train(model: DistributedModelParallel, table: Table, steps: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parameters = [parameter for name, parameter in model.named_parameters() if "dense" in name]
    dense = torch.optim.Adam(parameters, lr=0.01)
    for step in range(steps):
        loss, _ = model(batch(table, rank, world_size, step)[0])
        dense.zero_grad()
        loss.backward()
        dense.step()


def whole(model: DistributedModelParallel, name: str) -> Tensor | None:
    """Return all rows of a trainable table on rank 0."""
    tensor = next(value for key, value in model.state_dict().items() if f".{name}.weight" in key)
    out = torch.zeros(tensor.size()) if dist.get_rank() == 0 else None
    tensor.gather(dst=0, out=out)
    return out


def _lookups_equal_the_reference(path: Path) -> None:
    table = open_table(path, expected_version="v1")
    model = build(table)
    load_table(model, table)
    for step in range(6):
        features, ids = batch(table, dist.get_rank(), dist.get_world_size(), step)
        loss, found = model(features)
        loss.backward()
        for key in MM:
            assert found[key].dtype == torch.float32 and not found[key].requires_grad
            assert torch.equal(found[key], table.read_float(ids[key])), (step, key)


def _training_changes_everything_but_the_frozen_bytes(path: Path) -> None:
    table = open_table(path)
    model = build(table)
    load_table(model, table)
    digest, item, user = table_digest(model), whole(model, "item"), whole(model, "user")
    train(model, table, steps=50)
    after = whole(model, "item"), whole(model, "user")
    assert table_digest(model) == digest
    if dist.get_rank() == 0:
        assert not torch.equal(item, after[0]) and not torch.equal(user, after[1])


def _nothing_of_the_frozen_table_can_be_trained_or_saved(path: Path) -> None:
    table = open_table(path)
    model = build(table)
    load_table(model, table)
    train(model, table, steps=2)
    names = [name for name, _ in model.named_parameters()]
    state = model.fused_optimizer.state_dict()["state"]
    for keys in (names, state, model.fused_optimizer.params):
        assert keys and not any("mm" in key.split(".") for key in keys), list(keys)
    assert [key for key in model.state_dict() if "mm" in key.split(".")] == ["mm._extra_state"]
    assert not any(buffer.is_floating_point() for _, buffer in model.named_buffers())


def _each_rank_reads_its_own_rows(path: Path) -> None:
    class Watched(Table):
        asked: list[tuple[int, int]] = []

        def rows_for(self, start: int, stop: int, *args, **options) -> Tensor:
            self.asked.append((start, stop))
            return super().rows_for(start, stop, *args, **options)

    table = Watched.open(path, verify=False)
    report = load_table(build(table), table)
    assert isinstance(report, LoadReport)
    assert table.asked == [(report.first_row, report.first_row + report.rows)]
    per_rank = -(-(ITEMS + 1) // dist.get_world_size())
    assert report.first_row == dist.get_rank() * per_rank and report.rows <= per_rank
    assert report.bytes == report.rows * DIM * 2


def _backward_exchanges_nothing_for_the_frozen_table(path: Path) -> None:
    table = open_table(path)
    model = build(table)
    load_table(model, table)
    features, _ = batch(table, dist.get_rank(), dist.get_world_size(), 0)
    calls: list[str] = []
    exchange = dist.all_to_all_single

    def counted(*args, **kwargs):
        calls.append("all_to_all")
        return exchange(*args, **kwargs)

    dist.all_to_all_single = counted
    try:
        _, found = model(features)
        assert len(calls) > 0 or dist.get_world_size() == 1
        calls.clear()
        weight = torch.ones(DIM, requires_grad=True)
        sum((found[key] * weight).sum() for key in MM).backward()
        assert calls == []
    finally:
        dist.all_to_all_single = exchange


def _an_empty_table_knows_nothing_on_any_rank(path: Path) -> None:
    empty = path.with_name(f"empty-{dist.get_world_size()}")
    if dist.get_rank() == 0:
        TableWriter(empty, table_version="v1", dim=DIM, encoder={}).finish()
    dist.barrier()
    table = open_table(empty)
    model = build(table)
    load_table(model, table)
    keys = ITEM + MM + USER
    zeros = torch.zeros(len(keys), dtype=torch.int64)
    _, found = model(KeyedJaggedTensor(keys=keys, values=zeros, lengths=torch.ones_like(zeros)))
    assert all(not vectors.any() for vectors in found.values())


def _an_error_on_one_rank_is_raised_on_all(path: Path) -> None:
    world_size = dist.get_world_size()
    broken = path.with_name(f"broken-{world_size}")
    nan = path.with_name(f"nan-{world_size}")
    if dist.get_rank() == 0:
        for copy in (broken, nan):
            write_table(copy)
        file = broken / Table.open(broken).manifest.shards[1].file
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        file = nan / Table.open(nan).manifest.shards[1].file
        data = bytearray(file.read_bytes())
        data[-1], data[-2] = 0x7E, 0x00
        file.write_bytes(data)
    dist.barrier()
    with pytest.raises(ChecksumMismatch, match="shard-00000-00001"):
        open_table(broken)
    with pytest.raises(TableError, match="expected v2"):
        open_table(path, expected_version="v2")
    table = Table.open(nan, verify=False)
    with pytest.raises(NonFiniteVector, match="shard-00000-00001.safetensors: row 5, item id 50"):
        load_table(build(table), table)


def _a_checkpoint_of_two_ranks_loads_on_one(path: Path) -> None:
    table = open_table(path)
    model = build(table)
    load_table(model, table)
    digest = table_digest(model)
    checkpoint, expected = str(path.with_name("checkpoint")), path.with_name("expected.pt")
    if dist.get_world_size() == 2:
        train(model, table, steps=5)
        dcp.save({"model": model.state_dict()}, checkpoint_id=checkpoint)
        trained = whole(model, "item"), whole(model, "user")
        if dist.get_rank() == 0:
            torch.save(trained, expected)
    else:
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=checkpoint)
        model.load_state_dict(state["model"])
        found = whole(model, "item"), whole(model, "user")
        assert all(torch.equal(a, b) for a, b in zip(found, torch.load(expected), strict=True))
    assert table_digest(model) == digest


CLAIMS = {
    claim.__name__.strip("_"): claim
    for claim in (
        _lookups_equal_the_reference,
        _training_changes_everything_but_the_frozen_bytes,
        _nothing_of_the_frozen_table_can_be_trained_or_saved,
        _each_rank_reads_its_own_rows,
        _backward_exchanges_nothing_for_the_frozen_table,
        _an_empty_table_knows_nothing_on_any_rank,
        _an_error_on_one_rank_is_raised_on_all,
        _a_checkpoint_of_two_ranks_loads_on_one,
    )
}


def _rank(rank: int, world_size: int, folder: Path) -> None:
    """Try every claim in one world, for importing torchrec costs more than all of them together."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'rendezvous-{world_size}'}",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    for name, claim in CLAIMS.items():
        try:
            claim(folder / "table")
            outcome = ""
        except (Exception, pytest.fail.Exception):
            outcome = traceback.format_exc()
        (folder / f"{name}-{world_size}-{rank}").write_text(outcome)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    write_table(folder / "table")
    for world_size in (2, 1):
        mp.spawn(_rank, (world_size, folder), nprocs=world_size)
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("claim", CLAIMS)
def test_it_holds_on_every_rank(outcomes, claim, world_size):
    for rank in range(world_size):
        outcome = (outcomes / f"{claim}-{world_size}-{rank}").read_text()
        assert not outcome, f"rank {rank}: {outcome}"
