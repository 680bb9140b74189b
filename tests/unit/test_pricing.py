"""What the planner counts of frozen tables beside trained ones of the same shape."""

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.pricing import FrozenEnumerator
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
    frozen_constraint,
    frozen_sharders,
)

ROWS, DIM, WORLD, NODE = 1_000_003, 64, 8, 4
SHARDERS = [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder(), *frozen_sharders()]
CONSTRAINTS = {
    "trained": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"]),
    "bags": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"]),
    "world": frozen_constraint(),
    "node": frozen_constraint(copy="node"),
    "rank": frozen_constraint(copy="rank"),
    "pooled": frozen_constraint(),
}


@pytest.fixture(scope="module")
def topology() -> Topology:
    trainer = TrainerConfig(
        world_size=WORLD, local_world_size=NODE, hbm_cap_bytes=80 << 30, ddr_cap_bytes=100 << 30
    )
    return TopologyFactory.create_topology(trainer, kernel_config=KernelConfig(compute_device="cuda"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model, meta = nn.Module(), torch.device("meta")
    shape = {"num_embeddings": ROWS, "embedding_dim": DIM}
    for name in ("trained", "world", "node", "rank"):
        config = EmbeddingConfig(name=name, feature_names=[name], **shape)
        trained = name == "trained"
        collection = EmbeddingCollection(tables=[config], device=meta) if trained else None
        setattr(model, name, collection or FrozenEmbeddingCollection([config]))
    bag = EmbeddingBagConfig(name="bags", feature_names=["bags"], **shape)
    model.bags = EmbeddingBagCollection(tables=[bag], device=meta)
    pooled = EmbeddingBagConfig(name="pooled", feature_names=["pooled"], **shape)
    model.pooled = FrozenEmbeddingBagCollection([pooled])
    for trained in (model.trained, model.bags):
        apply_optimizer_in_backward(RowWiseAdagrad, trained.parameters(), {"lr": 0.1})
    return model


@pytest.fixture(scope="module")
def options(model, topology) -> dict[str, ShardingOption]:
    enumerator = FrozenEnumerator(topology, constraints=CONSTRAINTS)
    return {option.name: option for option in enumerator.enumerate(model, SHARDERS)}


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [("world", "trained"), ("node", "trained"), ("rank", "trained"), ("pooled", "bags")],
)
def test_a_frozen_table_has_no_backward_pass_and_costs_less_than_a_trained_one(options, frozen, trained):
    for shard in options[frozen].shards:
        assert shard.perf.bwd_compute == shard.perf.bwd_comms == 0 < shard.perf.fwd_compute
    assert 0 < options[frozen].total_perf < options[trained].total_perf


def test_rows_of_a_frozen_table_travel_unpooled(options):
    assert options["pooled"].shards[0].perf == options["world"].shards[0].perf


def test_a_frozen_table_has_no_optimizer_state(options):
    state = options["trained"].total_storage.hbm - options["world"].total_storage.hbm
    assert state == pytest.approx(4 * ROWS, rel=0.01)


@pytest.mark.parametrize(
    ("name", "rows"), [("world", -(-ROWS // WORLD)), ("node", -(-ROWS // NODE)), ("rank", ROWS)]
)
def test_every_copy_takes_memory(options, name, rows):
    option = options[name]
    assert [*option.shards[0].size] == [rows, DIM] and len(option.shards) == WORLD
    assert option.shards[0].storage.hbm == pytest.approx(4 * rows * DIM, rel=0.02)


def test_a_copy_a_node_is_exchanged_at_the_speed_within_nodes(options):
    node, world = (options[name].shards[0].perf for name in ("node", "world"))
    assert node.fwd_comms < world.fwd_comms / 5 and options["rank"].shards[0].perf.fwd_comms == 0


def test_tables_that_are_not_frozen_are_priced_by_torchrec(options, model, topology):
    known = {name: CONSTRAINTS[name] for name in ("trained", "bags")}
    expected = EmbeddingEnumerator(topology, 512, known).enumerate(model, SHARDERS)
    found = [option for option in expected if option.name in known]
    assert len(found) == 2
    for option in found:
        assert [*map(str, option.shards)] == [*map(str, options[option.name].shards)]


def test_the_planner_takes_what_the_constraints_say(model, topology):
    def planner(**options) -> EmbeddingShardingPlanner:
        reserved = FixedPercentageStorageReservation(percentage=0.1)
        return EmbeddingShardingPlanner(
            topology=topology, constraints=CONSTRAINTS, storage_reservation=reserved, **options
        )

    plan = planner(enumerator=FrozenEnumerator(topology, constraints=CONSTRAINTS)).plan(model, SHARDERS).plan
    found = {
        name: (how.sharding_type, how.compute_kernel) for part in plan.values() for name, how in part.items()
    }
    assert found["node"] == ("data_parallel", "fused") and found["rank"] == ("data_parallel", "dense")
    assert found["world"] == found["pooled"] == found["trained"] == ("row_wise", "fused")
    with pytest.raises(RuntimeError, match="constraints for (node|rank)"):  # whose copies it would not count
        planner().plan(model, SHARDERS)


def test_a_choice_among_copies_is_refused(model, topology):
    both = ParameterConstraints(sharding_types=["row_wise", "data_parallel"])
    with pytest.raises(ValueError, match="world: constrain it to one sharding type"):
        FrozenEnumerator(topology, constraints={"world": both}).enumerate(model, SHARDERS)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"fused_params": {"learning_rate": 0.1}}, r"fused_params\['learning_rate'\]: .* has no such option"),
        ({"fused_params": {"output_dtype": "fp16"}}, "give output_dtype to the frozen collection"),
        ({"qcomm_codecs_registry": {"POOLED_EMBEDDINGS_ALL_TO_ALL": None}}, "no codec for .*POOLED"),
    ],
)
@pytest.mark.parametrize("sharder", [FrozenEmbeddingCollectionSharder, FrozenEmbeddingBagCollectionSharder])
def test_options_that_a_frozen_table_lacks_are_refused_by_name(sharder, options, problem):
    with pytest.raises(ValueError, match=problem):
        sharder(**options)


def test_a_copy_a_rank_is_in_memory_of_the_device():
    with pytest.raises(ValueError, match="a copy a rank is in memory of the device, not uvm"):
        frozen_constraint("uvm", copy="rank")
