"""Where frozen tables go: TorchRec's ways to shard, one exchange a collection, copies a node and a rank."""

import inspect
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed import model_parallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.shard import shard, shard_modules
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    TableState,
    frozen_bag_config,
)
from mim_torchrec.embeddings.sharded.live import ItemIndex, update_items
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.placement import node_replicated
from mim_torchrec.embeddings.sharded.rows import CachedRows, DenseRows
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
    frozen_sharders,
)
from mim_torchrec.embeddings.table.format import Table, TableError, VersionMismatch
from tests.distributed.test_frozen_exchange import (
    DIM,
    FEATURES,
    IDS,
    ITEMS,
    Unpooled,
    batch,
    naive_pool,
    whole,
    write_table,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MANY = {"first": ("float16", 8), "second": ("int8", 8), "third": ("float32", 5), "fourth": ("float32", 8)}


class Pooled(nn.Module):
    """Several tables of other types and dims, filled with rows that tell where they are."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        types = {"float16": DataType.FP16, "float32": DataType.FP32, "int8": DataType.INT8}
        self.mm = FrozenEmbeddingBagCollection([
            EmbeddingBagConfig(name=name, num_embeddings=1 + ITEMS, embedding_dim=MANY[name][1],
                               feature_names=FEATURES, data_type=types[MANY[name][0]])
            for name in names
        ], device="cpu")  # fmt: skip
        for k, name in enumerate(names):
            store = find_frozen(self, name)[1].store
            rows = torch.arange(1 + ITEMS)[:, None].repeat(1, store.stored_width) * (k + 1)
            store.write(torch.arange(1 + ITEMS), rows.to(store.tensor.dtype))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.mm(features).values()


def sharded(model: nn.Module, how, env: ShardingEnv | None = None) -> DistributedModelParallel:
    """Shard `model.mm`: each table by a generator of TorchRec's or ours."""
    module = model.get_submodule("mm")
    sharder = next(each for each in frozen_sharders() if each.module_type is type(module))
    plan = construct_module_sharding_plan(
        module, dict.fromkeys(module.frozen_tables(), how), sharder=sharder, device_type="cpu",
        local_size=2 if dist.get_world_size() > 2 else dist.get_world_size(),
        world_size=env.world_size if env else None,
    )  # fmt: skip
    return DistributedModelParallel(
        model, env=env, device=CPU, plan=ShardingPlan({"mm": plan}), sharders=[sharder]
    )


class Counted:
    """Counts the all-to-all exchanges, and their bytes to other ranks than `near`."""

    def __init__(self, near: set[int] | None = None) -> None:
        self.calls, self.bytes_away = 0, 0
        self._near, self._exchange = near or set(), dist.all_to_all_single

    def __enter__(self) -> "Counted":
        dist.all_to_all_single = self._counted
        return self

    def __exit__(self, *problem) -> None:
        dist.all_to_all_single = self._exchange

    def _counted(self, output, input, output_splits=None, input_splits=None, group=None, async_op=False):
        self.calls += 1
        ranks = dist.get_process_group_ranks(group)
        splits = input_splits or [len(input) // len(ranks)] * len(ranks)
        for rank, part in zip(ranks, input.split(splits), strict=True):
            self.bytes_away += 0 if rank in self._near else part.nbytes
        return self._exchange(output, input, output_splits, input_splits, group=group, async_op=async_op)


def lookups_are_the_vectors(model: nn.Module, vectors: Tensor) -> None:
    for step in range(4):
        features = batch(step, len(vectors))
        found = model(features)
        for key in FEATURES:
            assert torch.equal(found[key], vectors[features[key].values()]), (step, key)


def _torchrecs_ways_to_shard_take_frozen_collections(path: Path) -> None:
    table = open_table(path)
    one = Unpooled(table)
    one.mm = shard(one.mm, row_wise(), device=CPU, sharder=FrozenEmbeddingCollectionSharder())
    planned = shard_modules(Unpooled(table), device=CPU, sharders=frozen_sharders())
    manual = Unpooled(table)
    plan = construct_module_sharding_plan(
        manual.mm, {"mm": row_wise()}, sharder=FrozenEmbeddingCollectionSharder()
    )
    assert plan["mm"].compute_kernel == "fused"
    manual = shard_modules(manual, device=CPU, plan=ShardingPlan({"mm": plan}), sharders=frozen_sharders())
    for model in (one, planned, manual):
        load_table(model, table)
        assert find_frozen(model, "mm")[1].store.num_rows < (27 if dist.get_world_size() > 1 else 28)
        lookups_are_the_vectors(model, whole(table))
    bags = nn.Module()
    bags.mm = shard(
        FrozenEmbeddingBagCollection([frozen_bag_config(table, FEATURES)]), row_wise(), device=CPU,
        sharder=FrozenEmbeddingBagCollectionSharder(),
    )  # fmt: skip
    load_table(bags, table)
    features = batch(0, 1 + ITEMS)
    expected = naive_pool(whole(table), features, "sum")
    torch.testing.assert_close(bags.mm(features).values(), expected, rtol=1e-5, atol=1e-6)


def _exchanges_are_three_whatever_the_number_of_tables() -> None:
    for names in (["first"], list(MANY)):
        unsharded = Pooled(names)
        model = sharded(Pooled(names), row_wise())
        for step in range(4):
            features = batch(step, 1 + ITEMS)
            with Counted() as counted:
                found = model(features)
            assert counted.calls == (3 if dist.get_world_size() > 1 else 0)
            assert torch.equal(found, unsharded(features))


def _a_table_that_no_sharder_took_is_not_loaded_whole_on_each_rank(path: Path) -> None:
    table = open_table(path)
    model = DistributedModelParallel(Unpooled(table), device=CPU, plan=ShardingPlan({}))
    with pytest.raises(TableError, match="mm is on the meta device"):
        load_table(model, table, whole_on_each_rank=True)
    model = DistributedModelParallel(Unpooled(table, device="cpu"), device=CPU, plan=ShardingPlan({}))
    if dist.get_world_size() > 1:
        with pytest.raises(
            TableError, match=r"mm is not sharded, and each of 2 ranks .* frozen_sharders\(\)"
        ):
            load_table(model, table)
    load_table(model, table, whole_on_each_rank=True)
    assert table_digest(model)


def _rows_that_are_prefetched_are_in_the_cache_at_the_lookup(path: Path) -> None:
    table = open_table(path)
    model = sharded(Unpooled(table), row_wise())
    module, frozen = find_frozen(model, "mm")
    rows = frozen.store.num_rows
    frozen.store = cache = CachedRows(DenseRows("float16", rows, DIM, CPU), rows, CPU)
    load_table(model, table)
    for step, is_prefetched in enumerate((True, False)):
        features, context = batch(step, 1 + ITEMS), module.create_context()
        received = module.input_dist(context, features).wait().wait()
        if is_prefetched:
            module.prefetch(received, ctx=context)
        cache.hits = cache.misses = 0
        found = module.compute_and_output_dist(context, received)
        for key in FEATURES:
            assert torch.equal(found[key].values(), whole(table)[features[key].values()])
        assert cache.hits if is_prefetched else cache.misses
        assert not (cache.hits and cache.misses)
        cache.write(torch.arange(rows), cache.backing.tensor.clone())  # what is written leaves the cache


def _a_copy_a_rank_exchanges_nothing(path: Path) -> None:
    table = open_table(path)
    model = sharded(Unpooled(table), data_parallel())
    load_table(model, table)
    with Counted() as counted:
        lookups_are_the_vectors(model, whole(table))
    assert counted.calls == 0
    assert model.state_dict().keys() == {"mm._extra_state"}


def two_dimensional(model: nn.Module) -> DistributedModelParallel:
    """TorchRec's `DMPCollection` of 2 x 2 ranks, compiled without assertions, because it asserts a GPU.

    It also numbers the devices of trained tables, which a CPU does not have.
    """
    namespace = dict(vars(model_parallel))
    namespace["_remote_device"] = lambda place: _remote_device(place.rsplit(":", 1)[0])
    exec(compile(inspect.getsource(DMPCollection), "dmp_collection", "exec", optimize=1), namespace)
    sharders, plan = [EmbeddingCollectionSharder(), *frozen_sharders()], {}
    for name, module in model.named_children():
        sharder = next(each for each in sharders if each.module_type is type(module))
        tables = [config.name for config in module.embedding_configs()]
        plan[name] = construct_module_sharding_plan(
            module, dict.fromkeys(tables, row_wise(compute_kernel="fused")), sharder=sharder,
            device_type="cpu", local_size=2, world_size=2,
        )  # fmt: skip
    return namespace["DMPCollection"](
        model, device=CPU, plan=ShardingPlan(plan), world_size=4, sharding_group_size=2,
        global_pg=dist.group.WORLD, sharders=sharders, custom_all_reduce=SYNCHRONIZED.extend,
    )  # fmt: skip


SYNCHRONIZED: list[Tensor] = []


class Beside(Unpooled):
    """A frozen table beside a trained one."""

    def __init__(self, table: Table, **options) -> None:
        super().__init__(table, **options)
        config = EmbeddingConfig(
            name="id", num_embeddings=30, embedding_dim=4, feature_names=FEATURES, data_type=DataType.FP32
        )
        self.id = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, self.id.parameters(), {"lr": 0.1})

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        trained = self.id(features)
        return {"trained": trained["behavior"].values(), **super().forward(features)}


def node_copies(model: nn.Module) -> DistributedModelParallel:
    """One copy on each of two nodes of two ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return sharded(model, node_replicated())


WAYS = {"node": (node_copies, Unpooled), "2d": (two_dimensional, Beside)}


def _two_copies_are_right(path: Path, checkpoint: Path, way: str) -> None:
    place, build = WAYS[way]
    table = open_table(path)
    model, vectors = place(build(table, store_rows=True)), whole(table)
    load_table(model, table)
    frozen = find_frozen(model, "mm")[1]
    assert frozen.store.num_rows in (14, 13)  # of 27
    lookups_are_the_vectors(model, vectors)
    digest, index = table_digest(model), ItemIndex.of(table)
    written = update_items(model, index, IDS[:2], torch.ones(2, DIM), table_version="v1", seq=5).rows
    counts = torch.tensor([written])
    dist.all_reduce(counts)
    assert int(counts) == 4  # two rows on two copies
    vectors[1:3] = 1.0
    lookups_are_the_vectors(model, vectors)
    assert table_digest(model) != digest
    dcp.save({"model": {"mm": model.state_dict()["mm.embeddings.mm.weight"]}}, checkpoint_id=checkpoint)
    fresh = place(build(table, store_rows=True))
    state = {"model": {"mm": fresh.state_dict()["mm.embeddings.mm.weight"]}}
    dcp.load(state, checkpoint_id=checkpoint)
    lookups_are_the_vectors(fresh, vectors)
    assert table_digest(fresh) == table_digest(model)
    if dist.get_rank() == 3:  # misses a window that the others apply
        find_frozen(model, "mm")[1].store.write(torch.tensor([0]), torch.ones(1, DIM, dtype=torch.float16))
    with pytest.raises(TableError, match="mm: its copies differ in block 1 of 2"):
        table_digest(model)


def _an_error_in_one_copy_is_raised_on_all_ranks(path: Path, way: str) -> None:
    place, build = WAYS[way]
    table = open_table(path)
    model = place(build(table))
    if dist.get_rank() == 3:
        find_frozen(model, "mm")[1].expected = TableState("v2")
    with pytest.raises(VersionMismatch, match="rank 3: .* v1, the checkpoint was trained on v2"):
        load_table(model, table)


def _rows_of_a_node_copy_do_not_leave_the_node(path: Path) -> None:
    table = open_table(path)
    near, away = {0, 1} if dist.get_rank() < 2 else {2, 3}, []
    for model in (node_copies(Unpooled(table)), sharded(Unpooled(table), row_wise())):
        load_table(model, table)
        with Counted(near) as counted:
            lookups_are_the_vectors(model, whole(table))
        assert counted.calls == 3 * 4
        away.append(counted.bytes_away)
    assert away[0] == 0 < away[1]


def _tables_of_one_collection_may_have_other_copies(path: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    ways = {"first": row_wise(), "second": node_replicated(), "third": data_parallel(), "fourth": row_wise()}
    model, sharder = Pooled(list(MANY)), FrozenEmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(model.mm, ways, sharder=sharder, device_type="cpu")
    model = DistributedModelParallel(model, device=CPU, plan=ShardingPlan({"mm": plan}), sharders=[sharder])
    unsharded = Pooled(list(MANY))
    features = batch(0, 1 + ITEMS)
    with Counted() as counted:
        assert torch.equal(model(features), unsharded(features))
    assert counted.calls == 3 * 2


def _frozen_rows_are_not_synchronized(path: Path) -> None:
    table = open_table(path)
    model = two_dimensional(Beside(table))
    load_table(model, table)
    with Counted() as counted:
        model.sync()
    assert counted.calls == 0
    assert {tuple(tensor.shape) for tensor in SYNCHRONIZED} == {(15, 4), (15,)}  # weights and Adagrad's


def _a_trained_table_is_divided_by_the_world_beside_a_copy_a_node(path: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    table = open_table(path)
    model, sharders = Beside(table), [EmbeddingCollectionSharder(), *frozen_sharders()]
    plan = {
        name: construct_module_sharding_plan(
            model.get_submodule(name), {table_name: how}, sharder=sharder, device_type="cpu"
        )
        for name, table_name, how, sharder in (
            ("id", "id", row_wise(), sharders[0]),
            ("mm", "mm", node_replicated(), sharders[1]),
        )
    }
    model = DistributedModelParallel(model, device=CPU, plan=ShardingPlan(plan), sharders=sharders)
    load_table(model, table)
    digest = table_digest(model)
    for step in range(3):
        found = model(batch(step, 1 + ITEMS))
        (found["trained"] * found["behavior"][:, :4]).sum().backward()
    assert table_digest(model) == digest
    (trained,) = (value for key, value in model.state_dict().items() if key.startswith("id."))
    assert [*trained.local_shards()[0].tensor.shape] == [8 if dist.get_rank() < 3 else 6, 4]  # of 30
    assert find_frozen(model, "mm")[1].store.num_rows == (13 if dist.get_rank() % 2 else 14)  # of 27


def _a_node_of_unknown_size_is_refused(path: Path) -> None:
    for size in (None, "3"):
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if size:
            os.environ["LOCAL_WORLD_SIZE"] = size
        with pytest.raises(ValueError, match=f"needs LOCAL_WORLD_SIZE.* found {size or 'none'}"):
            sharded(Unpooled(open_table(path)), node_replicated())


def _all(claims: list[tuple]) -> None:
    """Try several claims in one world: starting one costs more than they do."""
    for claim, *args in claims:
        try:
            claim(*args)
        except BaseException as error:
            error.add_note(f"claim {claim.__name__}{args}")
            raise


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("placement") / "float16")


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_tables_go_where_torchrecs_plans_put_them(table, world_size):
    claims = [
        (_torchrecs_ways_to_shard_take_frozen_collections, table),
        (_exchanges_are_three_whatever_the_number_of_tables,),
        (_a_table_that_no_sharder_took_is_not_loaded_whole_on_each_rank, table),
        (_a_copy_a_rank_exchanges_nothing, table),
        (_rows_that_are_prefetched_are_in_the_cache_at_the_lookup, table),
    ]
    run_ranks(_all, world_size, claims)


def test_copies_on_nodes_and_in_sharding_groups_are_right(table, tmp_path):
    claims = [
        (_two_copies_are_right, table, tmp_path / "node", "node"),
        (_two_copies_are_right, table, tmp_path / "2d", "2d"),
        (_an_error_in_one_copy_is_raised_on_all_ranks, table, "node"),
        (_an_error_in_one_copy_is_raised_on_all_ranks, table, "2d"),
        (_rows_of_a_node_copy_do_not_leave_the_node, table),
        (_tables_of_one_collection_may_have_other_copies, table),
        (_frozen_rows_are_not_synchronized, table),
        (_a_trained_table_is_divided_by_the_world_beside_a_copy_a_node, table),
        (_a_node_of_unknown_size_is_refused, table),
    ]
    run_ranks(_all, 4, claims)
