"""Frozen collections on 1 and on 2 ranks against plain indexing: unpooled, pooled, mapped, live, saved."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    DATA_TYPES,
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.live import (
    ItemIndex,
    apply_window,
    delete_items,
    table_state,
    update_items,
)
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.rows import MappedRows
from mim_torchrec.embeddings.sharded.sharder import frozen_sharders
from mim_torchrec.embeddings.table.format import DTYPES, Table, TableError, TableWriter, VersionMismatch
from mim_torchrec.embeddings.windows.log import WindowLog
from tests.ranks import RankError, run_ranks

DIM, ITEMS, FEATURES = 8, 23, ["candidate", "behavior"]
IDS = torch.arange(ITEMS) * 7 - 20


def write_table(path: Path, dtype: str = "float16", version: str = "v1", spare_rows: int = 3) -> Path:
    """Three shards of ascending ids: a rank's rows begin and end within them."""
    generator = torch.Generator().manual_seed(0)
    writer = TableWriter(path, table_version=version, dim=DIM, dtype=dtype, encoder={}, spare_rows=spare_rows)
    for part in IDS.split(9):
        writer.write_shard(part, torch.randn(part.numel(), DIM, generator=generator))
    writer.finish()
    return path


def whole(table: Table) -> Tensor:
    """All rows as float32 vectors (1 + capacity, dim)."""
    vectors = torch.zeros(1 + table.manifest.capacity, table.manifest.dim)
    vectors[1 : 1 + table.manifest.rows] = table.read_float(table.row_index().ids)
    return vectors


def shard(model: nn.Module) -> DistributedModelParallel:
    sharders, plan = frozen_sharders(), {}
    for name, module in model.named_children():
        for sharder in sharders:
            if type(module) is sharder.module_type:
                plan[name] = construct_module_sharding_plan(
                    module, {table: row_wise(compute_kernel="fused") for table in module.frozen_tables()},
                    sharder=sharder, local_size=dist.get_world_size(), device_type="cpu",
                )  # fmt: skip
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=sharders
    )


class Unpooled(nn.Module):
    def __init__(self, table: Table, **options) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)], **options)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        found = self.mm(features)
        return {key: found[key].values() for key in FEATURES}


class Pooled(nn.Module):
    def __init__(self, configs: list[EmbeddingBagConfig], is_weighted: bool = False) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingBagCollection(configs, is_weighted=is_weighted)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.mm(features)


