"""Where frozen tables go: TorchRec's ways to shard, one exchange a collection, and what is not sharded."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shard import shard, shard_modules
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.rows import CachedRows, DenseRows
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
    frozen_sharders,
)
from mim_torchrec.embeddings.table.format import Table, TableError
from tests.frozen import DIM, FEATURES, ITEMS, Unpooled, batch, naive_pool, whole, write_table
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


class ManagedCollisions(nn.Module):
    """A frozen collection whose ids TorchRec maps to rows."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        rows = frozen_config(table, FEATURES).num_embeddings
        policy = DistanceLFU_EvictionPolicy()
        module = MCHManagedCollisionModule(
            zch_size=rows, device=CPU, input_hash_size=1000, eviction_interval=2, eviction_policy=policy
        )
        mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)])
        mapping = ManagedCollisionCollection({"mm": module}, mm.embedding_configs())
        self.mm = ManagedCollisionEmbeddingCollection(mm, mapping)


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
        wrapped = DistributedModelParallel(ManagedCollisions(table), device=CPU)
        with pytest.raises(TableError, match="mm is not sharded.* managed-collision"):
            load_table(wrapped, table)
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
    for mapped in (False, True):
        model = sharded(Unpooled(table), data_parallel())
        load_table(model, table, mapped=mapped)
        with Counted() as counted:
            lookups_are_the_vectors(model, whole(table))
        assert counted.calls == 0
    assert model.state_dict().keys() == {"mm._extra_state"}


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