def batch(step: int, rows: int) -> KeyedJaggedTensor:
    """Ragged bags, as many as the rank says, with repeated rows; in step 2 the last rank asks for none."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(100 * step + rank)
    requests = 3 + 2 * rank
    lengths = torch.randint(0, 6, (2 * requests,), generator=generator)
    lengths[1] = 0
    if step == 2 and rank == world_size - 1:
        lengths.zero_()
    values = torch.randint(0, rows, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(FEATURES, values, lengths=lengths)


def weighted(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    weights = torch.rand(features.values().numel(), generator=torch.Generator().manual_seed(1))
    return KeyedJaggedTensor(
        features.keys(), features.values(), weights.requires_grad_(), lengths=features.lengths()
    )


def naive_pool(vectors: Tensor, features: KeyedJaggedTensor, mode: str) -> Tensor:
    """(num_requests, 2 * DIM), a loop over bags."""
    out = []
    weights = features.weights_or_none()
    start = 0
    for length in features.lengths().tolist():
        rows = range(start, start + length)
        total = torch.zeros(DIM)
        for at in rows:
            scale = 1.0 if weights is None else weights[at]
            total = total + scale * vectors[features.values()[at]]
        out.append(total / length if mode == "mean" and length else total)
        start += length
    return torch.cat(torch.stack(out).chunk(2), dim=1)


def _lookups_are_the_vectors(path: Path, dtype: str) -> None:
    table = open_table(path)
    for mapped in (False, True):
        model = shard(Unpooled(table))
        load_table(model, table, mapped=mapped)
        for step in range(4):
            features = batch(step, 1 + ITEMS + 3)
            found = model(features)
            for key in FEATURES:
                assert torch.equal(found[key], whole(table)[features[key].values()]), (mapped, step, key)
                assert found[key].dtype == torch.float32 and not found[key].requires_grad


def _pooled_lookups_are_the_sums(path: Path, pooling: PoolingType, is_weighted: bool) -> None:
    table = open_table(path)
    model = shard(Pooled([frozen_bag_config(table, FEATURES, pooling=pooling)], is_weighted))
    load_table(model, table)
    for step in range(4):
        features = batch(step, 1 + ITEMS)
        features = weighted(features) if is_weighted else features
        found = model(features).values()
        expected = naive_pool(whole(table), features, pooling.name.lower())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        if is_weighted and features.weights().numel():
            slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
            gradients = [
                torch.autograd.grad((out * slope).sum(), features.weights(), retain_graph=True)[0]
                for out in (found, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def _tables_of_other_types_and_dims_stand_beside_each_other(folder: Path) -> None:
    tables = {"mm": open_table(folder / "float16"), "other": open_table(folder / "int8")}
    configs = [
        frozen_bag_config(tables["mm"], ["candidate"], "mm"),
        frozen_bag_config(tables["other"], ["candidate", "behavior"], "other"),
        EmbeddingBagConfig(name="narrow", num_embeddings=30, embedding_dim=4, feature_names=["behavior"]),
    ]
    model = shard(Pooled(configs))
    for name, table in tables.items():
        load_table(model, table, name)
    features = batch(0, ITEMS)
    found = model(features).to_dict()
    assert list(found) == ["candidate@mm", "candidate@other", "behavior@other", "behavior@narrow"]
    for name, table in tables.items():
        expected = naive_pool(whole(table), features, "sum")[:, :DIM]
        torch.testing.assert_close(found[f"candidate@{name}"], expected, rtol=1e-5, atol=1e-6)
    assert found["behavior@narrow"].shape == (features.stride(), 4)


def _only_distinct_rows_cross_in_their_own_type(path: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table))
    load_table(model, table)
    rows = torch.tensor([1, 1, 25, 25, 25, 2])
    features = KeyedJaggedTensor(FEATURES, rows, lengths=torch.tensor([3, 3]))
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(output, input, *args, **options):
        if input.dtype == torch.uint8:
            sent.append(input.numel())
        return exchange(output, input, *args, **options)

    dist.all_to_all_single = counted
    try:
        list(model(features).values())
    finally:
        dist.all_to_all_single = exchange
    owned = (2, 1)[dist.get_rank()]  # distinct rows of this rank, asked for by both
    assert sent == [2 * owned * table.manifest.row_bytes]


def _updates_are_seen_by_the_next_lookup(path: Path) -> None:
    table = open_table(path)
    for mapped in (False, True):
        model, index = shard(Unpooled(table)), ItemIndex.of(table)
        load_table(model, table, mapped=mapped)
        ids = torch.tensor([1000, int(IDS[0]), int(IDS[-1]), 999])
        vectors = torch.arange(4 * DIM).view(4, DIM) / 8
        written = update_items(model, index, ids, vectors, table_version="v1", seq=1).rows
        total = torch.tensor(written)
        dist.all_reduce(total)
        assert int(total) == 4
        rows = index.rows(ids)
        features = KeyedJaggedTensor(FEATURES, rows, lengths=torch.tensor([3, 1]))
        found = model(features)
        assert torch.equal(torch.cat([found[key] for key in FEATURES]), vectors)
        delete_items(model, index, ids[:1], table_version="v1", seq=2)
        assert index.rows(ids[:1]).tolist() == [0]
        found = model(features)  # mapped before the window: the row is zero
        assert torch.equal(found["candidate"], vectors[:3] * torch.tensor([[0.0], [1.0], [1.0]]))
        if mapped:
            assert isinstance(find_frozen(model, "mm")[1].store, MappedRows)
            assert torch.equal(whole(Table.open(path)), whole(table))  # the files are as they were


def _windows_of_a_log_are_seen_by_the_next_lookup(path: Path, log: Path) -> None:
    table = open_table(path)
    model, index = shard(Unpooled(table)), ItemIndex.of(table)
    load_table(model, table)
    windows = list(WindowLog(log, "v1", start=0).after(0))
    rows = []
    for window in [*windows, *windows]:  # delivered twice
        report = apply_window(model, index, window)
        rows += [0 if report is None else report.rows]
    total = torch.tensor(rows)
    dist.all_reduce(total)
    assert total.tolist() == [3, 2, 0, 0]
    mapped = index.rows(torch.tensor([1000, 999, int(IDS[0]), int(IDS[5])]))
    features = KeyedJaggedTensor(FEATURES, mapped, lengths=torch.tensor([3, 1]))
    found = model(features)
    expected = torch.stack([torch.full((DIM,), value) for value in (4.0, 0.0, 1.0)])
    torch.testing.assert_close(found["candidate"].float(), expected)
    torch.testing.assert_close(found["behavior"].float(), table.read_float(IDS[5:6]))
    assert table_state(model).seq == 2


def _a_row_that_is_not_there_is_refused(path: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table))
    load_table(model, table)
    for row in (-1, 1 + ITEMS + 3):
        features = KeyedJaggedTensor(FEATURES, torch.tensor([0, row]), lengths=torch.tensor([1, 1]))
        with pytest.raises(IndexError, match=f"mm: row {row} is not within 0:27"):
            model(features)


def _a_checkpoint_knows_its_vectors(folder: Path) -> None:
    table, other = open_table(folder / "float16"), open_table(folder / "v2")
    model = shard(Unpooled(table))
    load_table(model, table)
    state = model.state_dict()
    assert state == {"mm._extra_state": '{"mm": ["v1", 0]}'}
    model.load_state_dict(state)
    fresh = shard(Unpooled(table))
    fresh.load_state_dict(state)
    with pytest.raises(VersionMismatch, match="rows are of table_version v2, the checkpoint .* v1"):
        load_table(fresh, other)
    load_table(fresh, table)
    changed = shard(Unpooled(other))
    load_table(changed, other)
    with pytest.raises(VersionMismatch, match="rows are of table_version v2, the checkpoint .* v1"):
        changed.load_state_dict(state)


def _save(path: Path, checkpoint: Path) -> None:
    table = open_table(path)
    model, index = shard(Unpooled(table, store_rows=True)), ItemIndex.of(table)
    load_table(model, table)
    update_items(model, index, IDS[:2], torch.ones(2, DIM), table_version="v1", seq=5)
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(checkpoint))


def _restore(path: Path, checkpoint: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table, store_rows=True))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(checkpoint))
    model.load_state_dict(state["model"])
    vectors = whole(table)
    vectors[1:3] = 1.0
    features = batch(0, 1 + ITEMS)
    found = model(features)
    for key in FEATURES:
        assert torch.equal(found[key], vectors[features[key].values()])
    frozen = find_frozen(model, "mm")[1]
    assert (frozen.state.table_version, frozen.state.seq) == ("v1", 5)


class Scored(nn.Module):
    """A frozen table in a model that is trained."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)])
        self.pooled = FrozenEmbeddingBagCollection([frozen_bag_config(table, FEATURES, "pooled")])
        self.dense = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        found, pooled = self.mm(features), self.pooled(features)
        logits = self.dense(torch.cat([found[key].values() for key in FEATURES])).sum()
        loss = (logits + self.dense(pooled["behavior"]).sum() - 1.0) ** 2 / 100
        return loss, loss.detach()


def _pipelines_give_the_losses_of_a_plain_loop(path: Path) -> None:
    table = open_table(path)

    def losses(pipeline) -> tuple[list[float], str]:
        torch.manual_seed(0)
        model = shard(Scored(table))
        for name in ("mm", "pooled"):
            load_table(model, table, name)
        before = [table_digest(model, name) for name in ("mm", "pooled")]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        batches = iter([batch(step, 1 + ITEMS) for step in range(5)])
        if pipeline is None:
            found = []
            for features in batches:
                loss, seen = model(features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(float(seen))
        else:
            steps = pipeline(model, optimizer, torch.device("cpu"))
            found = [float(steps.progress(batches)) for _ in range(5)]
        assert [table_digest(model, name) for name in ("mm", "pooled")] == before
        return found

    plain = losses(None)
    assert len(set(plain)) == 5
    for pipeline in (TrainPipelineBase, TrainPipelineSparseDist):
        assert losses(pipeline) == pytest.approx(plain, rel=1e-5)


def _all(claims: list[tuple]) -> None:
    """Try several claims in one world: starting one costs more than they do."""
    for claim, *args in claims:
        try:
            claim(*args)
        except BaseException as error:
            error.add_note(f"claim {claim.__name__}{args}")
            raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for dtype in DTYPES:
        write_table(folder / dtype, dtype)
    write_table(folder / "v2", version="v2")
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
def test_lookups_are_the_vectors_in_every_storage_type_loaded_or_mapped(folder, world_size):
    run_ranks(_all, world_size, [(_lookups_are_the_vectors, folder / dtype, dtype) for dtype in DATA_TYPES])


@pytest.mark.parametrize("world_size", [1, 2])
def test_pooled_lookups_are_the_sums_and_weights_get_gradients(folder, world_size):
    kinds = [(PoolingType.SUM, False), (PoolingType.MEAN, False), (PoolingType.SUM, True)]
    claims = [(_pooled_lookups_are_the_sums, folder / dtype, *kind) for dtype in DTYPES for kind in kinds]
    run_ranks(_all, world_size, claims)


@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_of_other_types_and_dims_stand_beside_each_other(folder, world_size):
    run_ranks(_tables_of_other_types_and_dims_stand_beside_each_other, world_size, folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_distinct_rows_cross_in_their_own_type(folder, dtype):
    run_ranks(_only_distinct_rows_cross_in_their_own_type, 2, folder / dtype)


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_are_seen_by_the_next_lookup_on_every_rank(folder, world_size):
    run_ranks(_updates_are_seen_by_the_next_lookup, world_size, folder / "float16")


@pytest.mark.parametrize("world_size", [1, 2])
def test_windows_of_a_log_are_seen_by_the_next_lookup_on_every_rank(folder, tmp_path, world_size):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    ids = torch.tensor([int(IDS[0]), 1000, 999])
    log.append("first", ids, torch.arange(1.0, 4.0)[:, None].expand(-1, DIM))
    log.append("second", ids[1:2], torch.full((1, DIM), 4.0), removed=ids[2:])
    run_ranks(_windows_of_a_log_are_seen_by_the_next_lookup, world_size, folder / "float16", tmp_path / "log")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_row_that_is_not_there_is_refused_and_not_remapped(folder, world_size):
    run_ranks(_a_row_that_is_not_there_is_refused, world_size, folder / "float16")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_knows_its_vectors_and_refuses_others(folder, world_size):
    run_ranks(_a_checkpoint_knows_its_vectors, world_size, folder)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (1, 2)])
def test_rows_that_are_stored_are_restored_on_other_ranks(folder, tmp_path, saved, loaded, dtype):
    run_ranks(_save, saved, folder / dtype, tmp_path / "checkpoint")
    run_ranks(_restore, loaded, folder / dtype, tmp_path / "checkpoint")


@pytest.mark.parametrize("world_size", [1, 2])
def test_pipelines_give_the_losses_of_a_plain_loop(folder, world_size):
    run_ranks(_pipelines_give_the_losses_of_a_plain_loop, world_size, folder / "float16")


def _mapped_rows_are_not_stored(path: Path) -> None:
    table = open_table(path)
    model = shard(Unpooled(table, store_rows=True))
    load_table(model, table, mapped=True)
    model.state_dict()


def test_mapped_rows_are_not_stored_in_checkpoints(folder):
    with pytest.raises(RankError, match=f"{TableError.__name__}: .*use store_rows=False"):
        run_ranks(_mapped_rows_are_not_stored, 1, folder / "float16")
